"""Rankings of a judged collection side by side, and whether one is better than another by more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..retrieval.collection import Collection
from .metrics import ndcg

# Query id -> document id -> the first stage's score, best first.
Candidates = dict[str, dict[str, float]]
# Query id -> nDCG@10.
Figures = dict[str, float]

_RESAMPLES = 9_999


def judged_queries(collection: Collection) -> list[str]:
    """The queries that have a relevant document, by id.

    Raises:
        ValueError: if there are none.
    """
    found = sorted(query for query, grades in collection.qrels.items() if max(grades.values(), default=0) > 0)
    if not found:
        raise ValueError(f"{collection.name}: its judgements have no relevant document, so nothing can be measured.")
    return found


def first_stage_candidates(collection: Collection, first_stage: Any, queries: Sequence[str], depth: int) -> Candidates:
    """Of each query its best `depth` documents; all that the collection lists for it, where it lists some.

    Args:
        collection: The collection.
        first_stage: An index over its documents, with `search(queries, k)`.
        queries: Their ids.
        depth: How many, where none are listed.
    """
    texts = [collection.queries[query] for query in queries]
    found = first_stage.search(texts, len(collection.documents) if collection.candidates else depth)
    listed = {query: set(documents) for query, documents in collection.candidates.items()}
    return {
        query: {document: score for document, score in hits if document in listed[query]}
        if query in listed
        else dict(hits[:depth])
        for query, hits in zip(queries, found, strict=True)
    }


def by_score(documents: Sequence[str], scores: Sequence[float]) -> list[str]:
    """Documents by score, best first; equal scores keep the given order."""
    return [documents[place] for place in sorted(range(len(documents)), key=lambda place: -scores[place])]


def measure(collection: Collection, rankings: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, Figures]:
    """nDCG@10 of each query, by the name of the ranking."""
    return {name: ndcg(collection.qrels, ranking) for name, ranking in rankings.items()}


def p_value(first: Figures, second: Figures, seed: int = 0) -> float:
    """Two-sided p-value of the difference of two means over the same queries, by a paired randomization test.

    Source: Smucker, Allan and Carterette, CIKM 2007.

    Example:
        ```python
        >>> p_value({"a": 0.1, "b": 0.2}, {"a": 0.1, "b": 0.2})
        1.0
        ```
    """
    from scipy.stats import permutation_test

    if first.keys() != second.keys():
        raise ValueError("The figures are of different queries, so they cannot be compared query by query.")
    differences = np.array([first[query] - second[query] for query in sorted(first)])
    if len(differences) < 2 or not differences.any():
        return 1.0
    result = permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=_RESAMPLES, rng=np.random.default_rng(seed)
    )
    return float(result.pvalue)
