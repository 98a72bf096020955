"""Mixtures of experts in training: expert load, freezing parts, and balancing without an auxiliary loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerControl, TrainerState, TrainingArguments

from .callbacks import LogMetricsCallback

# transformers' names for the module that chooses experts, and for its balancing bias.
_ROUTER_NAMES = ("gate", "router")
_BIAS_NAME = "e_score_correction_bias"


def expert_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each mixture layer: a module whose `experts` have `num_experts`."""
    for name, module in model.named_modules():
        if hasattr(getattr(module, "experts", None), "num_experts"):
            yield name, module


def router_of(layer: nn.Module) -> nn.Module | None:
    """Find the module of a mixture layer that chooses experts."""
    return next((router for name in _ROUTER_NAMES if (router := getattr(layer, name, None)) is not None), None)


def freeze(model: nn.Module, parts: str) -> int:
    """Freeze the routers or the experts of all mixture layers.

    Args:
        model: Model with mixture layers.
        parts: `router` or `experts`.

    Returns:
        The number of frozen parameters.

    Raises:
        ValueError: if the model has no experts.
    """
    layers = [layer for _, layer in expert_layers(model)]
    modules = [layer.get_submodule("experts") if parts == "experts" else router_of(layer) for layer in layers]
    parameters = [parameter for module in modules if module is not None for parameter in module.parameters()]
    if not parameters:
        raise ValueError(f"The model is dense: it has no {parts} to freeze.")
    for parameter in parameters:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in parameters)


class ExpertLoadCallback(LogMetricsCallback):
    """Logs how tokens are distributed over experts and, optionally, balances the load.

    Three metrics are logged for each layer, over the steps since the last log: `expert_load_max/LAYER`, tokens of the
    busiest expert over the mean (1: balanced), `expert_load_entropy/LAYER`, entropy of the shares over that of equal
    shares (1: balanced), and `expert_dead/LAYER`, experts without a token; without a layer, the worst of all layers.

    With `bias_update_rate`, the routing bias of an expert rises by that rate after an optimizer step in which it got
    fewer tokens than the mean, and falls if it got more: DeepSeek-V3's balancing without an auxiliary loss (arXiv
    2408.15664, algorithm 1). The bias decides which experts are chosen, not how their outputs are weighted, so it
    changes no gradient.

    Args:
        bias_update_rate: Size of the steps of the biases, 0.001 in the source; 0 leaves them.

    Raises:
        ValueError: at the start of training, if the model has no experts, or a rate is given and its routers have no
            such bias.
    """

    def __init__(self, bias_update_rate: float = 0.0):
        self.bias_update_rate = bias_update_rate
        self._layers: dict[str, nn.Module] = {}
        # Layer -> tokens of each expert, (experts,).
        self._step_counts: dict[str, Tensor] = {}
        self._log_counts: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(  # type: ignore[override]  # the Trainer passes the model by name
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Start to count tokens."""
        self._layers = dict(expert_layers(model))
        if not self._layers:
            raise ValueError("There is no expert load to measure: the model is dense.")
        for name, layer in self._layers.items():
            if self.bias_update_rate:
                _keep_bias_in_float32(router_of(layer))
            experts = layer.get_submodule("experts")
            self._hooks.append(experts.register_forward_pre_hook(self._counting_hook(name), with_kwargs=True))

    def _counting_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def count(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if experts.training:
                # Gradient checkpointing counts everything twice, which changes no share.
                expert_indices = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]  # (tokens, top_k)
                counts = torch.bincount(
                    expert_indices.detach().reshape(-1),
                    minlength=experts.num_experts,  # type: ignore[arg-type]
                )
                self._step_counts[name] = self._step_counts.get(name, 0) + counts

        return count

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the biases by the load of the whole step, over all processes."""
        for name, counts in self._step_counts.items():
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(counts)
            if self.bias_update_rate:
                bias, load = getattr(router_of(self._layers[name]), _BIAS_NAME), counts.float()
                with torch.no_grad():
                    bias.add_(torch.sign(load.mean() - load).to(bias.device), alpha=self.bias_update_rate)
            self._log_counts[name] = self._log_counts.get(name, 0) + counts.cpu()
        self._step_counts = {}

    def log_metrics(self) -> dict[str, float]:
        """Return the metrics of the expert load over the steps since the last call, by name."""
        by_layer = {name: load_metrics(counts) for name, counts in self._log_counts.items()}
        self._log_counts = {}
        if not by_layer:
            return {}
        worst = {"expert_load_max": max, "expert_load_entropy": min, "expert_dead": max}
        metrics = {key: choose(layer[key] for layer in by_layer.values()) for key, choose in worst.items()}
        for name, layer in by_layer.items():
            metrics |= {f"{key}/{name}": value for key, value in layer.items()}
        return metrics

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks that count."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def load_metrics(counts: Tensor) -> dict[str, float]:
    """Measure how evenly tokens are distributed over experts.

    Args:
        counts: Tokens of each expert, (experts,), integers.

    Returns:
        `expert_load_max`, the largest count over the mean; `expert_load_entropy`, the entropy of the shares over its
        maximum, in [0, 1]; `expert_dead`, the number of experts without a token.

    Example:
        ```python
        >>> load_metrics(torch.tensor([2, 2, 0, 0]))
        {'expert_load_max': 2.0, 'expert_load_entropy': 0.5, 'expert_dead': 2}
        ```
    """
    shares = counts.double() / counts.sum().clamp(min=1)  # (experts,)
    entropy = -torch.xlogy(shares, shares).sum().item() / math.log(max(len(counts), 2))
    return {
        "expert_load_max": shares.max().item() * len(counts),
        "expert_load_entropy": entropy,
        "expert_dead": int((counts == 0).sum()),
    }


def _keep_bias_in_float32(router: nn.Module | None) -> None:
    """Hold a routing bias in float32: steps of 0.001 are below the precision of bfloat16."""
    bias = getattr(router, _BIAS_NAME, None)
    if bias is None:
        raise ValueError(f"The routers of this model have no {_BIAS_NAME}: biases cannot balance its experts.")
    bias.data = bias.data.float()
