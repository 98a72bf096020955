import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import EvalPrediction

from modeling_querit.evaluation.metrics import expected_mrr, expected_ndcg, mean, mrr, ndcg, ranking_metrics


def slow_ndcg(grades, ranking, k):
    def dcg(values):
        return sum(value / math.log2(index + 2) for index, value in enumerate(values[:k]))

    best = dcg(sorted(grades.values(), reverse=True))
    return dcg([grades.get(document, 0) for document in ranking]) / best


@given(st.data(), st.integers(1, 12))
def test_ndcg_equals_the_formula(data, k):
    documents = [f"d{number}" for number in range(data.draw(st.integers(1, 15)))]
    grades = data.draw(st.dictionaries(st.sampled_from(documents), st.integers(0, 3), min_size=1))
    ranking = data.draw(st.permutations(documents))
    measured = ndcg({"q": grades}, {"q": ranking}, k)
    if max(grades.values()) == 0:
        assert measured == {}
    else:
        assert measured["q"] == pytest.approx(slow_ndcg(grades, ranking, k), abs=1e-6)


def test_the_given_order_breaks_ties():
    """trec_eval sorts equal scores by document id; a list has no equal scores."""
    assert ndcg({"q": {"a": 1}}, {"q": ["a", "z"]})["q"] == 1
    assert ndcg({"q": {"z": 1}}, {"q": ["z", "a"]})["q"] == 1


def test_queries_without_judgement_or_ranking_are_left_out():
    assert ndcg({"q": {"a": 1}, "r": {"a": 0}}, {"q": [], "r": ["a"], "s": ["a"]}) == {"q": 0.0}


def test_a_document_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        ndcg({"q": {"a": 1}}, {"q": ["a", "a"]})


def test_the_mean_of_nothing_is_nan():
    assert mean({"a": 0.5, "b": 1.0}) == 0.75
    assert math.isnan(mean({}))


@given(st.data(), st.integers(1, 12))
def test_mrr_equals_the_formula(data, k):
    documents = [f"d{number}" for number in range(data.draw(st.integers(1, 15)))]
    grades = data.draw(st.dictionaries(st.sampled_from(documents), st.integers(0, 3), min_size=1))
    ranking = data.draw(st.permutations(documents))
    ranks = [rank for rank, document in enumerate(ranking[:k], start=1) if grades.get(document, 0) > 0]
    expected = {} if max(grades.values()) == 0 else {"q": pytest.approx(1 / ranks[0] if ranks else 0.0)}
    assert mrr({"q": grades}, {"q": ranking}, k) == expected


@given(st.data(), st.integers(1, 6))
def test_expected_values_are_means_over_all_orders(data, k):
    """Documents that are judged but no candidates count for the best order alone."""
    documents = [f"d{number}" for number in range(data.draw(st.integers(0, 4)))]
    grades = data.draw(st.dictionaries(st.sampled_from([*documents, "x", "y"]), st.integers(-1, 3), min_size=1))
    orders = list(itertools.permutations(documents))
    for expected, metric in ((expected_ndcg, ndcg), (expected_mrr, mrr)):
        found = expected({"q": grades}, {"q": documents}, k)
        values = [metric({"q": grades}, {"q": list(order)}, k) for order in orders]
        assert found.keys() == values[0].keys()
        if found:
            assert found["q"] == pytest.approx(sum(value["q"] for value in values) / len(values), abs=1e-9)


def test_the_trainer_reports_means_over_queries():
    scores = np.array([[0.1, 0.9, -0.5], [0.2, 0.1, -100.0], [0.3, -100.0, -100.0]])
    labels = np.array([[0.7, 0.0, 0.35], [np.nan, 0.5, -100.0], [0.0, -100.0, -100.0]])
    metrics = ranking_metrics(EvalPrediction(scores, labels))
    first = slow_ndcg({"a": 0.7, "b": 0.0, "c": 0.35}, ["b", "a", "c"], 10)
    second = slow_ndcg({"a": 0.0, "b": 0.5}, ["a", "b"], 10)
    assert metrics == {"ndcg_at_10": pytest.approx((first + second) / 2), "mrr_at_10": pytest.approx(0.5)}
    assert ranking_metrics(EvalPrediction(scores[2:], labels[2:])) == {}


def test_a_constant_model_gets_no_credit():
    labels = np.array([[1.0] + [0.0] * 10])
    metrics = ranking_metrics(EvalPrediction(np.zeros((1, 11)), labels))
    assert metrics == {"ndcg_at_10": 0, "mrr_at_10": 0}


def test_labels_may_be_counts():
    """trec_eval keeps a place for every grade: one of 1e9 may not take the memory of that many."""
    labels = np.array([[3e9, 1e9, 0.0]])
    scores = np.array([[0.1, 0.2, 0.3]])
    metrics = ranking_metrics(EvalPrediction(scores, labels))
    expected = (1 / np.log2(3) + 3 / np.log2(4)) / (3 + 1 / np.log2(3))
    assert metrics["ndcg_at_10"] == pytest.approx(expected, abs=1e-6)
