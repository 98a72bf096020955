"""Mixture-of-experts layers at nearly the speed of dense ones: `experts_implementation="querit"`.

Importing this file registers two implementations with transformers, for every model whose experts go through
`ALL_EXPERTS_FUNCTIONS` (DeepSeek, Qwen3-MoE, Mixtral, ...):

    AutoModel.from_pretrained(name, experts_implementation="querit")

- `querit`, the default of Querit models, sorts the tokens by expert and computes a few experts at a time, one a core,
  by batched matrix products. It is for CPUs; elsewhere it is transformers' `grouped_mm`.
- `querit_triton` has the kernels of `moe_triton_querit.py` for NVIDIA GPUs. Not the default as long as
  `python -m benchmarks.experts --device cuda` has not shown on a GPU that they are right, and faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from threading import local
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from .moe_triton_querit import Saved, experts_backward, experts_forward, is_available
from .precision_querit import fastest_arithmetic

NAME = "querit"
TRITON_NAME = "querit_triton"

# From this many tokens an expert on, float32 products gain more than converting the expert's weights costs. With fewer,
# reading the weights is what takes the time, and transformers' `grouped_mm` reads them with the least ado.
_ROWS_WORTH_CONVERTING = 48
# Experts computed at once, at most: their converted weights are held in memory.
_MAX_GROUP = 16
# Rows computed over rows needed, where the experts of a group are padded to the same number of rows.
_MAX_PADDING = 1.12
# Tokens whose outputs are added up at once: few enough to stay in the cache.
_TOKENS_PER_SUM = 512


def querit_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts of a mixture-of-experts layer, as transformers' registry calls them.

    Args:
        self: The experts module: `gate_up_proj` (experts, 2 * width, hidden) and `down_proj` (experts, hidden, width),
            or another layout that transformers' `use_experts_implementation` describes.
        hidden_states: (tokens, hidden).
        top_k_index: (tokens, k), the experts of each token.
        top_k_weights: (tokens, k), the weights of their outputs.

    Returns:
        (tokens, hidden) in the dtype of `hidden_states`; the sum is a float32 one at least.
    """
    if getattr(self, "_is_expert_parallel", False) or hidden_states.device.type != "cpu":
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    # Weights may be computed (adapters, parametrizations), and parameters be those of a norm.
    tensors = (hidden_states, top_k_weights, *_projections(self), *self.parameters())
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _forward_for_backward(self, hidden_states, top_k_index, top_k_weights)
    dtype = _product_dtype(self, hidden_states)
    # Rounding float32 states is what transformers does, too, where they meet weights of less.
    fastest = fastest_arithmetic(
        hidden_states.device, self.down_proj.dtype if dtype == torch.float32 else dtype
    ).products
    if dtype != fastest == torch.float32 and top_k_index.numel() < _ROWS_WORTH_CONVERTING * self.num_experts:
        if _suits_grouped_mm(self):
            return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
        fastest = dtype
    return _forward(self, hidden_states, top_k_index, top_k_weights, fastest)


