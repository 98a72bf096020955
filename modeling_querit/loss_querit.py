"""The pairwise hinge loss on scores in [-1, 1] that the published rerankers were trained with."""

from __future__ import annotations

import torch


def pairwise_hinge_loss(
    scores: torch.Tensor, labels: torch.Tensor, query_ids: torch.Tensor, margin_scale: float = 0.8
) -> torch.Tensor:
    """Mean of `relu(margin_scale * (y_i - y_j) - (s_i - s_j))` over pairs i, j of one query with `y_i > y_j`.

    With labels in {0, 1} this is the loss of supervised training; with a teacher's scores in [0, 1] as labels
    it is the soft-label distillation loss (arXiv 2606.19037, stages 1 and 2).

    Args:
        scores: Scores of the pairs, shape (batch,), in [-1, 1]; computed with in float32.
        labels: Relevance of the pairs, shape (batch,), any real scale; NaN where unknown takes part in no pair.
        query_ids: Which query each pair belongs to, shape (batch,), integers.
        margin_scale: Margin per unit of label difference.

    Returns:
        A scalar in float32; zero, still differentiable, where no query has two different labels.

    Raises:
        ValueError: if the three are not of one shape, (batch,).

    Example:
        ```python
        >>> pairwise_hinge_loss(torch.tensor([0.5, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([7, 7]))
        tensor(0.3000)
        ```
    """
    if not scores.shape == labels.shape == query_ids.shape == scores.shape[:1]:
        shapes = ", ".join(str(tuple(each.shape)) for each in (scores, labels, query_ids))
        raise ValueError(f"scores, labels and query_ids have shapes {shapes}: give (batch,) of each.")
    scores, labels = scores.float(), labels.to(scores.device).float()
    query_ids = query_ids.to(scores.device)
    label_gap = labels[:, None] - labels[None, :]
    score_gap = scores[:, None] - scores[None, :]
    is_pair = (query_ids[:, None] == query_ids[None, :]) & (label_gap > 0)
    # Selected, not multiplied by the mask: a NaN label or an infinite score outside the pairs must not leak in.
    losses = torch.relu(margin_scale * label_gap[is_pair] - score_gap[is_pair])
    return losses.sum() / max(losses.numel(), 1)
