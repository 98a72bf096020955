"""LoRA adapters as tensors: base and update are added up while they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .streaming import LazyTensor, open_weights

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
# Settings of peft that make a LoRA more than `base + scaling * up @ down`.
_BEYOND = (
    *("use_dora", "fan_in_fan_out", "target_parameters", "layer_replication", "alora_invocation_tokens"),
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
# Ways to begin that leave the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ, ...) take a part of it away.
_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva", "mica")


@dataclass(frozen=True)
class AdaptedTensor:
    """A weight and its update, `base + scaling * up @ down`, added up in float32 (Hu et al., ICLR 2022).

    Args:
        base: (out, in) the weight.
        down: (rank, in) `lora_A`.
        up: (out, rank) `lora_B`.
        scaling: Of the update.
    """

    base: LazyTensor
    down: LazyTensor
    up: LazyTensor
    scaling: float

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight, which the sum takes the place of."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.base.shape

    def read(self, rows: slice) -> torch.Tensor:
        """These rows, in float32."""
        down = self.down.read(slice(0, self.down.shape[0])).float()
        return self.base.read(rows).float().addmm_(self.up.read(rows).float(), down, alpha=self.scaling)


@dataclass(frozen=True)
class ReplacedTensor:
    """A tensor that an adapter holds as a whole, in the place of that of its base.

    Args:
        base: What it takes the place of.
        tensor: It.
    """

    base: LazyTensor
    tensor: LazyTensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the base, whatever the adapter was trained in."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.tensor.shape

    def read(self, rows: slice) -> torch.Tensor:
        """These rows, as they are stored."""
        return self.tensor.read(rows)


def base_of(folder: Path) -> str:
    """The name of the model that an adapter was trained on, with its revision where that is said: `me/base@v1`.

    Raises:
        ValueError: if the adapter does not say it.
    """
    config = _config_of(folder)
    name = config.base_model_name_or_path
    if not name:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} does not say which model it is for: write its name there, as "
            "base_model_name_or_path."
        )
    return name if not config.revision or Path(name).is_dir() else f"{name}@{config.revision}"


def adapted_tensors(folder: Path, base: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors of a base with an adapter's updates on them.

    Args:
        folder: What peft saved.
        base: By the keys of our layout.

    Raises:
        ValueError: if the adapter is no plain LoRA, or is for another model.
    """
    config = _config_of(folder)
    stored = {key.removeprefix(_PREFIX): tensor for key, tensor in open_weights(folder).items()}
    adapted = dict(base)
    for key, tensor in stored.items():
        module, is_update = key.removesuffix(_DOWN).removesuffix(_UP), key.endswith((_DOWN, _UP))
        target = f"{module}.weight" if is_update else key
        if target not in base:
            raise ValueError(
                f"{folder} has {key}, but its base no {target}: it is for another model, or no plain LoRA."
            )
        if is_update and not {module + _DOWN, module + _UP} <= stored.keys():
            raise ValueError(f"{folder} has {key}, but not the other half of the update of {target}.")
        if is_update:
            down, up = stored[module + _DOWN], stored[module + _UP]
            shape = (*up.shape[:1], *down.shape[1:]) if up.shape[1:] == down.shape[:1] else None
            tensor = AdaptedTensor(base[target], down, up, _scaling(config, module, down))
        else:
            shape, tensor = tensor.shape, ReplacedTensor(base[target], tensor)
        if shape != base[target].shape:
            raise ValueError(f"{folder}: the update of {target} is not of its shape {base[target].shape}.")
        adapted[target] = tensor
    return adapted


def _config_of(folder: Path) -> LoraConfig:
    from peft import LoraConfig, PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG} is damaged, or no config of peft: {error}") from None
    is_plain = isinstance(config, LoraConfig) and config.bias == "none"
    if not is_plain or any(getattr(config, name, None) for name in _BEYOND) or _changes_base(config):
        raise ValueError(f"{folder} is no plain LoRA adapter: merge it into its base with peft, and name the result.")
    return config


def _changes_base(config: LoraConfig) -> bool:
    return config.init_lora_weights not in _BEGINNINGS


def _scaling(config: LoraConfig, module: str, down: LazyTensor) -> float:
    from peft.utils.other import get_pattern_key

    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
    rank = down.shape[0]
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