def triton_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The same in Triton kernels; experts that are not plain SwiGLU go to transformers' `grouped_mm`.

    Raises:
        RuntimeError: where the kernels cannot run: without Triton, or without an NVIDIA GPU of capability 8.0 or more.
    """
    if not is_available(hidden_states.device):
        raise RuntimeError(
            f"experts_implementation={TRITON_NAME!r} needs Triton and an NVIDIA GPU (capability 8.0 or more), but the "
            f"model is on {hidden_states.device}: use {NAME!r} there."
        )
    if not _has_triton_layout(self):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    dtype = _product_dtype(self, hidden_states)
    inputs, first, second = (each.to(dtype) for each in (hidden_states, self.gate_up_proj, self.down_proj))
    tensors = (inputs, first, second, top_k_index, top_k_weights)
    # Parameters count as needing gradients within a Function, under no_grad too.
    output = _TritonExperts.apply(*tensors) if torch.is_grad_enabled() else experts_forward(*tensors)[0]
    return output.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, querit_experts_forward)
ALL_EXPERTS_FUNCTIONS.register(TRITON_NAME, triton_experts_forward)


class Group(NamedTuple):
    """Experts computed at once: `slots` says which of all slots are theirs, `rows` slots to each."""

    experts: list[int]
    rows: int
    slots: slice


class Routing(NamedTuple):
    """Tokens sorted by expert: `source` (slots,) is the token in each slot, `slots` (tokens, k) where copies went.

    A slot that only fills up its group holds token 0, and nobody reads its output.
    """

    groups: list[Group]
    source: Tensor
    slots: Tensor


def route(top_k_index: Tensor, num_experts: int, neighbours: bool) -> Routing:
    """Sort (tokens, k) expert indices by expert, always in the same order, and put the experts into groups.

    With `neighbours`, the weights of a group are one slice of the layer's. Without, its experts are those whose numbers
    of tokens are closest, which leaves next to nothing to fill up.
    """
    tokens, k = top_k_index.shape
    by_expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    counts = torch.bincount(by_expert, minlength=num_experts)
    groups = list(_groups(counts.tolist(), neighbours))
    first_slot = torch.zeros(num_experts, dtype=torch.long)
    for experts, rows, slots in groups:
        first_slot[experts] = torch.arange(slots.start, slots.stop, rows)
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
        # A few rows are free: a product of 3 rows takes as long as one of 8.
        and max(rows) * len(rows) <= _MAX_PADDING * sum(rows) + 8
    )


class _TritonExperts(torch.autograd.Function):
    """The Triton kernels as one differentiable operation."""

    @staticmethod
    def forward(ctx, hidden_states, gate_up, down, top_k_index, top_k_weights):
        tensors = (hidden_states, gate_up, down, top_k_index, top_k_weights)
        output, saved = experts_forward(*tensors, for_backward=any(ctx.needs_input_grad))
        ctx.save_for_backward(*tensors, *saved)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        tensors, saved = ctx.saved_tensors[:5], Saved(*ctx.saved_tensors[5:])
        *needs, _, of_weights = ctx.needs_input_grad
        *grads, grad_weights = experts_backward(grad_output, saved, *tensors, needs=(*needs, of_weights))
        return *grads, None, grad_weights


def _has_triton_layout(self: nn.Module) -> bool:
    """SwiGLU experts as the kernels know them: gate above up, no bias, no norm, on this device all of them."""
    return (
        self.has_gate
        and type(self)._apply_gate is _default_apply_gate
        and isinstance(self.act_fn, nn.SiLU | type(ACT2FN["silu"]))
        and not self.has_bias
        and not self.is_transposed
        and not getattr(self, "has_post_expert_norm", False)
        and not getattr(self, "_is_expert_parallel", False)
    )


def _forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, dtype: torch.dtype
) -> Tensor:
    """In `dtype`, without gradients: converted weights and outputs go to buffers that are kept from call to call."""
    first, second = _projections(self)
    converts = first.dtype != dtype
    routing = route(top_k_index, self.num_experts, neighbours=not converts)
    inputs = hidden_states.to(dtype)
    outputs = _buffer(
        "outputs", (len(routing.source), hidden_states.shape[-1]), torch.promote_types(dtype, torch.float32)
    )
    with torch.autocast("cpu", enabled=False):
        for group in routing.groups:
            weights = [
                _converted(each, group.experts, dtype, name) if converts else each[_as_slice(group.experts)]
                for each, name in ((first, "first"), (second, "second"))
            ]
            _compute(self, inputs.index_select(0, routing.source[group.slots]), *weights, group, outputs[group.slots])
    result = torch.empty(hidden_states.shape, dtype=hidden_states.dtype)
    by_tokens = (each.split(_TOKENS_PER_SUM) for each in (result, routing.slots, top_k_weights))
    for some, slots, weights in zip(*by_tokens, strict=True):
        some.copy_(_weighted_sum(outputs, slots, weights))
    return result


def _forward_for_backward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The same for autograd: nothing is reused, and only what differs in dtype is converted."""
    dtype = _product_dtype(self, hidden_states)
    routing = route(top_k_index, self.num_experts, neighbours=True)
    inputs = hidden_states.to(dtype)
    # One split, since the gradient of a slice is as large as what it was cut from.
    sizes = _sizes([_as_slice(group.experts) for group in routing.groups], self.num_experts)
    weights = (each.split(sizes)[1::2] for each in _projections(self))
    outputs = [
        _compute(self, inputs.index_select(0, routing.source[group.slots]), first.to(dtype), second.to(dtype), group)
        for group, first, second in zip(routing.groups, *weights, strict=True)
    ]
    if not outputs:
        return torch.zeros_like(hidden_states)
    outputs = torch.cat(outputs)
    wide = torch.promote_types(outputs.dtype, torch.float32)
    return _weighted_sum(outputs.to(wide), routing.slots, top_k_weights).to(hidden_states.dtype)


