import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_querit.evaluation.metrics import mean, ndcg


def slow_ndcg(grades, ranking, k):
    def dcg(values):
        return sum(value / math.log2(place + 2) for place, value in enumerate(values[:k]))

    best = dcg(sorted(grades.values(), reverse=True))
    return dcg([grades.get(document, 0) for document in ranking]) / best


@given(st.data(), st.integers(1, 12))
def test_equals_the_formula(data, k):
    documents = [f"d{number}" for number in range(data.draw(st.integers(1, 15)))]
    grades = data.draw(st.dictionaries(st.sampled_from(documents), st.integers(0, 3), min_size=1))
    ranking = data.draw(st.permutations(documents))
    measured = ndcg({"q": grades}, {"q": ranking}, k)
    if max(grades.values()) == 0:
        assert measured == {}
    else:
        assert measured["q"] == pytest.approx(slow_ndcg(grades, ranking, k), abs=1e-6)


def test_the_given_order_counts_among_ties():
    """trec_eval sorts equal scores by document id; a list has no equal scores."""
    assert ndcg({"q": {"a": 1}}, {"q": ["a", "z"]})["q"] == 1
    assert ndcg({"q": {"z": 1}}, {"q": ["z", "a"]})["q"] == 1


def test_queries_without_judgement_or_ranking():
    assert ndcg({"q": {"a": 1}, "r": {"a": 0}}, {"q": [], "r": ["a"], "s": ["a"]}) == {"q": 0.0}


def test_a_document_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        ndcg({"q": {"a": 1}}, {"q": ["a", "a"]})


def test_mean():
    assert mean({"a": 0.5, "b": 1.0}) == 0.75
    assert math.isnan(mean({}))
