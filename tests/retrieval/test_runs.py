import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_querit.retrieval.runs import fuse, read_run, write_run

# What str.split leaves whole.
ids = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=8)
scores = st.floats(allow_nan=False, allow_infinity=False)
rankings = st.lists(st.permutations("abcdef").flatmap(lambda ids: st.integers(0, 6).map(lambda n: ids[:n])), max_size=5)


@pytest.mark.slow
@given(st.dictionaries(ids, st.dictionaries(ids, scores, min_size=1)))
def test_a_run_is_read_as_it_was_written(tmp_path, found):
    run = {query: sorted(hits.items(), key=lambda hit: -hit[1]) for query, hits in found.items()}
    write_run(run, tmp_path / "a.trec")
    assert read_run(tmp_path / "a.trec") == run


def test_the_format_is_that_of_trec(tmp_path):
    write_run({"q1": [("b", 2.5), ("a", 1.0)], "q2": [("c", -0.25)]}, tmp_path / "a.trec", tag="bm25")
    lines = (tmp_path / "a.trec").read_text().splitlines()
    assert lines == ["q1 Q0 b 1 2.5 bm25", "q1 Q0 a 2 1.0 bm25", "q2 Q0 c 1 -0.25 bm25"]


def test_documents_are_ordered_by_score_not_rank(tmp_path):
    (tmp_path / "a.run").write_text("q Q0 a 1 0.5 x\n\nr\tQ0\tz\t1\t1e-3\n  q Q0 b 2 7 x\nq Q0 c 3 0.5 x\n")
    assert read_run(tmp_path / "a.run") == {"q": [("b", 7.0), ("a", 0.5), ("c", 0.5)], "r": [("z", 0.001)]}


def test_scores_may_be_numpy_floats(tmp_path):
    numpy = pytest.importorskip("numpy")
    write_run({"q": [("a", numpy.float64(0.5)), ("b", numpy.float32(0.25))]}, tmp_path / "a.trec")
    assert read_run(tmp_path / "a.trec") == {"q": [("a", 0.5), ("b", 0.25)]}


@pytest.mark.parametrize("run", [{"q": [("my file.txt", 1.0)]}, {"a query": [("a", 1.0)]}, {"q": [("", 1.0)]}])
def test_ids_that_the_format_cannot_hold_are_refused(tmp_path, run):
    with pytest.raises(ValueError, match=r"file\.txt|a query|''"):
        write_run(run, tmp_path / "a.trec")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q a 1 0.5 x", "not 'query Q0 document rank score tag'"),
        ("q Q0 b c 1 7 x", "not 'query Q0 document rank score tag'"),
        ("q Q0 b 1 high x", "not 'query Q0 document rank score tag'"),
        ('{"q": {"a": 1}}', "not 'query Q0"),
        ("q Q0 b 1 nan x", "the score is nan"),
        ("q Q0 b 1 inf x", "the score is inf"),
        ("q Q0 a 2 0.1 x", "query q has document a twice"),
    ],
)
def test_broken_lines_are_named(tmp_path, line, message):
    (tmp_path / "a.trec").write_text(f"q Q0 a 1 0.5 x\n{line}\n")
    with pytest.raises(ValueError, match=rf"a\.trec, line 2: .*{message}"):
        read_run(tmp_path / "a.trec")


def test_fused_scores_are_sums_of_reciprocal_ranks():
    first, second = [("a", 9.0), ("b", 8.0), ("c", 7.0)], [("b", 0.7), ("d", 0.6)]
    expected = [("b", 1 / 62 + 1 / 61), ("a", 1 / 61), ("d", 1 / 62), ("c", 1 / 63)]
    assert fuse([first, second]) == [(name, pytest.approx(score)) for name, score in expected]
    assert [name for name, _ in fuse([first, second], k=2)] == ["b", "a"]
    assert fuse([first, second], constant=1)[0] == ("b", pytest.approx(1 / 3 + 1 / 2))


def test_a_single_ranking_is_unchanged():
    assert fuse([[("a", 9.0), ("b", 8.0)]], k=1) == [("a", 9.0)]
    assert fuse([]) == fuse([[], []]) == []


def test_fusion_ignores_scores():
    ranking = [("a", 9.0), ("b", 8.0)]
    assert fuse([ranking, [("c", 1.0)]]) == fuse([[("a", 0.1), ("b", 0.1)], [("c", -5.0)]])


@pytest.mark.slow
@given(rankings, st.randoms(use_true_random=False))
def test_the_order_of_rankings_does_not_matter(orders, rng):
    rankings = [[(document, 0.0) for document in order] for order in orders]
    assert fuse(rankings) == fuse(rng.sample(rankings, len(rankings)))
