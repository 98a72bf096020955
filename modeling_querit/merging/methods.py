"""Merge methods: the factors with which the tensors of several models are added up.

A method sees only the dot products of the tensors (their Gram matrix); the tensors themselves are streamed in chunks.
To add a method, write a function from Gram matrix and weights to factors, and enter it in `METHODS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Two vectors with a cosine beyond it, of either sign, span no reliable plane: mergekit's rule and value.
PARALLEL_COSINE = 0.9995
# Squared norm of the mean of two unit vectors that are just opposite by this rule.
_MIN_SQUARED_NORM = (1 - PARALLEL_COSINE) / 2
# Maximum norm of the result, as a multiple of the longest vector's.
_MAX_STRETCH = 2.0
# A step's norm is the root of a number that is exact to 1e-16: smaller steps may be rounding errors.
_STEP_TOLERANCE = 1e-7
# Eigenvalues of the cosine matrix below it (times the number of vectors) are rounding errors.
_RANK_TOLERANCE = 1e-9
_MAX_STEPS = 200


@dataclass(frozen=True)
class MergeMethod:
    """A way to merge tensors.

    Args:
        function: Function from the Gram matrix, (n, n), and the weights, (n,), summing to 1, to the factors, (n,); all
            in float64. With `uses_base`, vector 0 is that of the base, its weight is 0, and a third argument is the
            scale.
        uses_base: Whether the method needs the model that the others were trained from.
    """

    function: Callable[..., torch.Tensor]
    uses_base: bool = False

    def factors(self, gram: torch.Tensor, weights: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Compute the factors of the parents' tensors.

        Args:
            gram: Dot products of the parents' tensors, (parents, parents), float64; with `uses_base` the base first.
            weights: Weights of the models, without the base, summing to 1, (models,), float64.
            scale: Factor of task vectors.

        Returns:
            Factors, (parents,), float64.
        """
        if not self.uses_base:
            return self.function(gram, weights)
        return self.function(gram, torch.cat([weights.new_zeros(1), weights]), scale)


