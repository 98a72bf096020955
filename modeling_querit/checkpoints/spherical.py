"""Ways to merge tensors: each says with which factors the tensors of several models are added up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

# Beyond this cosine, either way, two vectors have no plane that their numbers could tell: mergekit's rule, and value.
PARALLEL = 0.9995
# The squared length of the mean of two directions that are opposite so far.
_SHORTEST = (1 - PARALLEL) / 2
_LONGEST = 2.0
# A step's length is the root of a number that is exact to 1e-16: shorter ones may be rounding.
_TOLERANCE = 1e-7
# Eigenvalues of the cosines below it, for each vector, are rounding.
_RANK_TOLERANCE = 1e-9
_MAX_STEPS = 200


def spherical(gram: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Factors of the weighted spherical mean of n vectors.

    The mean of their directions is the point of the unit sphere with the least weighted sum of squared angles to them
    (Fréchet or Karcher mean; algorithm A1 of Buss and Fillmore, ACM TOG 2001); where they are so far apart that there
    are several such points, the one that is reached from their linear mean. It lies in their span, so it is a sum of
    the n directions, and the same factors add up the vectors themselves. For two vectors that is SLERP (Shoemake,
    SIGGRAPH 1985) to the digit; for more it does not depend on their order, as chains of SLERP do. Of vectors that
    depend on each other, such as three biases of two numbers, the sum can be written in many ways: the one closest to
    the weights is taken.

    Where angles say nothing, the mean is linear: where a vector is zero, where all are parallel, where two are
    opposite, where the directions cancel out, or where the result would be over twice as long as the longest vector:
    wide angles between vectors of different lengths, such as biases of two numbers, can stretch it without bound.

    Args:
        gram: (n, n) dot products of the vectors, float64. All that is needed of them, however long they are.
        weights: (n,) of the vectors, summing to 1, float64.

    Returns:
        (n,) factors, float64.

    Example:
        ```python
        >>> spherical(torch.eye(2, dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)).tolist()
        [0.7071067811865475, 0.7071067811865475]
        ```
    """
    if not weights.all():
        # What has no weight has no say, not even in whether angles say anything.
        some, factors = weights.nonzero().squeeze(-1), torch.zeros_like(weights)
        factors[some] = spherical(gram[some][:, some], weights[some])
        return factors
    norms = gram.diagonal().sqrt()
    if not norms.min() > 0:
        return linear(gram, weights)
    cosines = (gram / norms.outer(norms)).clamp(-1, 1)
    pairs = cosines[torch.triu_indices(len(weights), len(weights), offset=1).unbind()]
    if len(pairs) == 0 or pairs.min() > PARALLEL or pairs.min() < -PARALLEL:
        return linear(gram, weights)
    # The mean is `factors` times the directions, from here on.
    start = factors = _normalized(weights, cosines)
    if factors is None:
        return linear(gram, weights)
    span, last = _span(cosines), math.inf
    for _ in range(_MAX_STEPS):
        towards = (cosines @ factors).clamp(-1, 1)
        # theta / sin(theta), 1 in its limit: the length of each direction's image in the tangent space of the mean.
        stretch = weights / torch.sinc(towards.acos() / math.pi)
        step = stretch - (stretch @ towards) * factors
        length = (step @ cosines @ step).clamp(min=0).sqrt()
        moved = _normalized(torch.cos(length) * factors + torch.sinc(length / math.pi) * step, cosines)
        if moved is None:
            return linear(gram, weights)
        # What adds nothing to the mean must not add up over the steps.
        factors = start + span @ (span.T @ (moved - start))
        if last <= length < _TOLERANCE or length == 0:
            break
        last = length
    is_stretched = (factors @ gram @ factors).sqrt() > _LONGEST * norms.max()
    return linear(gram, weights) if is_stretched else factors


def linear(gram: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Factors of the weighted arithmetic mean: the weights themselves."""
    return weights


def task_arithmetic(gram: torch.Tensor, weights: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Factors of `base + scale * mean(vector - base)`, the first vector being the base.

    Source: Ilharco et al., ICLR 2023. At scale 1 the base cancels out, and the mean is linear.

    Args:
        gram: As in `spherical`.
        weights: (n,), of which the first, that of the base, is 0, and the others sum to 1.
        scale: Of the sum of task vectors.
    """
    factors = scale * weights
    factors[0] = 1 - scale
    return factors


METHODS: dict[str, Callable[..., torch.Tensor]] = {
    "slerp": spherical,
    "linear": linear,
    "task_arithmetic": task_arithmetic,
}


def _normalized(factors: torch.Tensor, cosines: torch.Tensor) -> torch.Tensor | None:
    """Factors of the same direction at length 1; None where there is no direction."""
    square = factors @ cosines @ factors
    return factors / square.sqrt() if square > _SHORTEST else None


def _span(cosines: torch.Tensor) -> torch.Tensor:
    """(n, rank) orthonormal: all factors, but for those that add the directions up to nothing."""
    values, vectors = torch.linalg.eigh(cosines)
    return vectors[:, values > _RANK_TOLERANCE * len(values)]


def gram_of(chunk: Sequence[torch.Tensor]) -> torch.Tensor:
    """Dot products of vectors, or of their parts: (n, n), float64.

    Args:
        chunk: n tensors of one shape, in float32 or float64.
    """
    flat = [tensor.reshape(-1) for tensor in chunk]
    gram = torch.empty(len(flat), len(flat), dtype=torch.float64)
    for row, first in enumerate(flat):
        for column, second in enumerate(flat[: row + 1]):
            product = torch.dot(first, second).double()
            if not product.isfinite():
                # Too large for float32, or not a number in float64 either.
                product = torch.dot(first.double(), second.double())
            gram[row, column] = gram[column, row] = product
    return gram


def add_up(chunk: Sequence[torch.Tensor], factors: torch.Tensor) -> torch.Tensor:
    """The tensors times their factors, added up, in their dtype; the first tensor is overwritten."""
    total = chunk[0].mul_(float(factors[0]))
    for tensor, factor in zip(chunk[1:], factors[1:].tolist(), strict=True):
        # Adding nothing would still turn -0 to 0.
        if factor:
            total.add_(tensor, alpha=factor)
    return total
