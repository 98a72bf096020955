"""Losses over the documents of each query, by name; all take (scores, labels, query_ids), each (batch,)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from ..loss_querit import pairwise_hinge_loss


def listwise_kl(scores: torch.Tensor, labels: torch.Tensor, query_ids: torch.Tensor) -> torch.Tensor:
    """KL divergence of softmax(scores) from the labels, normalised to sum 1, of each query; mean over queries.

    A query without a positive label says nothing about order and contributes zero.

    Args:
        scores: (batch,), unbounded: the logit difference z1 - z0.
        labels: (batch,), not negative.
        query_ids: (batch,), integers.

    Example:
        ```python
        >>> listwise_kl(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
        tensor(0.6931)
        ```
    """
    scores, labels = scores.float(), labels.float()
    losses = []
    for query_id in query_ids.unique():
        mine = query_ids == query_id
        total = labels[mine].sum()
        if total > 0:
            target = labels[mine] / total
            log_probabilities = scores[mine].log_softmax(-1)
            losses.append((torch.xlogy(target, target) - target * log_probabilities).sum())
    return torch.stack(losses).mean() if losses else scores.sum() * 0


def pointwise_bce(scores: torch.Tensor, labels: torch.Tensor, query_ids: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of sigmoid(scores) = p1 with labels in [0, 1]; mean over documents.

    The other losses see differences alone; this one also sets where 0 lies, so that a score means the same for
    every query.

    Example:
        ```python
        >>> pointwise_bce(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
        tensor(0.6931)
        ```
    """
    return binary_cross_entropy_with_logits(scores.float(), labels.float())


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Which of the model's outputs a loss acts on: the bounded score p1 - p0, or the logit difference z1 - z0, which
# still has a gradient where the score is saturated.
ON_SCORE: dict[str, Loss] = {"pairwise_hinge": pairwise_hinge_loss}
ON_LOGIT: dict[str, Loss] = {"listwise_kl": listwise_kl, "pointwise_bce": pointwise_bce}
LOSSES = sorted([*ON_SCORE, *ON_LOGIT])
