"""Arithmetic as the processor at hand is fastest at it: float32 on weights of less, int8 on int8 weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# What a processor calls its matrix units for bfloat16; without one, a bfloat16 product runs at about 0.6 of the speed
# of a float32 one (measured: `python -m benchmarks.experts`).
_BFLOAT16_UNITS = ("amx_bf16", "bf16", "sve_bf16", "arm_bf16")
_LOW_PRECISION = (torch.bfloat16, torch.float16)


def float32_is_faster(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of large matrices in `dtype` are best computed in float32: on CPUs without bfloat16 units."""
    return device.type == "cpu" and dtype in _LOW_PRECISION and not _has_bfloat16_units()


@cache
def _has_bfloat16_units() -> bool:
    return any(torch.cpu.get_capabilities().get(unit) for unit in _BFLOAT16_UNITS)


class Float32Arithmetic(TorchFunctionMode):
    """Within it, float32 activations meet weights of lower precision as if those were float32.

    Each weight is converted when it is used, and forgotten: memory stays that of the stored weights, while every sum is
    a float32 sum. Quantized weights (tensor subclasses) do their own arithmetic and are left alone.

    Example:
        ```python
        >>> linear = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
        >>> with Float32Arithmetic():
        ...     linear(torch.ones(1, 8)).dtype
        torch.float32
        ```
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Called by torch in place of `func`."""
        kwargs = kwargs or {}
        if func in _WEIGHTED and (args[0] if args else kwargs["input"]).dtype == torch.float32:
            args = tuple(_as_float32(each) for each in args)
            kwargs = {name: _as_float32(each) for name, each in kwargs.items()}
        return func(*args, **kwargs)


_WEIGHTED = frozenset((torch.nn.functional.linear, torch.nn.functional.layer_norm, torch.nn.functional.rms_norm))


def _as_float32(value: Any) -> Any:
    is_plain = type(value) in (torch.Tensor, torch.nn.Parameter)
    return value.float() if is_plain and value.dtype in _LOW_PRECISION else value


class Int8Arithmetic(TorchFunctionMode):
    """Within it, torchao's linear layers of dynamic int8 give what they always give on a CPU, sooner.

    Layers that read the same states (those for queries, keys and values; gate and up) have them quantized only once,
    and the product is scaled in two passes where torchao takes four. A token's scale is its own largest value over
    127.5, a weight's that of its row, as in `Int8DynamicActivationInt8WeightConfig()`; layers of any other
    configuration are left to torchao.

    Example:
        ```python
        >>> with Int8Arithmetic():
        ...     scores = model.predict(pairs)
        ```
    """

    def __init__(self) -> None:
        super().__init__()
        self._states: torch.Tensor | None = None
        self._quantized: tuple[torch.Tensor, torch.Tensor] | None = None

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Called by torch in place of `func`."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and not kwargs and _is_dynamic_int8(args[1]):
            return self._linear(*args)
        if _writes_in_place(func, kwargs):
            self._states = None
        return func(*args, **kwargs)

    def _linear(self, states: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self._states is not states:
            self._states, self._quantized = states, _quantize_rows(states.reshape(-1, states.shape[-1]))
        rows, scales = self._quantized
        product = torch._int_mm(rows, weight.qdata.t())
        output = (product * scales).mul_(weight.scale.flatten()).to(states.dtype)
        return (output if bias is None else output + bias).view(*states.shape[:-1], -1)


def _quantize_rows(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, size) -> int8 of the same shape and float32 scales (rows, 1), symmetric around zero."""
    scales = states.abs().amax(-1, keepdim=True).float().div_(127.5).clamp_(min=torch.finfo(torch.float32).eps)
    return (states * scales.reciprocal()).round_().clamp_(-128, 127).to(torch.int8), scales


def _is_dynamic_int8(weight: Any) -> bool:
    if type(weight).__name__ != "Int8Tensor" or weight.qdata.device.type != "cpu":
        return False
    dynamic = weight.act_quant_kwargs
    return (
        dynamic is not None
        and type(dynamic.granularity).__name__ == "PerRow"
        and dynamic.mapping_type.name == "SYMMETRIC"
        and not dynamic.reduce_range
        and weight.act_quant_scale is None
        and weight.act_pre_scale is None
        and weight.block_size[-1] == weight.qdata.shape[-1]
    )


def _writes_in_place(func: Callable, kwargs: dict) -> bool:
    # `mul_`, `__imul__`, `__setitem__`, or an `out`: states may not be what they were when they were quantized.
    name = getattr(func, "__name__", "")
    return "out" in kwargs or (name.endswith("_") and not name.endswith("__")) or name.startswith(("__i", "__set"))
