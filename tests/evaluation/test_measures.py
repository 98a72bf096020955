import itertools
import math
import random
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from modeling_querit.evaluation import measures
from modeling_querit.evaluation.measures import mean, measure, measure_rows

NAMES = ("ndcg_at_10", "ndcg_at_3", "mrr_at_10", "map", "map_at_5", "precision_at_5", "recall_at_10")
# The same measures by their names in trec_eval and in ir-measures.
TREC_NAMES = ("ndcg_cut_10", "ndcg_cut_3", "recip_rank", "map", "map_cut_5", "P_5", "recall_10")
IR_NAMES = ("nDCG@10", "nDCG@3", "RR", "AP", "AP@5", "P@5", "R@10")


def random_collections(number):
    """Qrels and runs with few different scores, so that ties are everywhere, and documents that nobody has judged."""
    rng = random.Random(0)
    for _ in range(number):
        documents = [f"d{document}" for document in range(rng.randint(1, 30))]
        qrels, run = {}, {}
        for query in map(str, range(rng.randint(1, 8))):
            judged = rng.sample(documents, rng.randint(1, len(documents)))
            qrels[query] = {document: rng.choice([-1, 0, 0, 1, 2, 3]) for document in judged}
            ranked = rng.sample(documents, rng.randint(1, len(documents)))
            run[query] = {document: rng.randint(0, 6) / 7 for document in ranked}
        yield qrels, run


def relevant(qrels):
    return [query for query, grades in qrels.items() if max(grades.values()) > 0]


def slow_values(grades, scores):
    """All measures of a query, by their formulas; ties are ordered by document id, descending."""
    ranking = sorted(sorted(scores, reverse=True), key=lambda document: -np.float32(scores[document]))
    gains = [max(grades.get(document, 0), 0) for document in ranking]
    best = sorted((max(grade, 0) for grade in grades.values()), reverse=True)
    count = sum(gain > 0 for gain in best)
    hits = [gain > 0 for gain in gains]
    precisions = [sum(hits[:rank]) / rank if hits[rank - 1] else 0 for rank in range(1, len(hits) + 1)]

    def dcg(values):
        return sum(value / math.log2(rank + 2) for rank, value in enumerate(values))

    return [
        dcg(gains[:10]) / dcg(best[:10]),
        dcg(gains[:3]) / dcg(best[:3]),
        max((1 / rank for rank, hit in enumerate(hits[:10], start=1) if hit), default=0),
        sum(precisions) / count,
        sum(precisions[:5]) / count,
        sum(hits[:5]) / 5,
        sum(hits[:10]) / count,
    ]


@pytest.mark.slow
def test_200_random_runs_have_the_values_of_trec_eval_of_ir_measures_and_of_the_formulas():
    ir_measures = pytest.importorskip("ir_measures")
    parsed = [ir_measures.parse_measure(name) for name in IR_NAMES]
    for qrels, run in random_collections(200):
        values = measure(qrels, run, NAMES)
        queries = relevant(qrels)
        trec = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.3,10", "recip_rank", "map", "map_cut", "P", "recall"})
        by_trec = trec.evaluate(run)
        by_ir = {
            (metric.query_id, str(metric.measure)): metric.value for metric in ir_measures.iter_calc(parsed, qrels, run)
        }
        for column, (name, trec_name) in enumerate(zip(NAMES, TREC_NAMES, strict=True)):
            assert list(values[name]) == queries
            for query in queries:
                by_others = [by_trec[query][trec_name], by_ir[query, IR_NAMES[column]]]
                if name == "mrr_at_10":
                    # Reciprocal ranks have no cut-off there.
                    by_others = [value * (value >= 0.1) for value in by_others]
                assert by_others == pytest.approx([values[name][query]] * 2, abs=1e-12)
                slow = slow_values(qrels[query], run[query])[column]
                assert values[name][query] == pytest.approx(slow, abs=1e-6)


def test_the_given_order_of_ids_breaks_ties():
    assert measure({"q": {"a": 1}}, {"q": ["a", "z"]}, ["mrr_at_1"])["mrr_at_1"] == {"q": 1}
    assert measure({"q": {"z": 1}}, {"q": ("z", "a")}, ["mrr_at_1"])["mrr_at_1"] == {"q": 1}


def test_scores_that_float32_cannot_tell_apart_are_tied_as_in_trec_eval():
    run = {"q": {"a": 0.5 + 1e-12, "z": 0.5}}
    assert measure({"q": {"z": 1}}, run, ["mrr_at_1"])["mrr_at_1"] == {"q": 1}


