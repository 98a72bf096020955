"""Mixture-of-experts layers at nearly the speed of dense ones: `experts_implementation="querit"`.

Importing this file registers two implementations with transformers, for every model whose experts go through
`ALL_EXPERTS_FUNCTIONS` (DeepSeek, Qwen3-MoE, Mixtral, ...):

    AutoModel.from_pretrained(name, experts_implementation="querit")

- `querit`, the default of Querit models, sorts tokens by expert and computes a few experts at a time, one per core, by
  batched matrix products. It is for CPUs; on other devices it calls transformers' `grouped_mm`.
- `querit_triton` runs the kernels of `moe_triton_querit.py` on NVIDIA GPUs. It will be the default there once
  `python -m benchmarks.experts --device cuda` has shown on a GPU that it is right, and faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from threading import local
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from .mixed_precision_querit import fastest_dtypes
from .moe_triton_querit import Saved, experts_backward, experts_forward, is_available

EXPERTS_IMPLEMENTATION = "querit"
TRITON_IMPLEMENTATION = "querit_triton"

# From this mean number of tokens per expert on, float32 products gain more than converting the weights costs. With
# fewer, reading the weights dominates, and transformers' `grouped_mm` has the least overhead.
_ROWS_WORTH_CONVERTING = 48
# Maximum number of experts computed at once: their converted weights are held in memory.
_MAX_GROUP = 16
# Maximum ratio of computed to needed rows, when the experts of a group are padded to the same number of rows.
_MAX_PADDING = 1.12
# Number of tokens whose outputs are summed at once: few enough to stay in the cache.
_TOKENS_PER_SUM = 512


class ExpertsModule(Protocol):
    """What this file uses of an experts module that transformers' `use_experts_implementation` has described."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    gate_up_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    gate_up_proj_bias: Tensor
    up_proj_bias: Tensor
    down_proj_bias: Tensor
    act_fn: nn.Module
    post_expert_norm: nn.Module

    def _apply_gate(self, gate_up: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return all parameters of the module."""


def querit_experts_forward(
    self: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute the experts of a mixture-of-experts layer, as transformers' registry calls it.

    Args:
        self: The experts module: `gate_up_proj` (experts, 2 * width, hidden) and `down_proj` (experts, hidden, width),
            or another layout that transformers' `use_experts_implementation` describes.
        hidden_states: Inputs, (tokens, hidden).
        top_k_index: Experts of each token, (tokens, k).
        top_k_weights: Weights of their outputs, (tokens, k).

    Returns:
        Weighted sums, (tokens, hidden), in the dtype of `hidden_states`; summed in float32 at least.
    """
    is_exporting = torch.compiler.is_exporting()  # A graph cannot depend on how many tokens an expert gets.
    if getattr(self, "_is_expert_parallel", False) or hidden_states.device.type != "cpu" or is_exporting:
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    # Both, since weights may be computed (adapters, parametrizations), and norms have parameters too.
    tensors = (hidden_states, top_k_weights, *_projections(self), *self.parameters())
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _forward_for_backward(self, hidden_states, top_k_index, top_k_weights)
    dtype = _product_dtype(self, hidden_states)
    # Rounding float32 hidden states to weights of lower precision is what transformers does, too.
    fastest = fastest_dtypes(hidden_states.device, self.down_proj.dtype if dtype == torch.float32 else dtype).products
    if dtype != fastest == torch.float32 and top_k_index.numel() < _ROWS_WORTH_CONVERTING * self.num_experts:
        if _suits_grouped_mm(self):
            return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
        fastest = dtype
    return _forward_for_inference(self, hidden_states, top_k_index, top_k_weights, fastest)


def triton_experts_forward(
    self: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute the same in Triton kernels; experts other than plain SwiGLU are left to transformers' `grouped_mm`.

    Raises:
        RuntimeError: if there is no Triton, or no NVIDIA GPU of capability 8.0 or more.
    """
    if not is_available(hidden_states.device):
        raise RuntimeError(
            f"experts_implementation={TRITON_IMPLEMENTATION!r} needs Triton and an NVIDIA GPU (capability 8.0 or "
            f"more), but the model is on {hidden_states.device}: use {EXPERTS_IMPLEMENTATION!r} there."
        )
    if not _has_triton_layout(self):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    dtype = _product_dtype(self, hidden_states)
    inputs, first, second = (tensor.to(dtype) for tensor in (hidden_states, self.gate_up_proj, self.down_proj))
    tensors = (inputs, first, second, top_k_index, top_k_weights)
    # Within a Function, parameters count as needing gradients even under no_grad.
    output = _TritonExperts.apply(*tensors) if torch.is_grad_enabled() else experts_forward(*tensors)[0]
    return output.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, querit_experts_forward)
ALL_EXPERTS_FUNCTIONS.register(TRITON_IMPLEMENTATION, triton_experts_forward)


class Group(NamedTuple):
    """Experts that are computed at once.

    Args:
        experts: Indices of the experts.
        rows: Number of slots of each expert.
        slots: Slots of the group among all slots.
    """

    experts: list[int]
    rows: int
    slots: slice


class Routing(NamedTuple):
    """Tokens sorted by expert into slots.

    Args:
        groups: Groups of experts, in the order of their slots.
        source: Token in each slot, (slots,); token 0 in slots that only pad their group, whose output is not used.
        slots: Slot of each of a token's k copies, (tokens, k).
    """

    groups: list[Group]
    source: Tensor
    slots: Tensor


def group_by_expert(top_k_index: Tensor, num_experts: int, neighbours: bool) -> Routing:
    """Sort tokens by expert, stably, and put the experts into groups.

    Args:
        top_k_index: Experts of each token, (tokens, k).
        num_experts: Number of experts in the layer.
        neighbours: Whether the experts of a group are consecutive, so that their weights are one slice of the layer's.
            Otherwise they are those with the closest numbers of tokens, which leaves little padding.
    """
    tokens, k = top_k_index.shape
    by_expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    counts = torch.bincount(by_expert, minlength=num_experts)
    groups = list(_groups(counts.tolist(), neighbours))
    first_slot = torch.zeros(num_experts, dtype=torch.long)
    for group in groups:
        first_slot[group.experts] = torch.arange(group.slots.start, group.slots.stop, group.rows)
    slot = torch.arange(len(order)) + (first_slot - counts.cumsum(0) + counts)[by_expert]
    source = torch.zeros(groups[-1].slots.stop if groups else 0, dtype=torch.long)
    source[slot] = order // k
    slots = torch.empty_like(order)
    slots[order] = slot
    return Routing(groups, source, slots.view(tokens, k))


def _groups(counts: list[int], neighbours: bool) -> Iterator[Group]:
    busy = [expert for expert, count in enumerate(counts) if count]
    if not neighbours:
        busy.sort(key=lambda expert: counts[expert])
    end = 0
    while busy:
        size = 1
        while size < len(busy) and _fit(busy[: size + 1], counts, neighbours):
            size += 1
        experts, busy = busy[:size], busy[size:]
        rows = max(counts[expert] for expert in experts)
        start, end = end, end + size * rows
        yield Group(experts, rows, slice(start, end))


def _fit(experts: list[int], counts: list[int], neighbours: bool) -> bool:
    rows = [counts[expert] for expert in experts]
    return (
        len(experts) <= min(torch.get_num_threads(), _MAX_GROUP)
        and (not neighbours or experts[-1] - experts[0] < len(experts))
        # A few rows are free: a product of 3 rows takes as long as one of 8 rows.
        and max(rows) * len(rows) <= _MAX_PADDING * sum(rows) + 8
    )


class _TritonExperts(torch.autograd.Function):
    """The Triton kernels as one differentiable operation."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, gate_up: Tensor, down: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        tensors = (hidden_states, gate_up, down, top_k_index, top_k_weights)
        output, saved = experts_forward(*tensors, for_backward=any(ctx.needs_input_grad))
        ctx.save_for_backward(*tensors, *saved)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden_states, gate_up, down, top_k_index, top_k_weights, *saved = ctx.saved_tensors
        *needs, _, needs_weights = ctx.needs_input_grad
        *grads, grad_weights = experts_backward(
            grad_output,
            Saved(*saved),
            hidden_states,
            gate_up,
            down,
            top_k_index,
            top_k_weights,
            needs=(*needs, needs_weights),
        )
        return *grads, None, grad_weights


def _has_triton_layout(self: ExpertsModule) -> bool:
    """Whether the experts are SwiGLU as the kernels expect: gate above up, no bias, no norm, all on this device."""
    return (
        self.has_gate
        and getattr(type(self), "_apply_gate", None) is _default_apply_gate
        and isinstance(self.act_fn, nn.SiLU | type(ACT2FN["silu"]))
        and not self.has_bias
        and not self.is_transposed
        and not getattr(self, "has_post_expert_norm", False)
        and not getattr(self, "_is_expert_parallel", False)
    )


def _forward_for_inference(
    self: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, dtype: torch.dtype
) -> Tensor:
    """Compute in `dtype` without gradients; converted weights and outputs use buffers that are kept between calls."""
    first, second = _projections(self)
    converts = first.dtype != dtype
    routing = group_by_expert(top_k_index, self.num_experts, neighbours=not converts)
    inputs = hidden_states.to(dtype)
    outputs = _buffer(
        "outputs", (len(routing.source), hidden_states.shape[-1]), torch.promote_types(dtype, torch.float32)
    )
    with torch.autocast("cpu", enabled=False):
        for group in routing.groups:
            group_first, group_second = (
                _converted(weight, group.experts, dtype, name) if converts else weight[_as_slice(group.experts)]
                for weight, name in ((first, "first"), (second, "second"))
            )
            group_inputs = inputs.index_select(0, routing.source[group.slots])
            _compute(self, group_inputs, group_first, group_second, group, outputs[group.slots])
    result = torch.empty(hidden_states.shape, dtype=hidden_states.dtype)
    chunks = (tensor.split(_TOKENS_PER_SUM) for tensor in (result, routing.slots, top_k_weights))
    for result_chunk, slots, weights in zip(*chunks, strict=True):
        result_chunk.copy_(_weighted_sum(outputs, slots, weights))
    return result


def _forward_for_backward(
    self: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute for a backward pass: no buffers are reused, and only what differs in dtype is converted."""
    dtype = _product_dtype(self, hidden_states)
    routing = group_by_expert(top_k_index, self.num_experts, neighbours=True)
    inputs = hidden_states.to(dtype)
    # One split instead of slices: the gradient of a slice is as large as the whole tensor.
    sizes = _sizes([_as_slice(group.experts) for group in routing.groups], self.num_experts)
    weights = (projection.split(sizes)[1::2] for projection in _projections(self))
    outputs = [
        _compute(self, inputs.index_select(0, routing.source[group.slots]), first.to(dtype), second.to(dtype), group)
        for group, first, second in zip(routing.groups, *weights, strict=True)
    ]
    if not outputs:
        return torch.zeros_like(hidden_states)
    wide = torch.promote_types(outputs[0].dtype, torch.float32)
    return _weighted_sum(torch.cat(outputs).to(wide), routing.slots, top_k_weights).to(hidden_states.dtype)


def _compute(
    self: ExpertsModule, inputs: Tensor, first: Tensor, second: Tensor, group: Group, out: Tensor | None = None
) -> Tensor:
    """(slots, hidden) -> (slots, hidden) for the experts of one group, whose weights are (experts, out, in)."""
    hidden = torch.bmm(inputs.view(len(group.experts), group.rows, -1), first.transpose(1, 2))
    if self.has_bias:
        bias = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
        hidden = hidden + bias[group.experts].unsqueeze(1)
    hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
    # A bias may have widened the dtype.
    hidden = hidden.to(second.dtype)
    has_norm = getattr(self, "has_post_expert_norm", False)
    if out is not None and out.dtype == hidden.dtype and not self.has_bias and not has_norm:
        return torch.bmm(hidden, second.transpose(1, 2), out=out.view(*hidden.shape[:-1], -1))
    output = torch.bmm(hidden, second.transpose(1, 2))
    if self.has_bias:
        output = output + self.down_proj_bias[group.experts].unsqueeze(1)
    output = output.flatten(0, 1)
    output = self.post_expert_norm(output) if has_norm else output
    return output if out is None else out.copy_(output)


def _weighted_sum(outputs: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """`sum_j weights[t, j] * outputs[slots[t, j]]`, in the order of j: (tokens, hidden)."""
    parts = outputs.index_select(0, slots.flatten()).view(*slots.shape, outputs.shape[-1])  # (tokens, k, hidden)
    return (parts * weights.unsqueeze(-1)).sum(1)


def _projections(self: ExpertsModule) -> tuple[Tensor, Tensor]:
    """Return both weights of every expert, (experts, out, in) each."""
    first = self.gate_up_proj if self.has_gate else self.up_proj
    second = self.down_proj
    return (first.transpose(1, 2), second.transpose(1, 2)) if self.is_transposed else (first, second)


def _product_dtype(self: ExpertsModule, hidden_states: Tensor) -> torch.dtype:
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return torch.promote_types(hidden_states.dtype, self.down_proj.dtype)


def _suits_grouped_mm(self: ExpertsModule) -> bool:
    """Whether every row of the weights starts at a multiple of 16 bytes, as `grouped_mm` needs it."""
    return all(size * weight.element_size() % 16 == 0 for weight in _projections(self) for size in weight.shape[1:])


def _converted(weights: Tensor, experts: list[int], dtype: torch.dtype, name: str) -> Tensor:
    """Convert the weights of these experts, (experts, out, in), to another dtype."""
    buffer = _buffer(name, (len(experts), *weights.shape[1:]), dtype)
    for index, expert in enumerate(experts):
        buffer[index].copy_(weights[expert])
    return buffer


def _as_slice(neighbours: list[int]) -> slice:
    return slice(neighbours[0], neighbours[-1] + 1)


def _sizes(slices: list[slice], total: int) -> list[int]:
    """Return sizes of slices and of the gaps before, between and after them: gap, slice, gap, slice, ..., gap."""
    edges = [0, *(edge for piece in slices for edge in (piece.start, piece.stop)), total]
    return [end - start for start, end in itertools.pairwise(edges)]


_buffers = local()


def _buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return uninitialised memory that this thread reuses: fresh memory costs a page fault per page."""
    size = torch.Size(shape).numel()
    key = f"{name}_{dtype}"
    buffer = getattr(_buffers, key, None)
    if buffer is None or buffer.numel() < size:
        # Not an inference tensor, which could only be written to in inference mode.
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=dtype)
        setattr(_buffers, key, buffer)
    return buffer[:size].view(shape)
