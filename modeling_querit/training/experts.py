"""Mixtures of experts in training: how tokens are shared out among experts, and what keeps them balanced."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# What transformers calls the part that chooses experts, and the experts themselves.
_ROUTER_NAMES = ("gate", "router")
_BIAS_NAME = "e_score_correction_bias"


def expert_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each mixture: what holds `experts` that know their `num_experts`."""
    for name, module in model.named_modules():
        if hasattr(getattr(module, "experts", None), "num_experts"):
            yield name, module


def router_of(layer: nn.Module) -> nn.Module | None:
    """The part of a mixture that chooses experts."""
    return next((router for name in _ROUTER_NAMES if (router := getattr(layer, name, None)) is not None), None)


def freeze(model: nn.Module, parts: str) -> int:
    """Leave out of training the `router` or the `experts` of every mixture; returns how many parameters that is.

    Raises:
        ValueError: if the model has no experts.
    """
    layers = [layer for _, layer in expert_layers(model)]
    modules = [layer.experts if parts == "experts" else router_of(layer) for layer in layers]
    frozen = [parameter for module in modules if module is not None for parameter in module.parameters()]
    if not frozen:
        raise ValueError(f"The model is dense: it has no {parts} to freeze.")
    for parameter in frozen:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in frozen)


class ExpertLoadCallback(TrainerCallback):
    """Measures how many tokens each expert gets, and, if asked to, keeps the experts balanced.

    `QueritTrainer` logs its `figures`, over the steps since the last log: `expert_load_max/LAYER`, the busiest expert's
    tokens over the mean (1: balanced), `expert_load_entropy/LAYER`, of the shares, over that of equal ones (1:
    balanced), and `expert_dead/LAYER`, experts without a token; without a layer, the worst of each.

    With `bias_update_rate`, after each optimizer step the routing bias of an expert with fewer tokens than the mean
    rises by the rate, and that of one with more falls: DeepSeek-V3's balancing without an auxiliary loss
    (arXiv 2408.15664, algorithm 1). The bias decides which experts are chosen, not how their outputs are weighted, so
    no gradient is disturbed.

    Args:
        bias_update_rate: How far biases move at a step (0.001 in the source); 0: they stay.

    Raises:
        ValueError: at the start of training: if the model has no experts; if a rate is given and it has no such bias.
    """

    def __init__(self, bias_update_rate: float = 0.0):
        self.bias_update_rate = bias_update_rate
        self._layers: dict[str, nn.Module] = {}
        self._of_step: dict[str, Tensor] = {}
        self._since_log: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Begin to count."""
        self._layers = dict(expert_layers(model))
        if not self._layers:
            raise ValueError("There is no expert load to measure: the model is dense.")
        for name, layer in self._layers.items():
            if self.bias_update_rate:
                _keep_in_float32(router_of(layer))
            self._handles.append(layer.experts.register_forward_pre_hook(self._counter(name), with_kwargs=True))

    def _counter(self, name: str) -> Any:
        def count(experts: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if experts.training:
                # Under gradient checkpointing all is counted twice, which changes no share.
                chosen = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
                counts = torch.bincount(chosen.detach().reshape(-1), minlength=experts.num_experts)
                self._of_step[name] = self._of_step.get(name, 0) + counts

        return count

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the biases by the tokens of the whole step, those of all processes."""
        for name, counts in self._of_step.items():
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(counts)
            if self.bias_update_rate:
                bias, load = getattr(router_of(self._layers[name]), _BIAS_NAME), counts.float()
                with torch.no_grad():
                    bias.add_(torch.sign(load.mean() - load).to(bias.device), alpha=self.bias_update_rate)
            self._since_log[name] = self._since_log.get(name, 0) + counts.cpu()
        self._of_step = {}

    def figures(self) -> dict[str, float]:
        """What there is to log, of the steps since it was asked last."""
        by_layer = {name: load_figures(counts) for name, counts in self._since_log.items()}
        self._since_log = {}
        if not by_layer:
            return {}
        worst = {"expert_load_max": max, "expert_load_entropy": min, "expert_dead": max}
        figures = {key: choose(each[key] for each in by_layer.values()) for key, choose in worst.items()}
        return figures | {f"{key}/{layer}": value for layer, each in by_layer.items() for key, value in each.items()}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop counting."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def load_figures(counts: Tensor) -> dict[str, float]:
    """Of (experts,) token counts: the largest over the mean, entropy of the shares over the largest, dead experts.

    Example:
        ```python
        >>> load_figures(torch.tensor([2, 2, 0, 0]))
        {'expert_load_max': 2.0, 'expert_load_entropy': 0.5, 'expert_dead': 2}
        ```
    """
    shares = counts.double() / counts.sum().clamp(min=1)
    entropy = -torch.xlogy(shares, shares).sum().item() / math.log(max(len(counts), 2))
    return {
        "expert_load_max": shares.max().item() * len(counts),
        "expert_load_entropy": entropy,
        "expert_dead": int((counts == 0).sum()),
    }


def _keep_in_float32(router: nn.Module | None) -> None:
    """Hold a routing bias in float32: in bfloat16, steps of 0.001 would be lost."""
    bias = getattr(router, _BIAS_NAME, None)
    if bias is None:
        raise ValueError(f"The routers of this model have no {_BIAS_NAME}: biases cannot balance its experts.")
    bias.data = bias.data.float()
