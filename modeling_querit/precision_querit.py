"""Arithmetic as the processor at hand is fastest at it: in float32, bfloat16 or int8."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn.functional import layer_norm, linear, rms_norm
from torch.overrides import TorchFunctionMode

# What processors call their matrix units for bfloat16.
_MATRIX_UNITS = ("amx_bf16", "bf16", "sve_bf16", "arm_bf16")
_LOW_PRECISION = (torch.bfloat16, torch.float16)


class Arithmetic(NamedTuple):
    """Dtypes: of the states between a model's layers, and of what is multiplied with its weights."""

    states: torch.dtype
    products: torch.dtype


def fastest_arithmetic(device: torch.device, dtype: torch.dtype) -> Arithmetic:
    """How weights of `dtype` are best computed with: on GPUs and with matrix units all in `dtype`.

    Other CPUs gain next to nothing from states of less than float32, which is more exact. AMD's since Zen 4 multiply
    bfloat16 at 2.3 times the speed of float32; on CPUs without such instructions a bfloat16 product runs at 0.6 of the
    speed of a float32 one (both measured: `python -m benchmarks.experts`, `dense` against `dense, float32`).
    """
    if device.type != "cpu" or dtype not in _LOW_PRECISION or _has_matrix_units():
        return Arithmetic(dtype, dtype)
    if dtype == torch.bfloat16 and _multiplies_bfloat16():
        return Arithmetic(torch.float32, torch.bfloat16)
    return Arithmetic(torch.float32, torch.float32)


@cache
def _has_matrix_units() -> bool:
    return any(torch.cpu.get_capabilities().get(unit) for unit in _MATRIX_UNITS)


@cache
def _multiplies_bfloat16() -> bool:
    # Intel's cores have that instruction at half the rate of the float32 one.
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16")) and "AMD" in known.get("cpu_name", "")


class Float32Arithmetic(TorchFunctionMode):
    """Within it, float32 activations meet weights of lower precision as if those were float32.

    Each weight is converted when it is used, and forgotten: memory stays that of the stored weights, while every sum is
    a float32 sum. Quantized weights (tensor subclasses) do their own arithmetic and are left alone.

    Args:
        products: Of activations with weights of that dtype: float32, or bfloat16, to which the activations are rounded
            then, and what comes out, as in `torch.autocast`; all between stays float32.

    Example:
        ```python
        >>> linear = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
        >>> with Float32Arithmetic():
        ...     linear(torch.ones(1, 8)).dtype
        torch.float32
        ```
    """

    def __init__(self, products: torch.dtype = torch.float32):
        super().__init__()
        self.products = products

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Called by torch in place of `func`."""
        kwargs = kwargs or {}
        if func not in _WEIGHTED or (args[0] if args else kwargs["input"]).dtype != torch.float32:
            return func(*args, **kwargs)
        dtype = self.products if func is linear and self._multiplies(*args, **kwargs) else torch.float32
        args = tuple(_converted(each, dtype) for each in args)
        kwargs = {name: _converted(each, dtype) for name, each in kwargs.items()}
        output = func(*args, **kwargs)
        return output if dtype == torch.float32 else output.float()

    def _multiplies(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
        return all(_is_plain(each) and each.dtype == self.products for each in (weight, bias) if each is not None)


_WEIGHTED = frozenset((linear, layer_norm, rms_norm))


def _is_plain(value: Any) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if _is_plain(value) and value.dtype in (*_LOW_PRECISION, torch.float32) else value


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
        if func is linear and not kwargs and _is_dynamic_int8(args[1]):
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
