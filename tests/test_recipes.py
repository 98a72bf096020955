import gzip
import json

import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, Gemma3TextModel

from recipes.default_model import embed, measure, model_queries, score, sources, teachers
from recipes.default_model.fast_gemma import FastGemma
from recipes.default_model.stream import Stream, texts_of


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data" / "general" / "toy"
    (folder / "qrels").mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({"languages": ["en"], "licence": "CC0"}))
    for name, count in (("corpus", 40), ("queries", 40)):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as out:
            for number in range(count):
                row = {"_id": f"{name[0]}{number}", "title": "", "text": f"{name} word{number} and more words"}
                out.write(json.dumps(row) + "\n")
    lines = "".join(f"q{number}\tc{number}\t1\n" for number in range(40))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        use_bidirectional_attention=True,
    )
    return Gemma3TextModel(config).eval()


def last_states(backbone, texts):
    found = [backbone(input_ids=torch.tensor([each])).last_hidden_state[0, -1] for each in texts]
    return torch.stack(found).float()


TEXTS = [[3, 4, 5], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [20, 21]]


def test_the_fast_pass_has_the_states_of_transformers(backbone):
    fast = FastGemma(backbone, rank=2, alpha=2, compiled=False)
    wanted = last_states(backbone, TEXTS)
    assert torch.cosine_similarity(fast(TEXTS), wanted, -1).min() > 0.999


def test_the_fast_pass_has_the_gradients_of_transformers(backbone):
    fast = FastGemma(backbone, rank=2, alpha=2, compiled=False)
    direction = torch.randn(32)
    (fast(TEXTS) @ direction).sum().backward()
    backbone.requires_grad_(True).zero_grad()
    (last_states(backbone, TEXTS) @ direction).sum().backward()
    for name, part in (("q_proj", "self_attn"), ("v_proj", "self_attn"), ("down_proj", "mlp")):
        adapter = fast.layers[1][name]
        wanted = adapter.scale * getattr(getattr(backbone.layers[1], part), name).weight.grad @ adapter.a.t()
        assert torch.cosine_similarity(adapter.b.grad.flatten(), wanted.flatten(), 0) > 0.99


def test_adapters_are_written_into_a_backbone(backbone):
    fast = FastGemma(backbone, rank=2, alpha=2, compiled=False)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    fast.merge()
    other = Gemma3TextModel(backbone.config).eval()
    other.load_state_dict(backbone.state_dict())
    fast.write_to(other)
    wanted = last_states(other, TEXTS)
    assert torch.cosine_similarity(fast(TEXTS), wanted, -1).min() > 0.999
    assert torch.cosine_similarity(last_states(backbone, TEXTS), wanted, -1).min() < 0.999


def test_all_weights_can_be_trained(backbone):
    fast = FastGemma(backbone, rank=0, compiled=False)
    direction = torch.randn(32)
    (fast(TEXTS) @ direction).sum().backward()
    backbone.requires_grad_(True).zero_grad()
    (last_states(backbone, TEXTS) @ direction).sum().backward()
    wanted = backbone.layers[1].mlp.up_proj.weight.grad
    found = fast.layers[1]["up_proj"].w.grad
    assert torch.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.99


def test_the_cross_encoder_joins_the_labels():
    row = {"labels": [1.0, 0.5], "relevance": [0.9, 0.1], "teachers": {"bm25": [1.0, 0.0]}}
    found = score.joined(row, [0.0, 2.0], share=1.0)
    assert found["labels"] == [0.8, 1.0]
    assert score.joined(row, [0.0, 2.0], share=0.0)["labels"] == row["labels"]
    assert found["teachers"] == {"bm25": [1.0, 0.0], "cross_encoder": [0.0, 2.0]}


def test_held_out_documents_are_the_same_in_all_languages():
    for page in map(str, range(200)):
        held = {sources.is_held_out(name, f"{name[-2:]}_{page}") for name in ("lohelp_de", "lohelp_es", "lohelp_ru")}
        assert len(held) == 1


def test_only_training_data_are_read(tmp_path):
    with pytest.raises(ValueError, match="targets"):
        sources.load(tmp_path, "targets", "scifact")


def test_a_larger_cap_has_the_documents_of_a_smaller_one(data, monkeypatch):
    monkeypatch.setitem(sources.CAPS, "toy", 10)
    small = sources.load(data, "general", "toy")
    monkeypatch.setitem(sources.CAPS, "toy", 20)
    large = sources.load(data, "general", "toy")
    assert len(small.documents) == 10
    assert small.documents.keys() < large.documents.keys()
    assert len(small.queries) == 10


def test_a_cache_gives_back_what_was_added(tmp_path):
    cache = embed.Cache(tmp_path / "cache")
    vectors = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    cache.add(["a", "b", "c"], vectors)
    again = embed.Cache(tmp_path / "cache")
    assert again.missing(["a", "d", "d"]) == ["d"]
    assert np.allclose(again.get(["c", "a"]), vectors[[2, 0]], atol=1e-2)


def test_a_stream_goes_on_where_it_stopped(data, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = [{"query": f"q{n}", "documents": [f"c{n}", f"c{n + 1}"], "labels": [1.0, 0.0]} for n in range(30)]
    (folder / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = Stream(data, [folder])
    seen = [first.step(number, 1)[0]["query"] for number in range(40)]
    stopped = Stream(data, [folder])
    for number in range(15):
        stopped.step(number, 1)
    resumed = Stream(data, [folder])
    resumed.counts.update(stopped.counts)
    assert [resumed.step(number, 1)[0]["query"] for number in range(15, 40)] == seen[15:]
    assert len(set(seen[:30])) == 30


def test_rows_show_no_titles_where_one_is_the_query():
    documents = {"a": {"title": "Faust", "text": "By Goethe."}, "b": {"title": "Emma", "text": "By Austen."}}
    row = {"documents": ["a", "b"], "titles": False, "edits": {"b": {"title": "Emma", "text": "By."}}}
    assert texts_of(row, documents) == [{"title": "", "text": "By Goethe."}, {"title": "", "text": "By."}]


def test_ndcg_of_an_order():
    assert measure.ndcg([1, 0, 0], [3.0, 2.0, 1.0]) == 1
    assert measure.ndcg([0, 1], [3.0, 2.0]) == pytest.approx(0.6309, abs=1e-4)
    assert measure.random_ndcg([1, 0]) == pytest.approx((1 + 0.6309) / 2, abs=1e-4)


@pytest.mark.slow
def test_weights_of_teachers_follow_those_who_are_right():
    rng = np.random.default_rng(0)
    lists = []
    for _ in range(100):
        good, bad = rng.random(5), rng.random(5)
        picked = good.argmax()
        lists.append(
            {
                "scores": {"embeddinggemma": good.tolist(), "bm25": bad.tolist()},
                "labels": [float(n == picked) for n in range(5)],
            }
        )
    weights = teachers.fit(lists, ["embeddinggemma", "bm25"])
    assert weights["embeddinggemma"] > 5 * abs(weights["bm25"])


def test_queries_of_an_answer():
    answer = "Question: Wie entfernt man ein Paket?\n**Search**: paket, entfernen\n"
    assert model_queries.queries_of(answer) == {
        "Question": "Wie entfernt man ein Paket?",
        "Search": "paket, entfernen",
    }