def _compute(
    self: nn.Module, inputs: Tensor, first: Tensor, second: Tensor, group: Group, out: Tensor | None = None
) -> Tensor:
    """(slots, hidden) -> (slots, hidden) for the experts of one group, whose weights are (experts, out, in)."""
    hidden = torch.bmm(inputs.view(len(group.experts), group.rows, -1), first.transpose(1, 2))
    if self.has_bias:
        bias = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
        hidden = hidden + bias[group.experts].unsqueeze(1)
    hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
    # A bias may have widened it.
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
    """`sum_j weights[t, j] * outputs[slots[t, j]]`, in the order of j."""
    parts = outputs.index_select(0, slots.flatten()).view(*slots.shape, outputs.shape[-1])
    return (parts * weights.unsqueeze(-1)).sum(1)


def _projections(self: nn.Module) -> tuple[Tensor, Tensor]:
    """Both weights of every expert as (experts, out, in)."""
    first = self.gate_up_proj if self.has_gate else self.up_proj
    second = self.down_proj
    return (first.transpose(1, 2), second.transpose(1, 2)) if self.is_transposed else (first, second)


def _product_dtype(self: nn.Module, hidden_states: Tensor) -> torch.dtype:
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return torch.promote_types(hidden_states.dtype, self.down_proj.dtype)


def _suits_grouped_mm(self: nn.Module) -> bool:
    """Whether every row of the weights begins at a multiple of 16 bytes."""
    return all(size * each.element_size() % 16 == 0 for each in _projections(self) for size in each.shape[1:])


def _converted(weights: Tensor, experts: list[int], dtype: torch.dtype, name: str) -> Tensor:
    """The weights of some experts, (experts, out, in), in another dtype."""
    buffer = _buffer(name, (len(experts), *weights.shape[1:]), dtype)
    for place, expert in enumerate(experts):
        buffer[place].copy_(weights[expert])
    return buffer


def _as_slice(neighbours: list[int]) -> slice:
    return slice(neighbours[0], neighbours[-1] + 1)


def _sizes(slices: list[slice], total: int) -> list[int]:
    """Sizes of slices and of the gaps before, between and after them: gap, slice, gap, slice, ..., gap."""
    edges = [0, *(edge for each in slices for edge in (each.start, each.stop)), total]
    return [end - start for start, end in itertools.pairwise(edges)]


_buffers = local()


def _buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory that this thread gets again when it asks again: fresh memory costs a page fault a page."""
    size = torch.Size(shape).numel()
    key = f"{name}_{dtype}"
    buffer = getattr(_buffers, key, None)
    if buffer is None or buffer.numel() < size:
        # Not an inference tensor, which only inference mode could write to again.
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=dtype)
        setattr(_buffers, key, buffer)
    return buffer[:size].view(shape)
