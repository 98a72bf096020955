import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_querit.evaluation.comparison import (
    by_score,
    first_stage_candidates,
    judged_queries,
    measure,
    p_value,
)
from modeling_querit.evaluation.metrics import ndcg
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


def test_judged_queries_have_something_to_find():
    assert judged_queries(make_collection()) == ["q1", "q2"]


@pytest.mark.parametrize("qrels", [{}, {"q1": {}}, {"q1": {"a": 0}, "q3": {"d": -1}}])
def test_judgements_without_a_relevant_document(qrels):
    with pytest.raises(ValueError, match="animals: its judgements have no relevant document"):
        judged_queries(Collection("animals", DOCUMENTS, QUERIES, qrels))


def test_candidates_are_the_first_of_the_first_stage():
    found = first_stage_candidates(make_collection(), BM25(DOCUMENTS), ["q2", "q1"], 2)
    assert {query: list(hits) for query, hits in found.items()} == {"q2": ["c", "b"], "q1": ["a", "b"]}
    assert list(found) == ["q2", "q1"]
    assert list(found["q1"].items()) == BM25(DOCUMENTS).search(["fox"], 2)[0]


def test_candidates_that_are_listed_are_all_there_is():
    """Where some queries list none, these have the first of the first stage."""
    collection = make_collection(candidates={"q1": ["d", "b", "a", "gone"]})
    found = first_stage_candidates(collection, BM25(DOCUMENTS), ["q1", "q2"], 1)
    assert {query: list(hits) for query, hits in found.items()} == {"q1": ["a", "b", "d"], "q2": ["c"]}


def test_by_score_keeps_the_order_of_equals():
    assert by_score("abcd", [0.5, 1.0, 0.5, 1.0]) == ["b", "d", "a", "c"]
    assert by_score([], []) == []


def test_measure():
    rankings = {"good": {"q1": ["b", "a"], "q2": ["b", "c"]}, "bad": {"q1": ["a", "b"], "q2": ["d"]}}
    figures = measure(make_collection(), rankings)
    assert figures["good"] == {"q1": 1.0, "q2": 1.0}
    assert figures["bad"] == {"q1": pytest.approx(1 / np.log2(3)), "q2": 0.0}
    assert figures["bad"] == ndcg(QRELS, rankings["bad"])


def figures_of(values):
    return {f"q{n}": value for n, value in enumerate(values)}


# Sums of eighths are exact.
eighths = st.integers(0, 8).map(lambda n: n / 8)


@given(st.lists(st.tuples(eighths, eighths), min_size=2, max_size=7))
def test_p_value_is_the_share_of_all_sign_flips(pairs):
    first, second = zip(*pairs, strict=True)
    differences = [a - b for a, b in pairs]
    flips = itertools.product((1, -1), repeat=len(pairs))
    sums = [abs(sum(sign * each for sign, each in zip(signs, differences, strict=True))) for signs in flips]
    expected = sum(each >= abs(sum(differences)) for each in sums) / len(sums)
    assert p_value(figures_of(first), figures_of(second)) == pytest.approx(expected)
    assert p_value(figures_of(second), figures_of(first)) == pytest.approx(expected)


def test_p_value_of_many_queries():
    rng = np.random.default_rng(0)
    second = rng.uniform(0, 1, 200)
    noise = rng.normal(0, 0.1, 200)
    shifted = second + noise - noise.mean() + 0.014
    # z = 0.014 / (0.1 / sqrt(200)) is about 2, so the p-value is about 0.05.
    found = p_value(figures_of(shifted), figures_of(second), seed=3)
    assert found == pytest.approx(0.05, abs=0.03)
    assert p_value(figures_of(shifted), figures_of(second), seed=3) == found
    assert p_value(figures_of(second + 0.1), figures_of(second)) < 0.001


def test_the_order_of_queries_does_not_matter():
    first, second = figures_of([0.5, 0.25, 1.0, 0.75]), figures_of([0.0, 0.5, 0.25, 0.5])
    assert p_value(dict(reversed(first.items())), second) == p_value(first, second)


@pytest.mark.parametrize(("first", "second"), [([], []), ([0.5], [0.1]), ([0.1, 0.7], [0.1, 0.7])])
def test_nothing_to_tell_apart(first, second):
    assert p_value(figures_of(first), figures_of(second)) == 1.0


def test_figures_of_different_queries():
    with pytest.raises(ValueError, match="different queries"):
        p_value({"a": 0.5, "b": 0.5}, {"a": 0.5, "c": 0.5})
