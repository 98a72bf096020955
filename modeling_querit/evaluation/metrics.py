"""Ranking metrics: nDCG and MRR of rankings, what a random order is expected to reach, and the Trainer's metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .measures import Qrels, mean, measure, measure_rows

if TYPE_CHECKING:
    from transformers import EvalPrediction

__all__ = ["expected_mrr", "expected_ndcg", "mean", "mrr", "ndcg", "ranking_metrics"]

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
    name = f"ndcg_at_{k}"
    return measure(qrels, rankings, [name])[name]


def mrr(qrels: Qrels, rankings: Rankings, k: int = 10) -> PerQuery:
    """Compute the reciprocal rank of the first relevant document among the first k, or 0; as `ndcg` otherwise.

    Example:
        ```python
        >>> mrr({"q": {"a": 1}}, {"q": ["b", "a"]})
        {'q': 0.5}
        ```
    """
    name = f"mrr_at_{k}"
    return measure(qrels, rankings, [name])[name]


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
        predictions: Scores and labels, both (queries, documents), padded with -100. Labels may be soft; ties count
            against the model (see `measure_rows`). A document with label NaN is not judged, so not relevant.

    Returns:
        `ndcg_at_10` and `mrr_at_10` in [0, 1], or nothing if no query has a label above 0. MRR says little about soft
        labels, most of which are above 0.

    Raises:
        ValueError: if a score is NaN or infinite.
    """
    scores, labels = np.asarray(predictions.predictions), np.nan_to_num(np.asarray(predictions.label_ids))
    # Scores are in [-1, 1]: what is below is padding.
    rows, columns = np.nonzero(~(scores <= -2))
    per_query = measure_rows(
        scores[rows, columns].tolist(), labels[rows, columns].tolist(), map(str, rows), ("ndcg_at_10", "mrr_at_10")
    )
    return {name: mean(values) for name, values in per_query.items() if values}
