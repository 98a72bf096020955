"""Ranking metrics, by pytrec_eval (trec_eval's own code)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytrec_eval


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
    judged = {query: dict(grades) for query, grades in qrels.items() if max(grades.values(), default=0) > 0}
    run = {}
    for query, documents in rankings.items():
        if len(set(documents)) != len(documents):
            raise ValueError(f"The ranking of query {query!r} names a document twice.")
        if query in judged:
            run[query] = {document: float(-place) for place, document in enumerate(documents)}
    measured = pytrec_eval.RelevanceEvaluator(judged, {f"ndcg_cut.{k}"}).evaluate(run)
    # trec_eval leaves out a query whose ranking is empty; it found nothing.
    return {query: measured.get(query, {}).get(f"ndcg_cut_{k}", 0.0) for query in run}


def mean(values: Mapping[str, float]) -> float:
    """Mean over queries; NaN if there are none."""
    return sum(values.values()) / len(values) if values else float("nan")
