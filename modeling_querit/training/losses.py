"""Ranking losses over the documents of each query, and `LOSSES`, the registry of their names.

All are pure functions of (scores, labels, query_ids), each (batch,), with torch's `reduction`. They compute in float32,
leave out documents whose label is NaN, and queries with nothing to compare: a single document, or equal labels. The
items that a loss sums over, pairs, queries or documents, depend on the labels alone. So the sum over a batch equals the
sum over its parts or over processes; the trainer divides it by the number of items in all.

To add a loss, write such a function here and give it an entry in `LOSSES`, with the defaults of its settings. The help
texts, trainers and the tests of all losses (`tests/training/test_losses.py`, which asks for a slow formula to compare
with) follow. A new setting has its default everywhere; for a command line or YAML to change it, add an optional field
of its name to `QueritTrainingArguments` in `training/arguments.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from ..loss_querit import aligned, ordered_pairs, pairwise_hinge_loss, reduce


def margin_mse(
    scores: Tensor, labels: Tensor, query_ids: Tensor, margin_scale: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """Mean of `((s_i - s_j) - margin_scale * (y_i - y_j))^2` over pairs i, j of one query with `y_i > y_j`.

    Unlike the hinge, it also penalizes scores that are further apart than their labels: the student learns the
    teacher's margins. Source: Hofstätter et al., arXiv 2010.02666, equation 7.

    Args:
        scores: Scores p1 - p0 or logit differences z1 - z0, (batch,).
        labels: A teacher's scores, (batch,), any real scale.
        query_ids: Query of each document, (batch,), integers.
        margin_scale: Score difference per unit of label difference; 2 lets p1 follow labels in [0, 1].
        reduction: `mean`, `sum`, or `none` for one value per pair.

    Example:
        ```python
        >>> margin_mse(torch.tensor([0.5, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
        tensor(0.2500)
        ```
    """
    scores, labels, query_ids = aligned(scores, labels, query_ids)
    higher, lower = ordered_pairs(labels, query_ids)
    margins = margin_scale * (labels[higher] - labels[lower])  # (pairs,)
    return reduce((scores[higher] - scores[lower] - margins).square(), reduction)


def ranknet(scores: Tensor, labels: Tensor, query_ids: Tensor, reduction: str = "mean") -> Tensor:
    """Mean of `log(1 + exp(-(s_i - s_j)))` over pairs i, j of one query with `y_i > y_j`.

    Only the order of the labels counts, not their distances. Source: Burges et al., ICML 2005, equation 3.

    Args:
        scores: Logit differences z1 - z0, (batch,); on bounded scores the loss cannot fall below 0.127.
        labels: Relevance, (batch,), any real scale.
        query_ids: Query of each document, (batch,), integers.
        reduction: `mean`, `sum`, or `none` for one value per pair.

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
        scores: Logit differences z1 - z0, (batch,); bounded scores differ by a factor of e^2 in probability at most.
        labels: 0 and 1, or a teacher's scores in [0, 1], (batch,).
        query_ids: Query of each document, (batch,), integers.
        temperature: Label difference that makes one document e times as probable as another. At 0.1 a label of 1
            beside 0 is all but certain, and soft labels still differ.
        reduction: `mean`, `sum`, or `none` for one value per query.

    Example:
        ```python
        >>> listwise_kl(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
        tensor(0.6927)
        ```
    """
    scores, labels, query_ids = aligned(scores, labels, query_ids)
    losses = []
    for query_id in _informative(labels, query_ids):
        in_query = (query_ids == query_id) & ~labels.isnan()  # (batch,)
        target = (labels[in_query] / temperature).log_softmax(-1)  # (documents,)
        losses.append((target.exp() * (target - scores[in_query].log_softmax(-1))).sum())
    # Without any query, an empty slice keeps the sum of zero differentiable.
    return reduce(torch.stack(losses) if losses else scores[:0], reduction)


def pointwise_bce(scores: Tensor, labels: Tensor, query_ids: Tensor, reduction: str = "mean") -> Tensor:
    """Binary cross-entropy of sigmoid(scores) = p1 with labels in [0, 1]; mean over documents.

    The other losses see only differences; this one also fixes the zero, so that a score means the same for every query.

    Args:
        scores: Logit differences z1 - z0, (batch,); bounded scores leave p1 between 0.27 and 0.73.
        labels: Probabilities of relevance, (batch,), in [0, 1].
        query_ids: Query of each document, (batch,), integers; queries whose labels are all equal are left out.
        reduction: `mean`, `sum`, or `none` for one value per document.

    Example:
        ```python
        >>> pointwise_bce(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
        tensor(0.6931)
        ```
    """
    scores, labels, query_ids = aligned(scores, labels, query_ids)
    is_counted = torch.isin(query_ids, _informative(labels, query_ids)) & ~labels.isnan()  # (batch,)
    losses = binary_cross_entropy_with_logits(scores[is_counted], labels[is_counted], reduction="none")
    return reduce(losses, reduction)


def _informative(labels: Tensor, query_ids: Tensor) -> Tensor:
    """Return the ids of the queries with two different labels, (queries,)."""
    higher, _ = ordered_pairs(labels, query_ids)
    return query_ids[higher].unique()


class Loss(NamedTuple):
    """An entry of `LOSSES`, or a loss that was selected from it.

    Args:
        function: Pure function `(scores, labels, query_ids, reduction=...) -> losses`.
        output: Model output that the loss is computed on by default: `score`, the bounded p1 - p0, or `logit`,
            z1 - z0, which has a gradient where the score is saturated too.
        settings: Settings that the function takes as keywords, with their defaults. The training argument of the same
            name, if there is one, replaces the default.
        needs_unit_labels: Whether labels have to be in [0, 1].
    """

    function: Callable[..., Tensor]
    output: str
    settings: Mapping[str, float] = MappingProxyType({})
    needs_unit_labels: bool = False


LOSSES = {
    "pairwise_hinge": Loss(pairwise_hinge_loss, "score", {"margin_scale": 0.8, "emphasis": 0.0}),
    "margin_mse": Loss(margin_mse, "score", {"margin_scale": 1.0}),
    "listwise_kl": Loss(listwise_kl, "logit", {"temperature": 0.1}),
    "ranknet": Loss(ranknet, "logit"),
    "pointwise_bce": Loss(pointwise_bce, "logit", needs_unit_labels=True),
}
OUTPUTS = ("score", "logit")


def select_losses(names: Sequence[str], **settings: float | None) -> dict[str, Loss]:
    """Select the losses of a run, with their settings filled in.

    Args:
        names: Keys of `LOSSES`, each alone or with `:score` or `:logit` for the output that it is computed on.
        settings: Values of settings by name; each loss takes its own, and one that is None or absent keeps its default.

    Returns:
        Losses by the name that was given.

    Raises:
        ValueError: if there is no name, one is unknown, or one comes twice.

    Example:
        ```python
        >>> list(select_losses(["listwise_kl", "pairwise_hinge:logit"], temperature=0.5))
        ['listwise_kl', 'pairwise_hinge:logit']
        ```
    """
    if not names:
        raise ValueError(f"There is no loss: choose from {', '.join(LOSSES)}.")
    if len(set(names)) < len(names):
        raise ValueError(f"losses are {', '.join(names)}: name each once, and weight it by loss_weights.")
    selected = {}
    for name in names:
        key, _, output = name.partition(":")
        if key not in LOSSES or (output and output not in OUTPUTS):
            raise ValueError(
                f"{name!r} is not a loss: choose from {', '.join(LOSSES)}, with ':score' or ':logit' after it for "
                "the output that it is computed on."
            )
        loss = LOSSES[key]
        given = {setting: settings.get(setting) for setting in loss.settings}
        keywords = {**loss.settings, **{setting: value for setting, value in given.items() if value is not None}}
        selected[name] = loss._replace(function=partial(loss.function, **keywords), output=output or loss.output)
    return selected


def needs_unit_labels(name: str) -> bool:
    """Whether a loss, by its name in the settings, needs labels in [0, 1]."""
    return LOSSES[name.partition(":")[0]].needs_unit_labels


def count_items(loss: Loss, labels: Tensor, query_ids: Tensor) -> int:
    """Count the items that a loss sums over in a batch; labels alone decide it, so no forward pass is needed."""
    return len(loss.function(torch.zeros_like(labels), labels, query_ids, reduction="none"))
