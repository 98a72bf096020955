"""Mixed precision: the dtypes that this processor computes fastest in, and int8 linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn.functional import layer_norm, linear, rms_norm
from torch.overrides import TorchFunctionMode

# Names that processors give to their matrix units for bfloat16.
_MATRIX_UNITS = ("amx_bf16", "bf16", "sve_bf16", "arm_bf16")
_LOW_PRECISION = (torch.bfloat16, torch.float16)


class ComputeDtypes(NamedTuple):
    """Data types that a model computes in.

    Args:
        hidden_states: Data type of the states between its layers.
        products: Data type of the factors in products with its weights.
    """

    hidden_states: torch.dtype
    products: torch.dtype


def fastest_dtypes(device: torch.device, dtype: torch.dtype) -> ComputeDtypes:
    """Return the fastest dtypes for weights of `dtype`: on GPUs and CPUs with matrix units, `dtype` throughout.

    Other CPUs gain next to nothing from hidden states of less than float32, which is more exact. AMD's since Zen 4
    multiply bfloat16 at 2.3 times the speed of float32; CPUs without such instructions multiply bfloat16 at 0.6 of the
    speed of float32 (both measured: `python -m benchmarks.experts`, `dense` against `dense, float32`).
    """
    if device.type != "cpu" or dtype not in _LOW_PRECISION or _has_matrix_units():
        return ComputeDtypes(dtype, dtype)
    if dtype == torch.bfloat16 and _multiplies_bfloat16():
        return ComputeDtypes(torch.float32, torch.bfloat16)
    return ComputeDtypes(torch.float32, torch.float32)


@contextmanager
def mixed_precision_modes(dtypes: ComputeDtypes, weights: torch.dtype, is_quantized: bool) -> Iterator[None]:
    """Compute in these dtypes for a while.

    Args:
        dtypes: Data types to compute in; the hidden states have theirs already.
        weights: Data type of the model's weights.
        is_quantized: Whether the model may have int8 weights of torchao.
    """
    with ExitStack() as modes:
        if dtypes.hidden_states != weights:
            modes.enter_context(Float32Arithmetic(dtypes.products))
        if is_quantized:
            modes.enter_context(Int8Arithmetic())
        yield


@cache
def _has_matrix_units() -> bool:
    return any(torch.cpu.get_capabilities().get(unit) for unit in _MATRIX_UNITS)


@cache
def _multiplies_bfloat16() -> bool:
    # Intel's cores run that instruction at half the rate of the float32 one.
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16")) and "AMD" in capabilities.get("cpu_name", "")


class Float32Arithmetic(TorchFunctionMode):
    """A mode in which float32 hidden states are computed with weights of lower precision as if those were float32.

    Each weight is converted when it is used and dropped afterwards: memory stays that of the stored weights, and sums
    are float32 sums. Quantized weights (tensor subclasses) have their own arithmetic and are left alone.

    Args:
        products: Data type of matrix products with weights of that dtype: float32; or bfloat16, to which hidden states
            and products are rounded as in `torch.autocast`, while everything else stays float32.

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

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of `func`."""
        kwargs = kwargs or {}
        if func not in _WEIGHTED or (args[0] if args else kwargs["input"]).dtype != torch.float32:
            return func(*args, **kwargs)
        dtype = self.products if func is linear and self._multiplies(*args, **kwargs) else torch.float32
        args = tuple(_converted(value, dtype) for value in args)
        kwargs = {name: _converted(value, dtype) for name, value in kwargs.items()}
        output = func(*args, **kwargs)
        return output if dtype == torch.float32 else output.float()

    def _multiplies(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
        parameters = [parameter for parameter in (weight, bias) if parameter is not None]
        return all(_is_plain(parameter) and parameter.dtype == self.products for parameter in parameters)


_WEIGHTED = frozenset((linear, layer_norm, rms_norm))


def _is_plain(value: Any) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if _is_plain(value) and value.dtype in (*_LOW_PRECISION, torch.float32) else value


class Int8Arithmetic(TorchFunctionMode):
    """A mode in which torchao's linear layers of dynamic int8 give the same results on a CPU, faster.

    Layers that read the same hidden states (those for queries, keys and values; gate and up) quantize them only once,
    and the product is scaled in two passes where torchao takes four. The scale of a token is its largest magnitude over
    127.5, that of a weight is per row, as in `Int8DynamicActivationInt8WeightConfig()`; layers of any other
    configuration are left to torchao.

    Example:
        ```python
        >>> with Int8Arithmetic():
        ...     scores = model.predict(pairs)
        ```
    """

    def __init__(self) -> None:
        super().__init__()
        self._hidden_states: torch.Tensor | None = None
        self._quantized: tuple[torch.Tensor, torch.Tensor] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of `func`."""
        kwargs = kwargs or {}
        if func is linear and not kwargs and _is_dynamic_int8(args[1]):
            return self._linear(*args)
        if _writes_in_place(func, kwargs):
            self._hidden_states = None
        return func(*args, **kwargs)

    def _linear(self, hidden_states: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self._quantized is None or self._hidden_states is not hidden_states:
            self._hidden_states = hidden_states
            self._quantized = _quantize_rows(hidden_states.reshape(-1, hidden_states.shape[-1]))
        rows, scales = self._quantized  # (tokens, hidden), (tokens, 1)
        product = torch._int_mm(rows, weight.qdata.t())  # (tokens, out)
        output = (product * scales).mul_(weight.scale.flatten()).to(hidden_states.dtype)
        return (output if bias is None else output + bias).view(*hidden_states.shape[:-1], -1)


def _quantize_rows(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize (rows, size) to int8 of the same shape and float32 scales (rows, 1), symmetric around zero."""
    scales = hidden_states.abs().amax(-1, keepdim=True).float().div_(127.5)
    scales = scales.clamp_(min=torch.finfo(torch.float32).eps)
    return (hidden_states * scales.reciprocal()).round_().clamp_(-128, 127).to(torch.int8), scales


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


def _writes_in_place(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    # `mul_`, `__imul__`, `__setitem__`, or an `out`: the hidden states may have changed since they were quantized.
    name = getattr(func, "__name__", "")
    return "out" in kwargs or (name.endswith("_") and not name.endswith("__")) or name.startswith(("__i", "__set"))
