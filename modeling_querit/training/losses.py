"""Losses over the documents of each query, by name.

All are pure functions of (scores, labels, query_ids), each (batch,), with torch's `reduction`. They compute in float32,
leave out documents whose label is NaN, and queries that say nothing about order: those with one document or with equal
labels. What they add up, pairs, queries or documents, depends on the labels alone. So the sum over a batch, over its
parts, or over the parts of many processes is the same number; the trainer divides it by the number of items in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from ..loss_querit import aligned, ordered_pairs, pairwise_hinge_loss, reduce


def margin_mse(
    scores: Tensor, labels: Tensor, query_ids: Tensor, margin_scale: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """Mean of `((s_i - s_j) - margin_scale * (y_i - y_j))^2` over pairs i, j of one query with `y_i > y_j`.

    Unlike the hinge it also draws together documents whose scores are further apart than their labels: the student
    takes over the teacher's distances. Source: Hofstätter et al., arXiv 2010.02666, equation 7.

    Args:
        scores: (batch,), the scores p1 - p0 or logit differences z1 - z0.
        labels: (batch,), a teacher's scores.
        query_ids: (batch,), integers.
        margin_scale: Score difference per unit of label difference; 2 lets p1 follow labels in [0, 1].
        reduction: `mean`; `sum`; or `none`, one value a pair.

    Example:
        ```python
        >>> margin_mse(torch.tensor([0.5, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
        tensor(0.2500)
        ```
    """
    scores, labels, query_ids = aligned(scores, labels, query_ids)
    higher, lower = ordered_pairs(labels, query_ids)
    wanted = margin_scale * (labels[higher] - labels[lower])
    return reduce((scores[higher] - scores[lower] - wanted).square(), reduction)


def ranknet(scores: Tensor, labels: Tensor, query_ids: Tensor, reduction: str = "mean") -> Tensor:
    """Mean of `log(1 + exp(-(s_i - s_j)))` over pairs i, j of one query with `y_i > y_j`.

    The order of the labels counts, their distances do not. Source: Burges et al., ICML 2005, equation 3.

    Args:
        scores: (batch,), logit differences z1 - z0; for bounded scores the loss cannot fall below 0.127.
        labels: (batch,), any real scale.
        query_ids: (batch,), integers.
        reduction: `mean`; `sum`; or `none`, one value a pair.

    Example:
        ```python
        >>> ranknet(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
        tensor(0.6931)
        ```
    """
    scores, labels, query_ids = aligned(scores, labels, query_ids)
    higher, lower = ordered_pairs(labels, query_ids)
    return reduce(softplus(scores[lower] - scores[higher]), reduction)


def listwise_kl(
    scores: Tensor, labels: Tensor, query_ids: Tensor, temperature: float = 0.1, reduction: str = "mean"
) -> Tensor:
    """KL divergence of softmax(scores) from softmax(labels / temperature) of each query; mean over queries.

    Args:
        scores: (batch,), logit differences z1 - z0; bounded scores cannot put more than a factor of e^2 between two
            documents.
        labels: (batch,), 0 and 1, or a teacher's scores in [0, 1].
        query_ids: (batch,), integers.
        temperature: Label difference that makes one document e times as probable as another. With 0.1, labels 1 and 0
            are all but certain, and soft labels keep their distances.
        reduction: `mean`; `sum`; or `none`, one value a query.

    Example:
        ```python
        >>> listwise_kl(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
        tensor(0.6927)
        ```
    """
    scores, labels, query_ids = aligned(scores, labels, query_ids)
    losses = []
    for query_id in _informative(labels, query_ids):
        mine = (query_ids == query_id) & ~labels.isnan()
        target = (labels[mine] / temperature).log_softmax(-1)
        losses.append((target.exp() * (target - scores[mine].log_softmax(-1))).sum())
    # Without a query, a sum that has a gradient all the same: zero.
    return reduce(torch.stack(losses) if losses else scores[:0], reduction)


def pointwise_bce(scores: Tensor, labels: Tensor, query_ids: Tensor, reduction: str = "mean") -> Tensor:
    """Binary cross-entropy of sigmoid(scores) = p1 with labels in [0, 1]; mean over documents.

    The other losses see differences alone; this one also sets where 0 lies, so that a score means the same for
    every query.

    Args:
        scores: (batch,), logit differences z1 - z0; bounded scores leave p1 between 0.27 and 0.73.
        labels: (batch,), in [0, 1].
        query_ids: (batch,), integers: documents of queries whose labels are all equal are left out.
        reduction: `mean`; `sum`; or `none`, one value a document.

    Example:
        ```python
        >>> pointwise_bce(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
        tensor(0.6931)
        ```
    """
    scores, labels, query_ids = aligned(scores, labels, query_ids)
    counts = torch.isin(query_ids, _informative(labels, query_ids)) & ~labels.isnan()
    return reduce(binary_cross_entropy_with_logits(scores[counts], labels[counts], reduction="none"), reduction)


def _informative(labels: Tensor, query_ids: Tensor) -> Tensor:
    """Ids of the queries that have two different labels."""
    higher, _ = ordered_pairs(labels, query_ids)
    return query_ids[higher].unique()


class Loss(NamedTuple):
    """A loss by name, and what it acts on unless it is told otherwise.

    Args:
        function: (scores, labels, query_ids, reduction=...) -> losses.
        output: `score`, the bounded p1 - p0; or `logit`, z1 - z0, which still has a gradient where the score is
            saturated.
        settings: Names of the training arguments that the function takes too.
    """

    function: Callable[..., Tensor]
    output: str
    settings: tuple[str, ...] = ()


LOSSES = {
    "pairwise_hinge": Loss(pairwise_hinge_loss, "score", ("margin_scale", "emphasis")),
    "margin_mse": Loss(margin_mse, "score", ("margin_scale",)),
    "listwise_kl": Loss(listwise_kl, "logit", ("temperature",)),
    "ranknet": Loss(ranknet, "logit"),
    "pointwise_bce": Loss(pointwise_bce, "logit"),
}
OUTPUTS = ("score", "logit")


def choose_losses(names: Sequence[str], **settings: float | None) -> dict[str, Loss]:
    """The losses of these names, each `NAME` or `NAME:score` or `NAME:logit`, with their settings filled in.

    Args:
        names: Keys of `LOSSES`, with or without what the loss shall act on.
        settings: Values for the losses that take them; None leaves the default of the loss.

    Raises:
        ValueError: for a name that is not there.
    """
    if not names:
        raise ValueError(f"There is no loss: choose from {', '.join(LOSSES)}.")
    if len(set(names)) < len(names):
        raise ValueError(f"losses are {', '.join(names)}: name each once, and weigh it by loss_weights.")
    chosen = {}
    for name in names:
        key, _, output = name.partition(":")
        if key not in LOSSES or (output and output not in OUTPUTS):
            raise ValueError(
                f"{name!r} is no loss: choose from {', '.join(LOSSES)}, with ':score' or ':logit' if it shall act on "
                "the bounded score or on the logit difference."
            )
        loss = LOSSES[key]
        given = {each: settings[each] for each in loss.settings if settings.get(each) is not None}
        chosen[name] = Loss(partial(loss.function, **given), output or loss.output)
    return chosen


def count_items(loss: Loss, labels: Tensor, query_ids: Tensor) -> int:
    """How many items a loss has in a batch: labels alone decide, so it is known before the forward pass."""
    return len(loss.function(torch.zeros_like(labels), labels, query_ids, reduction="none"))