def test_queries_without_a_ranking_or_a_relevant_document_are_left_out():
    qrels = {"q": {"a": 1}, "r": {"a": 0}, "s": {"a": 1}, "t": {}}
    assert measure(qrels, {"q": {}, "r": ["a"], "t": ["a"], "u": ["a"]}, ["map"]) == {"map": {"q": 0.0}}


def test_all_queries_can_be_required():
    with pytest.raises(ValueError, match="1 of 2 queries with a relevant document have no ranking, such as 's'"):
        measure({"q": {"a": 1}, "s": {"a": 1}}, {"q": ["a"]}, require_all=True)
    with pytest.raises(ValueError, match="nothing can be measured"):
        measure({"q": {"a": 0}}, {"q": ["a"]}, require_all=True)
    assert measure({"q": {"a": 1}, "r": {"a": 0}}, {"q": ["a"]}, ["map"], require_all=True) == {"map": {"q": 1.0}}


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_scores_must_be_finite(score):
    with pytest.raises(ValueError, match="Query 'q', document 'b': the score is"):
        measure({"q": {"a": 1}}, {"q": {"a": 0.5, "b": score}})
    with pytest.raises(ValueError, match="Query 'q', pair 1: score"):
        measure_rows([0.5, score], [0, 1], ["q", "q"])
    with pytest.raises(ValueError, match="both must be finite"):
        measure_rows([0.5, 0.4], [0, score], ["q", "q"])


def test_other_input_is_refused_by_name():
    with pytest.raises(ValueError, match="The ranking of query 'q' has document 'b' twice"):
        measure({"q": {"a": 1}}, {"q": ["a", "b", "c", "b"]})
    with pytest.raises(ValueError, match="document 'a': the grade 0\\.5 is no whole number"):
        measure({"q": {"a": 0.5}}, {"q": ["a"]})
    for grade in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"document 'a': the grade {grade} is no whole number"):
            measure({"q": {"a": grade, "b": 1}}, {"q": ["a", "b"]})
    with pytest.raises(ValueError, match="no measure 'ndcg@10'"):
        measure({"q": {"a": 1}}, {"q": ["a"]}, ["ndcg@10"])
    with pytest.raises(ValueError, match="shorter"):
        measure_rows([0.5], [1, 0], ["q", "q"])


@given(st.permutations(list(zip([0.5, 0.5, 0.5, 0.9], [0, 1, 2, 0], strict=True))))
def test_the_order_of_rows_does_not_matter_and_ties_earn_nothing(pairs):
    scores, labels = zip(*pairs, strict=True)
    values = measure_rows(scores, labels, ["q"] * 4, ["ndcg_at_10"])["ndcg_at_10"]["q"]
    orders = itertools.permutations([0, 1, 2])
    worst = min(
        measure({"q": {"a": 1, "b": 2}}, {"q": ["x", *("yab"[place] for place in order)]})["ndcg_at_10"]["q"]
        for order in orders
    )
    assert values == pytest.approx(worst, abs=1e-9)


def test_a_constant_model_is_not_paid_for_the_order_of_the_labels():
    assert measure_rows([0.5] * 20, [1] + [0] * 19, ["q"] * 20, ["ndcg_at_10"])["ndcg_at_10"] == {"q": 0.0}


@pytest.mark.parametrize("scale", [1, 0.003, 5_000_000])
def test_soft_labels_have_the_ndcg_of_the_formula(scale):
    labels, scores = [0.9, 0.0, 0.25, 0.5], [0.1, 0.9, 0.8, 0.3]
    discounts = [1 / math.log2(rank + 2) for rank in range(4)]
    gains = [labels[pair] for pair in np.argsort(scores)[::-1]]
    expected = np.dot(gains, discounts) / np.dot(sorted(labels, reverse=True), discounts)
    values = measure_rows(scores, [label * scale for label in labels], ["q"] * 4, ["ndcg_at_10"])
    assert values["ndcg_at_10"]["q"] == pytest.approx(expected, abs=0.02 if scale < 1 else 1e-4)


def test_the_smallest_label_is_relevant():
    assert measure_rows([0.1, 0.9], [1e-6, 0], ["q", "q"], ["mrr_at_10"]) == {"mrr_at_10": {"q": 0.5}}
    assert measure_rows([0.1, 0.9], [1e-6, 1], ["q", "q"], ["recall_at_1"]) == {"recall_at_1": {"q": 0.5}}


def test_the_mean_of_nothing_is_nan():
    assert mean({"a": 0.5, "b": 1.0}) == 0.75
    assert math.isnan(mean({}))


def test_the_metric_module_has_this_code():
    copy = Path(__file__).parents[2] / "metrics/reranking/measures.py"
    assert copy.read_bytes() == Path(measures.__file__).read_bytes(), f"copy {measures.__file__} to {copy}"
