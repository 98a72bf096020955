import shutil

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_adaptations import make_documents
from transformers import Qwen3Model

from modeling_querit.adaptation.candidates import FusedFirstStage, draw_candidates, make_first_stage, rank_queries
from modeling_querit.adaptation.settings import CandidateSettings
from modeling_querit.retrieval.runs import is_run, write_run
from modeling_querit.retrieval.sampling import Bands

DOCUMENTS = {document["_id"]: document for document in make_documents()}
QUERIES = {"q1": "The fox of the river", "q2": "owl twigs"}


@pytest.fixture(scope="module")
def encoder(tokenizer, tmp_path_factory):
    """A tiny sentence-transformers model, with a dense layer beside its backbone."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer, models

    backbone, folder = (tmp_path_factory.mktemp("encoders") / name for name in ("backbone", "encoder"))
    torch.manual_seed(0)
    Qwen3Model(tiny.make_text_config("qwen3")).save_pretrained(backbone)
    tokenizer.save_pretrained(backbone)
    modules = [models.Transformer(str(backbone)), models.Pooling(32, "mean"), models.Dense(32, 8)]
    SentenceTransformer(modules=modules).save(str(folder))
    return folder


def test_the_identity_of_bm25_covers_all_documents():
    identity = make_first_stage("bm25", DOCUMENTS).identity
    assert make_first_stage("bm25", dict(DOCUMENTS)).identity == identity
    fewer = dict(list(DOCUMENTS.items())[:-1])
    changed = DOCUMENTS | {"d3": DOCUMENTS["d3"] | {"text": "other words"}}
    assert identity not in [make_first_stage("bm25", documents).identity for documents in (fewer, changed)]


def test_the_identity_of_an_encoder_is_not_its_path_nor_the_documents(encoder, tmp_path):
    identity = make_first_stage(str(encoder), DOCUMENTS).identity
    folder = shutil.copytree(encoder, tmp_path / "copy")
    assert make_first_stage(str(folder), dict(list(DOCUMENTS.items())[:3])).identity == identity


@pytest.mark.parametrize("weights", ["model.safetensors", "2_Dense/model.safetensors"])
def test_the_identity_of_an_encoder_covers_all_its_weights(encoder, tmp_path, weights):
    identity = make_first_stage(str(encoder), DOCUMENTS).identity
    folder = shutil.copytree(encoder, tmp_path / "copy")
    tensors = {name: tensor + 1 for name, tensor in load_file(folder / weights).items()}
    save_file(tensors, folder / weights, metadata={"format": "pt"})
    assert make_first_stage(str(folder), DOCUMENTS).identity != identity


def test_the_identity_of_an_encoder_covers_its_prompts(encoder, tmp_path):
    identity = make_first_stage(str(encoder), DOCUMENTS).identity
    folder = shutil.copytree(encoder, tmp_path / "copy")
    config = folder / "config_sentence_transformers.json"
    text = config.read_text()
    config.write_text(text.replace('"query": ""', '"query": "Find: "'))
    assert config.read_text() != text
    assert make_first_stage(str(folder), DOCUMENTS).identity != identity


def test_embeddings_are_cached_by_encoder(encoder, tmp_path):
    stage = make_first_stage(str(encoder), DOCUMENTS, cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    (file,) = folder.glob("*.parquet")
    before = file.stat().st_mtime_ns
    reloaded = make_first_stage(str(encoder), DOCUMENTS, CandidateSettings(batch_size=3), tmp_path)
    assert file.stat().st_mtime_ns == before
    assert reloaded.search(["a fox"], 3) == stage.search(["a fox"], 3)


@pytest.mark.parametrize("name", ["bm25", "encoder"])
def test_scores_equal_those_of_the_search(name, encoder):
    stage = make_first_stage("bm25" if name == "bm25" else str(encoder), DOCUMENTS)
    (hits,) = stage.search(["the fox of the river"], 5)
    documents, scores = zip(*hits, strict=True)
    assert stage.scores("the fox of the river", documents) == pytest.approx(scores)


def test_first_stages_are_fused_by_reciprocal_rank(encoder):
    first, second = make_first_stage("bm25", DOCUMENTS), make_first_stage(str(encoder), DOCUMENTS)
    assert FusedFirstStage([first]).search(["fox"], 3) == first.search(["fox"], 3)
    (hits,) = FusedFirstStage([first, second]).search(["fox"], 3)
    ranks = [[document for document, _ in stage.search(["fox"], 3)[0]] for stage in (first, second)]
    expected = {
        document: sum(1 / (61 + ranking.index(document)) for ranking in ranks if document in ranking)
        for document in {*ranks[0], *ranks[1]}
    }
    assert len(hits) == 3
    assert [score for _, score in hits] == pytest.approx(sorted(expected.values(), reverse=True)[:3])
    assert all(score == pytest.approx(expected[document]) for document, score in hits)
    assert FusedFirstStage([second, first]).search(["fox"], 3) == [hits]


@pytest.mark.parametrize(("name", "expected"), [("a.trec", True), ("b/c.run", True), ("bm25", False), ("run", False)])
def test_runs_are_recognized_by_their_names(name, expected):
    assert is_run(name) == expected


def test_indexes_and_runs_are_fused(tmp_path, caplog):
    stage = make_first_stage("bm25", DOCUMENTS)
    run = {"q1": [("d30", 3.0), ("d31", 2.0), ("d32", 1.0)], "another": [("d1", 1.0)]}
    write_run(run, tmp_path / "a.trec")
    alone = rank_queries(QUERIES, DOCUMENTS, [stage], [], 4)
    assert alone == dict(zip(QUERIES, stage.search(list(QUERIES.values()), 4), strict=True))
    only_run = rank_queries(QUERIES, DOCUMENTS, [], [str(tmp_path / "a.trec")], 2)
    assert only_run == {"q1": run["q1"][:2], "q2": []}
    assert "a.trec ranks only 1 of 2 queries." in caplog.text
    together = rank_queries(QUERIES, DOCUMENTS, [stage], [str(tmp_path / "a.trec")], 4)
    assert list(together) == ["q1", "q2"]
    assert {document for document, _ in together["q1"]} <= {document for document, _ in alone["q1"] + run["q1"]}
    assert [document for document, _ in together["q2"]] == [document for document, _ in alone["q2"]]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"q1": [("d1", 1.0), ("nowhere", 0.5)]}, "query q1 ranks document 'nowhere', which is not in the collection"),
        ({"q7": [("d1", 1.0)]}, "ranks none of the queries"),
        ({}, "ranks none of the queries"),
    ],
)
def test_runs_of_other_queries_or_documents_are_refused(tmp_path, run, message):
    write_run(run, tmp_path / "a.trec")
    with pytest.raises(ValueError, match=rf"a\.trec.*{message}"):
        rank_queries(QUERIES, DOCUMENTS, [], [str(tmp_path / "a.trec")], 4)


IDS = list(DOCUMENTS)
RUN = {f"q{n}": [(document, 0.0) for document in IDS[n : n + 20]] for n in range(10)}


def draw(run, sources, bands, seed=0, documents=IDS):
    return list(draw_candidates(run, sources, documents, bands, seed))


@pytest.mark.parametrize("rank", [0, 5, 15, None])
def test_candidates_come_from_the_top_the_middle_and_the_tail(rank):
    bands = Bands(3, 2, 2, 5, 20)
    sources = {query: IDS[35] if rank is None else hits[rank][0] for query, hits in RUN.items()}
    for candidate in draw(RUN, sources, bands):
        ranking = [document for document, _ in RUN[candidate["query"]]]
        source = sources[candidate["query"]]
        others = [document for document in ranking if document != source]
        drawn = candidate["documents"]
        assert candidate["source"] == source
        assert drawn.count(source) == 1
        assert len(set(drawn)) == len(drawn) == 7
        # The source takes a place at the top.
        assert len({*others[:5]} & {*drawn}) == 2
        assert len({*others[5:20]} & {*drawn}) == 2
        assert len({*drawn} - {*ranking, source}) == 2
        ranked = [document for document in drawn if document in ranking]
        assert drawn[: len(ranked)] == sorted(ranked, key=ranking.index)


def test_draws_depend_on_the_query_and_the_seed_alone():
    sources = dict.fromkeys(RUN, "d0")
    bands = Bands(3, 2, 2, 5, 20)
    drawn = draw(RUN, sources, bands)
    assert draw(RUN, sources, bands) == drawn
    subset = {query: RUN[query] for query in ("q7", "q2")}
    assert draw(subset, sources, bands) == [drawn[7], drawn[2]]
    assert draw(RUN, sources, bands, seed=1) != drawn


@pytest.mark.slow
@given(
    st.integers(2, 30),
    st.lists(st.integers(0, 29), unique=True, max_size=12),
    st.integers(0, 29),
    st.tuples(st.integers(1, 4), st.integers(0, 4), st.integers(0, 4)).filter(lambda counts: sum(counts) > 1),
    st.integers(1, 6),
    st.integers(0, 6),
)
def test_the_source_is_always_a_candidate(count, indices, source, counts, top_depth, more_depth):
    documents = IDS[:count]
    ranked = [documents[index] for index in indices if index < count][: top_depth + more_depth]
    bands = Bands(*counts, top_depth, top_depth + more_depth)
    source = documents[source % count]
    run = {"q": [(document, 0.0) for document in ranked]}
    (candidate,) = draw(run, {"q": source}, bands, documents=documents)
    drawn = candidate["documents"]
    assert source in drawn
    assert len(set(drawn)) == len(drawn) <= bands.size
    assert set(drawn) <= set(documents)


def test_a_query_has_two_candidates_even_if_all_documents_are_ranked():
    """The tail is empty, and only the source comes from the top."""
    documents = IDS[:4]
    run = {"q": [(document, 0.0) for document in documents]}
    (candidate,) = draw(run, {"q": "d0"}, Bands(1, 0, 1, 2, 10), documents=documents)
    assert len(candidate["documents"]) == 2
