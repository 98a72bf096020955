"""Schedules of merges: the coefficient of each model in a tensor, by the tensor's layer and group."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Group -> pattern of its keys; the first match counts.
GROUPS = {
    "score": re.compile(r"^score\."),
    "embeddings": re.compile(r"\.embed_tokens\."),
    "attention": re.compile(r"\.(self_attn|attention|attn)\."),
    "router": re.compile(r"\.(gate|router)\."),
    "experts": re.compile(r"\.(experts|shared_experts?)\."),
    "mlp": re.compile(r"\.(mlp|feed_forward|block_sparse_moe)\."),
}
_LAYER = re.compile(r"\.layers\.(\d+)\.")
# A constant, or values from the first layer to the last, linearly interpolated between them.
Gradient = tuple[float, ...]


def group_of(key: str) -> str | None:
    """Name the group of a tensor; None for norms outside of attention, which follow the general setting.

    Example:
        ```python
        >>> group_of("model.layers.3.mlp.experts.17.up_proj.weight")
        'experts'
        ```
    """
    return next((name for name, pattern in GROUPS.items() if pattern.search(key)), None)


@dataclass(frozen=True)
class Schedule:
    """Coefficients of n models in each tensor.

    Args:
        settings: Group -> one gradient per model; None stands for all tensors without a group in the settings.
        layers: Number of layers of the model.

    Example:
        ```python
        >>> schedule = Schedule.from_t(["0.5", "mlp=0:1"], layers=3)
        >>> schedule.coefficients("model.layers.1.mlp.up_proj.weight").tolist()
        [0.5, 0.5]
        >>> schedule.coefficients("model.layers.2.mlp.up_proj.weight").tolist()
        [0.0, 1.0]
        ```
    """

    settings: dict[str | None, tuple[Gradient, ...]]
    layers: int

    @classmethod
    def from_t(cls, texts: Sequence[str], layers: int) -> Schedule:
        """Parse `t`, the position between two models: "0.5", "0:0.5:1" (first layer to last), "mlp=0.3", "mlp=0:1".

        Args:
            texts: Settings, at most one per group.
            layers: Number of layers of the model.

        Raises:
            ValueError: if a text cannot be parsed, or `t` is not in [0, 1].
        """
        settings: dict[str | None, tuple[Gradient, ...]] = {None: ((0.5,), (0.5,))}
        for group, text in _split_groups(texts):
            gradient = _parse_gradient(text)
            if not all(0 <= t <= 1 for t in gradient):
                raise ValueError(f"t is {text}: it must be in [0, 1], from the first model to the second.")
            settings[group] = (tuple(1 - t for t in gradient), gradient)
        return cls(settings, layers)

    @classmethod
    def from_weights(cls, texts: Sequence[str], models: int, layers: int) -> Schedule:
        """Parse weights of models, in their order: "1,2,1", "mlp=1,0:1,1". They are divided by their sum.

        Args:
            texts: Settings, at most one per group.
            models: Number of models.
            layers: Number of layers of the model.

        Raises:
            ValueError: if a text cannot be parsed, a weight is negative, or their number is not that of the models.
        """
        settings: dict[str | None, tuple[Gradient, ...]] = {None: ((1.0,),) * models}
        for group, text in _split_groups(texts):
            gradients = tuple(_parse_gradient(part) for part in text.split(","))
            if len(gradients) != models:
                raise ValueError(f"weights are {text}: give {models} of them, one per model, separated by commas.")
            if not all(0 <= weight < float("inf") for gradient in gradients for weight in gradient):
                raise ValueError(f"weights are {text}: a weight must be finite and not negative.")
            settings[group] = gradients
        return cls(settings, layers)

    def coefficients(self, key: str) -> torch.Tensor:
        """Compute the coefficient of each model in a tensor.

        Tensors outside of the layers belong to the first layer (embeddings) or the last (final norm, head).

        Returns:
            Coefficients, summing to 1, (models,), float64.

        Raises:
            ValueError: if all weights are 0.
        """
        gradients = self.settings.get(group_of(key), self.settings[None])
        match = _LAYER.search(key)
        layer = int(match[1]) if match else (0 if group_of(key) == "embeddings" else self.layers - 1)
        depth = layer / (self.layers - 1) if self.layers > 1 else 1.0
        weights = torch.tensor([_interpolate(gradient, depth) for gradient in gradients], dtype=torch.float64)
        if not weights.sum() > 0:
            raise ValueError(f"All weights of {key} are 0: give one of the models a positive weight.")
        # By the maximum first: the sum of huge weights would be infinite.
        weights = weights / weights.max()
        return weights / weights.sum()


def _split_groups(texts: Sequence[str]) -> list[tuple[str | None, str]]:
    """Split "group=values" into group (None without one) and values."""
    settings: list[tuple[str | None, str]] = []
    for text in texts:
        group, _, values = text.rpartition("=")
        if group and group not in GROUPS:
            raise ValueError(f"{text}: there is no group {group!r}; choose from {', '.join(GROUPS)}.")
        settings.append((group or None, values))
    if len({group for group, _ in settings}) < len(settings):
        raise ValueError(f"{' and '.join(texts)}: a group is set twice.")
    return settings


def _parse_gradient(text: str) -> Gradient:
    try:
        return tuple(float(value) for value in text.split(":"))
    except ValueError:
        raise ValueError(f"{text!r} is not a number, or numbers from the first layer to the last (0:0.5:1).") from None


def _interpolate(gradient: Gradient, depth: float) -> float:
    """Interpolate at a depth in [0, 1], from the first layer to the last."""
    position = depth * (len(gradient) - 1)
    before = min(int(position), max(0, len(gradient) - 2))
    after = min(before + 1, len(gradient) - 1)
    return gradient[before] + (position - before) * (gradient[after] - gradient[before])
