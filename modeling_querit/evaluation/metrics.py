"""Ranking metrics, by pytrec_eval (trec_eval's own code)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytrec_eval

if TYPE_CHECKING:
    from transformers import EvalPrediction


def ndcg(
    qrels: Mapping[str, Mapping[str, int]], rankings: Mapping[str, Sequence[str]], k: int = 10
) -> dict[str, float]:
    """nDCG@k of each query that has a relevant document.

    Args:
        qrels: Query id -> document id -> grade.
        rankings: Query id -> document ids, best first. A list, not scores: trec_eval would break ties by document id,
            here they stay as they are given.
        k: Cut-off.

    Returns:
        Query id -> nDCG in [0, 1]; queries without a grade above 0, or without a ranking, are left out.

    Raises:
        ValueError: if a ranking names a document twice.

    Example:
        ```python
        >>> ndcg({"q": {"a": 1}}, {"q": ["b", "a"]})
        {'q': 0.6309297535714575}
        ```
    """
    return _measure(qrels, rankings, f"ndcg_cut.{k}")


def mrr(qrels: Mapping[str, Mapping[str, int]], rankings: Mapping[str, Sequence[str]], k: int = 10) -> dict[str, float]:
    """Reciprocal rank of the first relevant document (grade above 0) among the first k; as `ndcg` otherwise.

    Example:
        ```python
        >>> mrr({"q": {"a": 1}}, {"q": ["b", "a"]})
        {'q': 0.5}
        ```
    """
    return _measure(qrels, {query: documents[:k] for query, documents in rankings.items()}, "recip_rank")


def _measure(
    qrels: Mapping[str, Mapping[str, int]], rankings: Mapping[str, Sequence[str]], measure: str
) -> dict[str, float]:
    judged = {query: dict(grades) for query, grades in qrels.items() if max(grades.values(), default=0) > 0}
    run = {}
    for query, documents in rankings.items():
        if len(set(documents)) != len(documents):
            raise ValueError(f"The ranking of query {query!r} names a document twice.")
        if query in judged:
            run[query] = {document: float(-place) for place, document in enumerate(documents)}
    measured = pytrec_eval.RelevanceEvaluator(judged, {measure}).evaluate(run)
    # trec_eval leaves out a query whose ranking is empty; it found nothing.
    return {query: measured.get(query, {}).get(measure.replace(".", "_"), 0.0) for query in run}


def ranking_metrics(predictions: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of `QueritTrainer`: nDCG@10 and MRR@10, means over the queries with a label above 0.

    Args:
        predictions: Scores and labels, (queries, documents) each, filled up with -100. Labels may be continuous: they
            are taken to four decimals, or, with any above 100, to 1e-6 of the highest. A document with label NaN is not
            judged, so not relevant. Of documents with equal scores the least relevant comes first: a model that tells
            nothing apart is worth nothing.

    Returns:
        `ndcg_at_10` and `mrr_at_10` in [0, 1]; neither, where no query has a label above 0. MRR says little of soft
        labels, most of which are above 0.
    """
    qrels, rankings = {}, {}
    # trec_eval keeps a place for every grade up to the highest.
    scale = min(10_000, 1_000_000 / max(float(np.nanmax(predictions.label_ids, initial=0)), 1e-9))
    for number, (scores, labels) in enumerate(zip(predictions.predictions, predictions.label_ids, strict=True)):
        # A score is in [-1, 1]: what is below fills up.
        documents = [str(place) for place in range(len(scores)) if scores[place] > -2]
        # trec_eval knows whole grades; their unit does not matter to either measure.
        grades = {each: round(float(labels[int(each)]) * scale) for each in documents if labels[int(each)] > 0}
        qrels[str(number)] = grades
        rankings[str(number)] = sorted(documents, key=lambda each: (-scores[int(each)], grades.get(each, 0)))
    found = {"ndcg_at_10": ndcg(qrels, rankings), "mrr_at_10": mrr(qrels, rankings)}
    return {name: mean(values) for name, values in found.items() if values}


def mean(values: Mapping[str, float]) -> float:
    """Mean over queries; NaN if there are none."""
    return sum(values.values()) / len(values) if values else float("nan")
