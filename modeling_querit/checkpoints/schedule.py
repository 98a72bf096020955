"""How much of each model goes into a tensor: by layer, and by what the tensor belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# What a key may belong to; the first that matches is it.
GROUPS = {
    "score": re.compile(r"^score\."),
    "embeddings": re.compile(r"\.embed_tokens\."),
    "attention": re.compile(r"\.(self_attn|attention|attn)\."),
    "router": re.compile(r"\.(gate|router)\."),
    "experts": re.compile(r"\.(experts|shared_experts?)\."),
    "mlp": re.compile(r"\.(mlp|feed_forward|block_sparse_moe)\."),
}
_LAYER = re.compile(r"\.layers\.(\d+)\.")
# A number, or numbers from the first layer to the last, in between by straight lines.
Gradient = tuple[float, ...]


def group_of(key: str) -> str | None:
    """The group of a tensor; None for norms outside of attention, which follow the general setting.

    Example:
        ```python
        >>> group_of("model.layers.3.mlp.experts.17.up_proj.weight")
        'experts'
        ```
    """
    return next((name for name, pattern in GROUPS.items() if pattern.search(key)), None)


@dataclass(frozen=True)
class Schedule:
    """Weights of n models, by tensor.

    Args:
        settings: A gradient for each model, by group; None: for all tensors of no group named here.
        layers: How many the model has.

    Example:
        ```python
        >>> schedule = Schedule.of_t(["0.5", "mlp=0:1"], layers=3)
        >>> schedule.weights("model.layers.1.mlp.up_proj.weight").tolist()
        [0.5, 0.5]
        >>> schedule.weights("model.layers.2.mlp.up_proj.weight").tolist()
        [0.0, 1.0]
        ```
    """

    settings: dict[str | None, tuple[Gradient, ...]]
    layers: int

    @classmethod
    def of_t(cls, texts: Sequence[str], layers: int) -> Schedule:
        """From `t` of two models: "0.5", "0:0.5:1" (first layer to last), "mlp=0.3", "mlp=0:1".

        Raises:
            ValueError: if a text cannot be read, or `t` is not in [0, 1].
        """
        settings = {}
        for name, text in _named(texts):
            t = _gradient(text)
            if not all(0 <= each <= 1 for each in t):
                raise ValueError(f"t is {text}: it goes from 0, the first model, to 1, the second.")
            settings[name] = (tuple(1 - each for each in t), t)
        return cls({None: ((0.5,), (0.5,))} | settings, layers)

    @classmethod
    def of_weights(cls, texts: Sequence[str], models: int, layers: int) -> Schedule:
        """From weights of the models, in their order: "1,2,1", "mlp=1,0:1,1"; they are divided by their sum.

        Raises:
            ValueError: if a text cannot be read, a weight is negative, or the count is not that of the models.
        """
        settings: dict[str | None, tuple[Gradient, ...]] = {None: ((1.0,),) * models}
        for name, text in _named(texts):
            gradients = tuple(_gradient(each) for each in text.split(","))
            if len(gradients) != models:
                raise ValueError(f"weights are {text}: {models} models need {models}, separated by commas.")
            if not all(0 <= each < float("inf") for gradient in gradients for each in gradient):
                raise ValueError(f"weights are {text}: a weight is a number from 0 on.")
            settings[name] = gradients
        return cls(settings, layers)

    def weights(self, key: str) -> torch.Tensor:
        """Of each model in this tensor: (models,), float64, summing to 1.

        What is not in a layer counts to the first one (embeddings) or the last (final norm, head).

        Raises:
            ValueError: if all are 0.
        """
        gradients = self.settings.get(group_of(key), self.settings[None])
        found = _LAYER.search(key)
        layer = int(found[1]) if found else (0 if group_of(key) == "embeddings" else self.layers - 1)
        place = layer / (self.layers - 1) if self.layers > 1 else 1.0
        weights = torch.tensor([_at(gradient, place) for gradient in gradients], dtype=torch.float64)
        if not weights.sum() > 0:
            raise ValueError(f"All weights of {key} are 0: give one of the models some.")
        # First the largest: the sum of huge ones would be no number.
        weights = weights / weights.max()
        return weights / weights.sum()


def _named(texts: Sequence[str]) -> list[tuple[str | None, str]]:
    named = []
    for text in texts:
        group, _, values = text.rpartition("=")
        if group and group not in GROUPS:
            raise ValueError(f"{text}: there is no group {group!r}; choose from {', '.join(GROUPS)}.")
        named.append((group or None, values))
    if len({name for name, _ in named}) < len(named):
        raise ValueError(f"{' and '.join(texts)}: a group is set twice.")
    return named


def _gradient(text: str) -> Gradient:
    try:
        return tuple(float(each) for each in text.split(":"))
    except ValueError:
        raise ValueError(
            f"{text!r} is no number, nor numbers from the first layer to the last such as 0:0.5:1."
        ) from None


def _at(gradient: Gradient, place: float) -> float:
    """The value at a place in [0, 1] between the first layer and the last."""
    position = place * (len(gradient) - 1)
    before = min(int(position), max(0, len(gradient) - 2))
    after = min(before + 1, len(gradient) - 1)
    return gradient[before] + (position - before) * (gradient[after] - gradient[before])