def spherical_mean(gram: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute the factors of the weighted spherical mean of n vectors: SLERP for any number of models.

    The mean of the vectors' directions is the point on the unit sphere with the least weighted sum of squared angles to
    them (Fréchet or Karcher mean; algorithm A1 of Buss and Fillmore, ACM TOG 2001); where there are several such
    points, the one reached from the linear mean. It lies in the span of the directions, so it is a linear combination
    of them, and its factors are applied to the vectors themselves. For two vectors this is exactly SLERP (Shoemake,
    SIGGRAPH 1985); for more it does not depend on their order, unlike chains of SLERP. Where the vectors are linearly
    dependent (three biases of two elements, say), the combination is not unique: the one closest to the weights is
    chosen.

    The mean is linear where angles are meaningless: if a vector is zero, all are parallel, two are opposite, the
    directions cancel out, or the result would be over twice as long as the longest vector (wide angles between vectors
    of different lengths, such as biases of two elements, can stretch it without bound).

    Args:
        gram: Dot products of the vectors, (n, n), float64.
        weights: Weights of the vectors, summing to 1, (n,), float64.

    Returns:
        Factors, (n,), float64.

    Example:
        ```python
        >>> spherical_mean(torch.eye(2, dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)).tolist()
        [0.7071067811865475, 0.7071067811865475]
        ```
    """
    if not weights.all():
        # A vector without weight must not decide whether the angles are meaningful either.
        weighted, factors = weights.nonzero().squeeze(-1), torch.zeros_like(weights)
        factors[weighted] = spherical_mean(gram[weighted][:, weighted], weights[weighted])
        return factors
    norms = gram.diagonal().sqrt()
    if not norms.min() > 0:
        return linear_mean(gram, weights)
    cosines = (gram / norms.outer(norms)).clamp(-1, 1)  # (n, n)
    pairs = cosines[torch.triu_indices(len(weights), len(weights), offset=1).unbind()]  # (n * (n - 1) / 2,)
    if len(pairs) == 0 or pairs.min() > PARALLEL_COSINE or pairs.min() < -PARALLEL_COSINE:
        return linear_mean(gram, weights)
    # From here on, the mean is the directions times `factors`.
    start = _normalize(weights, cosines)
    if start is None:
        return linear_mean(gram, weights)
    factors, span, previous_norm = start, _span(cosines), weights.new_tensor(math.inf)
    for _ in range(_MAX_STEPS):
        mean_cosines = (cosines @ factors).clamp(-1, 1)  # (n,)
        # theta / sin(theta), 1 in its limit: the logarithm map of each direction into the tangent space of the mean.
        stretch = weights / torch.sinc(mean_cosines.acos() / math.pi)
        step = stretch - (stretch @ mean_cosines) * factors
        step_norm = (step @ cosines @ step).clamp(min=0).sqrt()
        moved = _normalize(torch.cos(step_norm) * factors + torch.sinc(step_norm / math.pi) * step, cosines)
        if moved is None:
            return linear_mean(gram, weights)
        # Components that do not change the mean (the null space) must not accumulate over the steps.
        factors = start + span @ (span.T @ (moved - start))
        if previous_norm <= step_norm < _STEP_TOLERANCE or step_norm == 0:
            break
        previous_norm = step_norm
    is_stretched = (factors @ gram @ factors).sqrt() > _MAX_STRETCH * norms.max()
    return linear_mean(gram, weights) if is_stretched else factors


def linear_mean(gram: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute the factors of the weighted arithmetic mean: the weights themselves."""
    return weights


def task_arithmetic(gram: torch.Tensor, weights: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Compute the factors of `base + scale * mean(vector - base)`, where the first vector is the base.

    Source: Ilharco et al., ICLR 2023. At scale 1 the base cancels out, and the mean is linear.

    Args:
        gram: Dot products of the vectors, (n, n), float64.
        weights: Weights of the vectors, (n,), float64: 0 for the base, summing to 1 over the others.
        scale: Factor of the mean task vector.
    """
    factors = scale * weights
    factors[0] = 1 - scale
    return factors


METHODS: dict[str, MergeMethod] = {
    "slerp": MergeMethod(spherical_mean),
    "linear": MergeMethod(linear_mean),
    "task_arithmetic": MergeMethod(task_arithmetic, uses_base=True),
}


def _normalize(factors: torch.Tensor, cosines: torch.Tensor) -> torch.Tensor | None:
    """Scale factors so that the mean has norm 1; None where it has no direction."""
    squared_norm = factors @ cosines @ factors
    return factors / squared_norm.sqrt() if squared_norm > _MIN_SQUARED_NORM else None


def _span(cosines: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis, (n, rank), of the factors that do not add the directions up to zero."""
    eigenvalues, eigenvectors = torch.linalg.eigh(cosines)
    return eigenvectors[:, eigenvalues > _RANK_TOLERANCE * len(eigenvalues)]


def gram_matrix(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute the dot products of tensors, or of one chunk of them: those of all chunks add up.

    Args:
        tensors: n tensors of one shape, float32 or float64.

    Returns:
        Gram matrix, (n, n), float64.
    """
    flat = [tensor.reshape(-1) for tensor in tensors]
    gram = torch.empty(len(flat), len(flat), dtype=torch.float64)
    for row, first in enumerate(flat):
        for column, second in enumerate(flat[: row + 1]):
            product = torch.dot(first, second).double()
            if not product.isfinite():
                # Overflow in float32, or NaN in float64 as well.
                product = torch.dot(first.double(), second.double())
            gram[row, column] = gram[column, row] = product
    return gram


def weighted_sum(tensors: Sequence[torch.Tensor], factors: torch.Tensor) -> torch.Tensor:
    """Add up tensors times factors, in their data type and in place: the first tensor is overwritten.

    Args:
        tensors: n tensors of one shape.
        factors: Factors, (n,).
    """
    total = tensors[0].mul_(float(factors[0]))
    for tensor, factor in zip(tensors[1:], factors[1:].tolist(), strict=True):
        # Adding zero would turn -0 into 0.
        if factor:
            total.add_(tensor, alpha=factor)
    return total
