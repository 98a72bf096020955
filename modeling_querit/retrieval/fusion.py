"""Fusion of a first stage's scores with a reranker's, for the documents of one query."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

# Constant of reciprocal rank fusion.
_RANK_CONSTANT = 60


def min_max(scores: Sequence[float]) -> list[float]:
    """Scale scores linearly to [0, 1]; all 0 if they are equal.

    Example:
        ```python
        >>> min_max([1.0, 3.0, 2.0])
        [0.0, 1.0, 0.5]
        ```
    """
    # Halves, since the difference of the largest floats is infinite.
    low, high = min(scores) / 2, max(scores) / 2
    return [(score / 2 - low) / (high - low) if high > low else 0.0 for score in scores]


def z_score(scores: Sequence[float]) -> list[float]:
    """Scale scores to mean 0 and standard deviation 1; all 0 if they are equal."""
    # Sums of the largest floats are infinite; a power of two changes no digit but of the smallest ones.
    scores = [score * 2.0**-40 for score in scores]
    center, deviation = statistics.fmean(scores), statistics.pstdev(scores)
    return [(score - center) / deviation if deviation else 0.0 for score in scores]


def reciprocal_ranks(scores: Sequence[float]) -> list[float]:
    """Replace scores by `1 / (60 + rank)`; of equal scores the first has the better rank.

    Source: Cormack, Clarke and Buettcher, SIGIR 2009.
    """
    reciprocals = [0.0] * len(scores)
    for rank, index in enumerate(sorted(range(len(scores)), key=lambda index: -scores[index]), start=1):
        reciprocals[index] = 1 / (_RANK_CONSTANT + rank)
    return reciprocals


# What makes scores of different systems comparable, by name.
NORMALIZATIONS: dict[str, Callable[[Sequence[float]], list[float]]] = {
    "min-max": min_max,
    "z-score": z_score,
    "rrf": reciprocal_ranks,
}


def weighted_sum(
    first_stage: Sequence[float], reranker: Sequence[float], weight: float, normalization: str = "min-max"
) -> list[float]:
    """Fuse the scores of the documents of one query: `weight * first stage + (1 - weight) * reranker`.

    Args:
        first_stage: Scores of the first stage, finite.
        reranker: Scores of the reranker for the same documents.
        weight: Weight of the first stage, in [0, 1].
        normalization: Key of `NORMALIZATIONS`, which both lists of scores are put through before.

    Example:
        ```python
        >>> weighted_sum([12.0, 8.0], [-0.5, 0.5], weight=0.25)
        [0.25, 0.75]
        ```
    """
    normalize = NORMALIZATIONS[normalization]
    pairs = zip(normalize(first_stage), normalize(reranker), strict=True)
    return [math.fsum((weight * first, (1 - weight) * second)) for first, second in pairs]
