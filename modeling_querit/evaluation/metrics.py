"""Ranking metrics: nDCG and MRR by pytrec_eval (trec_eval's own code), and what a random order is expected to reach."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytrec_eval

from ..retrieval.collection import Qrels

if TYPE_CHECKING:
    from transformers import EvalPrediction

# Query id -> value of a metric in [0, 1].
PerQuery = dict[str, float]
# Query id -> document ids, best first.
Rankings = Mapping[str, Sequence[str]]


def ndcg(qrels: Qrels, rankings: Rankings, k: int = 10) -> PerQuery:
    """Compute nDCG@k for each query that has a relevant document.

    Args:
        qrels: Query id -> document id -> grade.
        rankings: Query id -> document ids, best first. Not scores, as trec_eval would order ties by document id.
        k: Cut-off rank.

    Returns:
        Query id -> nDCG in [0, 1], of the queries that have a ranking and a grade above 0.

    Raises:
        ValueError: if a ranking has a document twice.

    Example:
        ```python
        >>> ndcg({"q": {"a": 1}}, {"q": ["b", "a"]})
        {'q': 0.6309297535714575}
        ```
    """
    return _measure(qrels, rankings, f"ndcg_cut.{k}")


def mrr(qrels: Qrels, rankings: Rankings, k: int = 10) -> PerQuery:
    """Compute the reciprocal rank of the first relevant document among the first k, or 0; as `ndcg` otherwise.

    Example:
        ```python
        >>> mrr({"q": {"a": 1}}, {"q": ["b", "a"]})
        {'q': 0.5}
        ```
    """
    return _measure(qrels, {query: documents[:k] for query, documents in rankings.items()}, "recip_rank")


def _measure(qrels: Qrels, rankings: Rankings, measure: str) -> PerQuery:
    judged = _with_relevant_documents(qrels)
    run = {}
    for query, documents in rankings.items():
        if len(set(documents)) != len(documents):
            raise ValueError(f"The ranking of query {query!r} has a document twice.")
        if query in judged:
            run[query] = {document: float(-rank) for rank, document in enumerate(documents)}
    measured = pytrec_eval.RelevanceEvaluator(judged, {measure}).evaluate(run)
    # trec_eval leaves out a query whose ranking is empty: its value is 0.
    return {query: measured.get(query, {}).get(measure.replace(".", "_"), 0.0) for query in run}


def expected_ndcg(qrels: Qrels, candidates: Rankings, k: int = 10) -> PerQuery:
    """Compute the nDCG@k that a random order of the candidates has on average: each rank holds the mean gain.

    Example:
        ```python
        >>> expected_ndcg({"q": {"a": 1}}, {"q": ["a", "b"]})
        {'q': 0.8154648767857288}
        ```
    """
    judged = _with_relevant_documents(qrels)
    return {query: _expected_ndcg(judged[query], ids, k) for query, ids in candidates.items() if query in judged}


def expected_mrr(qrels: Qrels, candidates: Rankings, k: int = 10) -> PerQuery:
    """Compute the MRR@k that a random order of the candidates has on average, exactly; as `expected_ndcg` otherwise."""
    judged = _with_relevant_documents(qrels)
    return {query: _expected_mrr(judged[query], ids, k) for query, ids in candidates.items() if query in judged}


def _expected_ndcg(grades: Mapping[str, int], documents: Sequence[str], k: int) -> float:
    if not documents:
        return 0.0
    # A grade below 0 counts as 0, as in trec_eval.
    mean_gain = sum(max(grades.get(document, 0), 0) for document in documents) / len(documents)
    ideal = sorted((max(grade, 0) for grade in grades.values()), reverse=True)[:k]
    ideal_dcg = sum(gain * discount for gain, discount in zip(ideal, _discounts(len(ideal)), strict=True))
    return mean_gain * sum(_discounts(min(len(documents), k))) / ideal_dcg


def _expected_mrr(grades: Mapping[str, int], documents: Sequence[str], k: int) -> float:
    relevant = sum(grades.get(document, 0) > 0 for document in documents)
    value, none_before = 0.0, 1.0
    for rank in range(1, min(len(documents), k) + 1):
        remaining = len(documents) - rank + 1
        value += none_before * relevant / remaining / rank
        # The chance that no relevant document is at this rank or before.
        none_before *= max(0.0, 1 - relevant / remaining)
    return value


def _discounts(count: int) -> list[float]:
    return [1 / math.log2(rank + 1) for rank in range(1, count + 1)]


def _with_relevant_documents(qrels: Qrels) -> dict[str, dict[str, int]]:
    return {query: dict(grades) for query, grades in qrels.items() if max(grades.values(), default=0) > 0}


def ranking_metrics(predictions: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of `QueritTrainer`: nDCG@10 and MRR@10, means over the queries with a label above 0.

    Args:
        predictions: Scores and labels, both (queries, documents), padded with -100. Continuous labels are rounded to
            four decimals or, if one is above 100, to 1e-6 of the highest. A document with label NaN is not judged, so
            not relevant. Documents with equal scores are ordered least relevant first: a constant model gets no credit.

    Returns:
        `ndcg_at_10` and `mrr_at_10` in [0, 1], or nothing if no query has a label above 0. MRR says little about soft
        labels, most of which are above 0.
    """
    qrels, rankings = {}, {}
    # trec_eval allocates memory for every grade up to the highest.
    scale = min(10_000, 1_000_000 / max(float(np.nanmax(predictions.label_ids, initial=0)), 1e-9))
    for number, (scores, labels) in enumerate(zip(predictions.predictions, predictions.label_ids, strict=True)):
        # Scores are in [-1, 1]: what is below is padding.
        columns = [column for column in range(len(scores)) if scores[column] > -2]
        # trec_eval wants whole grades; their unit does not matter to either metric.
        grades = {column: round(float(labels[column]) * scale) for column in columns if labels[column] > 0}
        ranking = sorted(columns, key=lambda column: (-scores[column], grades.get(column, 0)))
        qrels[str(number)] = {str(column): grade for column, grade in grades.items()}
        rankings[str(number)] = [str(column) for column in ranking]
    per_query = {"ndcg_at_10": ndcg(qrels, rankings), "mrr_at_10": mrr(qrels, rankings)}
    return {name: mean(values) for name, values in per_query.items() if values}


def mean(values: Mapping[str, float]) -> float:
    """Return the mean over queries, or NaN if there are none."""
    return sum(values.values()) / len(values) if values else float("nan")
