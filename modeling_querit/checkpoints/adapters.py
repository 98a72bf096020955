"""LoRA adapters as tensors: base weight and update are added while they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .safetensors_io import LazyTensor, open_weights

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
# Settings of peft with which an adapter is more than `base + scaling * up @ down`.
_UNSUPPORTED_SETTINGS = (
    *("use_dora", "fan_in_fan_out", "target_parameters", "layer_replication", "alora_invocation_tokens"),
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
# Initialisations that leave the base unchanged; the others (PiSSA, OLoRA, CorDA, LoftQ, ...) subtract from it.
_SUPPORTED_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva", "mica")


@dataclass(frozen=True)
class AdaptedTensor:
    """A weight with its LoRA update, `base + scaling * up @ down`, computed in float32 (Hu et al., ICLR 2022).

    Args:
        base: Weight of the base model, (out, in).
        down: `lora_A`, (rank, in).
        up: `lora_B`, (out, rank).
        scaling: Factor of the update.
    """

    base: LazyTensor
    down: LazyTensor
    up: LazyTensor
    scaling: float

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the base weight, which the adapted one replaces."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, (out, in)."""
        return self.base.shape

    def read(self, rows: slice) -> torch.Tensor:
        """Read these rows, in float32."""
        down = self.down.read(slice(0, self.down.shape[0])).float()
        return self.base.read(rows).float().addmm_(self.up.read(rows).float(), down, alpha=self.scaling)


@dataclass(frozen=True)
class ReplacedTensor:
    """A tensor that the adapter stores in full (`modules_to_save`) and that replaces the base's.

    Args:
        base: Tensor of the base model.
        tensor: Tensor of the adapter.
    """

    base: LazyTensor
    tensor: LazyTensor

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the base's tensor, whatever the adapter was trained in."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.tensor.shape

    def read(self, rows: slice) -> torch.Tensor:
        """Read these rows, in the data type they are stored in."""
        return self.tensor.read(rows)


def base_model_of(folder: Path) -> str:
    """Name the model that an adapter was trained on, with its revision if the adapter states one: `me/base@v1`.

    Raises:
        ValueError: if the adapter does not name its base model.
    """
    config = _load_config(folder)
    name = config.base_model_name_or_path
    if not name:
        raise ValueError(f"{folder / ADAPTER_CONFIG} does not name its base model: add it as base_model_name_or_path.")
    return name if not config.revision or Path(name).is_dir() else f"{name}@{config.revision}"


def apply_adapter(folder: Path, base: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Apply an adapter's updates to the tensors of its base model; nothing is read yet.

    Args:
        folder: Adapter, as peft saves it.
        base: Key -> tensor of the base model, in Querit's layout.

    Returns:
        Key -> tensor; those that the adapter does not change are the base's own.

    Raises:
        ValueError: if the adapter is not a plain LoRA, or belongs to another model.
    """
    config = _load_config(folder)
    stored = {key.removeprefix(_PREFIX): tensor for key, tensor in open_weights(folder).items()}
    adapted = dict(base)
    for key, tensor in stored.items():
        module, is_update = key.removesuffix(_DOWN).removesuffix(_UP), key.endswith((_DOWN, _UP))
        target = f"{module}.weight" if is_update else key
        if target not in base:
            raise ValueError(
                f"{folder} has {key}, but its base model has no {target}: the adapter belongs to another model, or is "
                "not a plain LoRA."
            )
        if is_update and not {module + _DOWN, module + _UP} <= stored.keys():
            raise ValueError(f"{folder} has {key}, but not the other half of the update of {target}.")
        if is_update:
            down, up = stored[module + _DOWN], stored[module + _UP]
            shape = (*up.shape[:1], *down.shape[1:]) if up.shape[1:] == down.shape[:1] else None
            adapted[target] = AdaptedTensor(base[target], down, up, _scaling(config, module, down))
        else:
            shape = tensor.shape
            adapted[target] = ReplacedTensor(base[target], tensor)
        if shape != base[target].shape:
            raise ValueError(f"{folder}: the update of {target} does not match its shape {base[target].shape}.")
    return adapted


def _load_config(folder: Path) -> LoraConfig:
    from peft import LoraConfig, PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG} is damaged, or not a config of peft: {error}") from None
    is_supported = (
        isinstance(config, LoraConfig)
        and config.bias == "none"
        and not any(getattr(config, name, None) for name in _UNSUPPORTED_SETTINGS)
        and config.init_lora_weights in _SUPPORTED_INITIALISATIONS
    )
    if not is_supported:
        raise ValueError(
            f"{folder} is not a plain LoRA adapter: merge it into its base model with peft, and name the result."
        )
    return config


def _scaling(config: LoraConfig, module: str, down: LazyTensor) -> float:
    from peft.utils.other import get_pattern_key

    alphas = config.alpha_pattern or {}
    alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
    rank = down.shape[0]
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
