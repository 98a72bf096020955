import shutil

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_adaptations import make_documents
from transformers import Qwen3Model

from modeling_querit.adaptation.candidates import FirstStage, Fused, draw_candidates, rank_queries
from modeling_querit.retrieval.runs import is_run, write_run
from modeling_querit.training.mining import Bands

DOCUMENTS = {each["_id"]: each for each in make_documents()}
QUERIES = {"q1": "The fox of the river", "q2": "owl twigs"}


@pytest.fixture(scope="module")
def encoder(tokenizer, tmp_path_factory):
    """A tiny sentence-transformers model with weights beyond those of its backbone."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer, models

    backbone, folder = (tmp_path_factory.mktemp("encoders") / name for name in ("backbone", "encoder"))
    torch.manual_seed(0)
    Qwen3Model(tiny.make_text_config("qwen3")).save_pretrained(backbone)
    tokenizer.save_pretrained(backbone)
    modules = [models.Transformer(str(backbone)), models.Pooling(32, "mean"), models.Dense(32, 8)]
    SentenceTransformer(modules=modules).save(str(folder))
    return folder


def test_bm25_weighs_terms_by_all_documents():
    identity = FirstStage("bm25", DOCUMENTS).identity
    assert FirstStage("bm25", dict(DOCUMENTS)).identity == identity
    fewer = dict(list(DOCUMENTS.items())[:-1])
    changed = DOCUMENTS | {"d3": DOCUMENTS["d3"] | {"text": "other words"}}
    assert identity not in [FirstStage("bm25", each).identity for each in (fewer, changed)]


def test_an_encoder_is_what_it_is_wherever_it_is(encoder, tmp_path):
    identity = FirstStage(str(encoder), DOCUMENTS).identity
    folder = shutil.copytree(encoder, tmp_path / "copy")
    assert FirstStage(str(folder), dict(list(DOCUMENTS.items())[:3])).identity == identity


@pytest.mark.parametrize("weights", ["model.safetensors", "2_Dense/model.safetensors"])
def test_other_weights_are_another_encoder(encoder, tmp_path, weights):
    identity = FirstStage(str(encoder), DOCUMENTS).identity
    folder = shutil.copytree(encoder, tmp_path / "copy")
    tensors = {name: tensor + 1 for name, tensor in load_file(folder / weights).items()}
    save_file(tensors, folder / weights, metadata={"format": "pt"})
    assert FirstStage(str(folder), DOCUMENTS).identity != identity


def test_other_prompts_are_another_encoder(encoder, tmp_path):
    identity = FirstStage(str(encoder), DOCUMENTS).identity
    folder = shutil.copytree(encoder, tmp_path / "copy")
    config = folder / "config_sentence_transformers.json"
    text = config.read_text()
    config.write_text(text.replace('"query": ""', '"query": "Find: "'))
    assert config.read_text() != text
    assert FirstStage(str(folder), DOCUMENTS).identity != identity


def test_embeddings_are_kept_by_encoder(encoder, tmp_path):
    stage = FirstStage(str(encoder), DOCUMENTS, tmp_path)
    (folder,) = tmp_path.iterdir()
    (file,) = folder.glob("*.safetensors")
    before = file.stat().st_mtime_ns
    again = FirstStage(str(encoder), DOCUMENTS, tmp_path, batch_size=3)
    assert file.stat().st_mtime_ns == before
    assert again.search(["a fox"], 3) == stage.search(["a fox"], 3)


@pytest.mark.parametrize("name", ["bm25", "encoder"])
def test_scores_are_those_of_the_search(name, encoder):
    stage = FirstStage("bm25" if name == "bm25" else str(encoder), DOCUMENTS)
    (hits,) = stage.search(["the fox of the river"], 5)
    assert stage.scores("the fox of the river", [each for each, _ in hits]) == pytest.approx([s for _, s in hits])


def test_fused_stages(encoder):
    first, second = FirstStage("bm25", DOCUMENTS), FirstStage(str(encoder), DOCUMENTS)
    assert Fused([first]).search(["fox"], 3) == first.search(["fox"], 3)
    (hits,) = Fused([first, second]).search(["fox"], 3)
    ranks = [[each for each, _ in stage.search(["fox"], 3)[0]] for stage in (first, second)]
    expected = {
        each: sum(1 / (61 + ranking.index(each)) for ranking in ranks if each in ranking)
        for each in {*ranks[0], *ranks[1]}
    }
    assert len(hits) == 3
    assert [score for _, score in hits] == pytest.approx(sorted(expected.values(), reverse=True)[:3])
    assert all(score == pytest.approx(expected[each]) for each, score in hits)
    assert Fused([second, first]).search(["fox"], 3) == [hits]


@pytest.mark.parametrize(("name", "expected"), [("a.trec", True), ("b/c.run", True), ("bm25", False), ("run", False)])
def test_runs_are_known_by_their_names(name, expected):
    assert is_run(name) == expected


def test_ranks_by_indexes_and_runs_together(tmp_path, caplog):
    stage = FirstStage("bm25", DOCUMENTS)
    run = {"q1": [("d30", 3.0), ("d31", 2.0), ("d32", 1.0)], "another": [("d1", 1.0)]}
    write_run(run, tmp_path / "a.trec")
    alone = rank_queries(QUERIES, DOCUMENTS, [stage], [], 4)
    assert alone == dict(zip(QUERIES, stage.search(list(QUERIES.values()), 4), strict=True))
    only_run = rank_queries(QUERIES, DOCUMENTS, [], [str(tmp_path / "a.trec")], 2)
    assert only_run == {"q1": run["q1"][:2], "q2": []}
    assert "a.trec ranks only 1 of 2 queries." in caplog.text
    together = rank_queries(QUERIES, DOCUMENTS, [stage], [str(tmp_path / "a.trec")], 4)
    assert list(together) == ["q1", "q2"]
    assert {each for each, _ in together["q1"]} <= {each for each, _ in alone["q1"] + run["q1"]}
    assert [each for each, _ in together["q2"]] == [each for each, _ in alone["q2"]]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"q1": [("d1", 1.0), ("nowhere", 0.5)]}, "query q1 has document 'nowhere', which the corpus has not"),
        ({"q7": [("d1", 1.0)]}, "ranks none of the queries"),
        ({}, "ranks none of the queries"),
    ],
)
def test_runs_over_something_else_are_refused(tmp_path, run, message):
    write_run(run, tmp_path / "a.trec")
    with pytest.raises(ValueError, match=rf"a\.trec.*{message}"):
        rank_queries(QUERIES, DOCUMENTS, [], [str(tmp_path / "a.trec")], 4)


IDS = list(DOCUMENTS)
RUN = {f"q{n}": [(each, 0.0) for each in IDS[n : n + 20]] for n in range(10)}


def draw(run, sources, bands, seed=0, documents=IDS):
    return list(draw_candidates(run, sources, documents, bands, seed))


@pytest.mark.parametrize("place", [0, 5, 15, None])
def test_from_the_top_the_middle_and_the_tail(place):
    bands = Bands(3, 2, 2, 5, 20)
    sources = {query: IDS[35] if place is None else hits[place][0] for query, hits in RUN.items()}
    for candidate in draw(RUN, sources, bands):
        ranking = [each for each, _ in RUN[candidate["query"]]]
        source = sources[candidate["query"]]
        others = [each for each in ranking if each != source]
        drawn = candidate["documents"]
        assert candidate["source"] == source
        assert drawn.count(source) == 1
        assert len(set(drawn)) == len(drawn) == 7
        # The source takes a place at the top.
        assert len({*others[:5]} & {*drawn}) == 2
        assert len({*others[5:20]} & {*drawn}) == 2
        assert len({*drawn} - {*ranking, source}) == 2
        ranked = [each for each in drawn if each in ranking]
        assert drawn[: len(ranked)] == sorted(ranked, key=ranking.index)


def test_draws_depend_on_the_query_and_the_seed_alone():
    sources = dict.fromkeys(RUN, "d0")
    bands = Bands(3, 2, 2, 5, 20)
    drawn = draw(RUN, sources, bands)
    assert draw(RUN, sources, bands) == drawn
    some = {query: RUN[query] for query in ("q7", "q2")}
    assert draw(some, sources, bands) == [drawn[7], drawn[2]]
    assert draw(RUN, sources, bands, seed=1) != drawn


@given(
    st.integers(2, 30),
    st.lists(st.integers(0, 29), unique=True, max_size=12),
    st.integers(0, 29),
    st.tuples(st.integers(1, 4), st.integers(0, 4), st.integers(0, 4)).filter(lambda counts: sum(counts) > 1),
    st.integers(1, 6),
    st.integers(0, 6),
)
def test_the_source_is_always_there(count, places, source, counts, top_depth, more_depth):
    documents = IDS[:count]
    ranked = [documents[place] for place in places if place < count][: top_depth + more_depth]
    bands = Bands(*counts, top_depth, top_depth + more_depth)
    source = documents[source % count]
    run = {"q": [(each, 0.0) for each in ranked]}
    (candidate,) = draw(run, {"q": source}, bands, documents=documents)
    drawn = candidate["documents"]
    assert source in drawn
    assert len(set(drawn)) == len(drawn) <= bands.size
    assert set(drawn) <= set(documents)


def test_a_ranking_of_all_documents_leaves_something_to_compare():
    """Where the tail is empty, and nothing but the source comes from the top."""
    documents = IDS[:4]
    run = {"q": [(each, 0.0) for each in documents]}
    (candidate,) = draw(run, {"q": "d0"}, Bands(1, 0, 1, 2, 10), documents=documents)
    assert len(candidate["documents"]) == 2
