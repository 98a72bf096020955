"""The pairwise hinge loss that the published rerankers were trained with, on scores in [-1, 1].

Other losses: training/losses.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_hinge_loss(
    scores: Tensor,
    labels: Tensor,
    query_ids: Tensor,
    margin_scale: float = 0.8,
    emphasis: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Mean of `relu(margin_scale * (y_i - y_j) - (s_i - s_j))` over pairs i, j of one query with `y_i > y_j`.

    With labels in {0, 1} this is the loss of supervised training; with a teacher's scores in [0, 1] as labels
    it is the soft-label distillation loss (arXiv 2606.19037, stages 1 and 2).

    Args:
        scores: Scores of the documents, shape (batch,), in [-1, 1]; used in float32.
        labels: Relevance of the documents, shape (batch,), on any real scale; NaN if unknown, which is in no pair.
        query_ids: Index of the query that each document belongs to, shape (batch,), integers.
        margin_scale: Margin per unit of label difference.
        emphasis: Share of each query's list, from the top by predicted score. The margin of a pair is doubled if its
            lower-labelled document is among them: 0.3 in the published option, 0 for no doubling.
        reduction: `mean`, `sum`, or `none` for one value per pair.

    Returns:
        A scalar in float32, or (pairs,); zero, still differentiable, if no query has two different labels.

    Raises:
        ValueError: if scores, labels and query_ids differ in shape, or the reduction is unknown.

    Example:
        ```python
        >>> pairwise_hinge_loss(torch.tensor([0.5, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([7, 7]))
        tensor(0.3000)
        ```
    """
    scores, labels, query_ids = aligned(scores, labels, query_ids)
    higher, lower = ordered_pairs(labels, query_ids)
    margins = margin_scale * (labels[higher] - labels[lower])
    if emphasis:
        margins = torch.where(_in_top(scores, query_ids, emphasis)[lower], 2 * margins, margins)
    return reduce(torch.relu(margins - (scores[higher] - scores[lower])), reduction)


def aligned(scores: Tensor, labels: Tensor, query_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check that scores, labels and query_ids are (batch,) each, and move them to the scores' device.

    Returns:
        Scores and labels in float32 at least, and query_ids.
    """
    if not scores.shape == labels.shape == query_ids.shape == scores.shape[:1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (scores, labels, query_ids))
        raise ValueError(f"scores, labels and query_ids have shapes {shapes}: give (batch,) of each.")
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return scores.to(dtype), labels.to(scores.device, dtype), query_ids.to(scores.device)


def ordered_pairs(labels: Tensor, query_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Find all pairs i, j of one query with `y_i > y_j`: indices i and j, (pairs,) each; a NaN label is in no pair."""
    is_pair = (query_ids[:, None] == query_ids[None, :]) & (labels[:, None] > labels[None, :])
    # Selected, not multiplied by the mask: a NaN label or an infinite score outside the pairs must not spread.
    higher, lower = is_pair.nonzero(as_tuple=True)
    return higher, lower


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """Reduce the losses of single items as torch's losses do: `mean` (zero without items), `sum` or `none`."""
    if reduction == "none":
        return losses
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}: choose mean, sum or none.")
    return losses.sum() / (max(losses.numel(), 1) if reduction == "mean" else 1)


def _in_top(scores: Tensor, query_ids: Tensor, share: float) -> Tensor:
    """Whether a document is in the top `share` of its query's list by score, (batch,); ties at its edge all are."""
    is_same_query = query_ids[:, None] == query_ids[None, :]
    above = (is_same_query & (scores[None, :] > scores[:, None])).sum(-1)
    return above < share * is_same_query.sum(-1)
