"""Mixture-of-experts layers as transformers stores them, forward and backward, in Triton kernels for CUDA.

An assignment is a (token, choice) pair of the router, numbered `token * k + choice`; whatever is computed per
assignment is stored in that order. Assignments are sorted by expert, each expert's group padded to whole tiles, so that
every tile of a grouped matrix product has one expert (the idea of vLLM's `moe_align_block_size`). Rows are gathered as
they are read and scattered as they are written: hidden states are never copied per expert. The gradient of the router's
weights is taken from the activations (as in SonicMoE, arXiv 2512.14080), which avoids storing the experts' outputs.

Nothing waits for the device, and nothing is summed by atomics: equal inputs give equal bits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:
    triton = tl = None

    def jit(function):
        """Leave the kernels below as plain functions, which are never called."""
        return function


# Number of consecutive row tiles that share a tile of the weights, which then comes from the L2 cache.
GROUP = 8
# Number of assignments that a routing program reads at once.
ROUTING_BLOCK = 4096
# Maximum number of columns that an elementwise program computes at once.
ROW_BLOCK = 1024
# Bytes of shared memory for one program.
H100_SHARED_MEMORY = 227 * 1024


class Blocks(NamedTuple):
    """Tile of a matrix product, and how a program computes it.

    Args:
        m: Rows of the tile.
        n: Accumulators per row.
        k: Depth of a step.
        warps: Warps of the program.
        stages: Stages of its software pipeline.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int


class Saved(NamedTuple):
    """What `experts_backward` needs of the forward pass; tensors only, as `save_for_backward` takes them.

    Args:
        slots: Assignments in sorted, padded order, -1 for padding; int32.
        starts: First slot of each expert's group, then the end of the last group, shape (E + 1,), int32.
        tile_experts: Expert of each tile of slots, int32; undefined past the last group.
        pre_activations: Gate and up of each assignment, shape (T * k, 2I); None after a forward pass for inference.
    """

    slots: torch.Tensor
    starts: torch.Tensor
    tile_experts: torch.Tensor
    pre_activations: torch.Tensor | None = None


def is_available(device: torch.device) -> bool:
    """Whether the kernels run on a device: Triton is installed, and supports the GPU or interprets the kernels."""
    if triton is None:
        return False
    if not isinstance(_combine, triton.JITFunction):
        return True
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def choose_blocks(rows_per_expert: float, dtype: torch.dtype, shared_memory: int = H100_SHARED_MEMORY) -> Blocks:
    """Choose the tiles of a matrix product.

    With few rows, reading the weights is the bottleneck, and small tiles waste little on padding. With many rows,
    arithmetic is, and the tile fills the registers of an H100. In float32, without tensor cores, tiles stay small.

    Args:
        rows_per_expert: Mean number of rows per expert.
        dtype: Data type of the factors.
        shared_memory: Bytes of shared memory for one program.

    Example:
        ```python
        >>> choose_blocks(500.0, torch.bfloat16)
        Blocks(m=128, n=256, k=64, warps=8, stages=4)
        ```
    """
    m = next((size for size in (16, 32, 64) if rows_per_expert <= size), 128)
    if dtype == torch.float32:
        m, n, k, warps = min(m, 64), 64, 32, 4
    else:
        n, k, warps = (256, 64, 8) if m == 128 else (128, 64, 4)
    stages = shared_memory // ((m + n) * k * dtype.itemsize)
    return Blocks(m, n, k, warps, max(1, min(4, stages)))


@jit
def _count(index, counts, length, BLOCK: tl.constexpr):
    """Count the assignments of an expert, one expert per program."""
    expert = tl.program_id(0)
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(0, length, BLOCK):
        assignments = first + tl.arange(0, BLOCK)
        count += (tl.load(index + assignments, mask=assignments < length, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(count, 0))


@jit
def _place(
    index, counts, slots, starts, tile_experts, length,
    EXPERTS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write bounds, tiles and assignments of an expert's group, in order, one expert per program."""
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_EXPERTS)
    tiles = tl.cdiv(tl.load(counts + experts, mask=experts < EXPERTS, other=0), BLOCK_M)
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0), 0)
    end_tile = tl.sum(tl.where(experts <= expert, tiles, 0), 0)
    tl.store(starts + expert, first_tile * BLOCK_M)
    tl.store(starts + EXPERTS, end_tile * BLOCK_M, mask=expert == EXPERTS - 1)
    for first in range(first_tile, end_tile, BLOCK_EXPERTS):
        tl.store(tile_experts + first + experts, expert, mask=first + experts < end_tile)
    end = first_tile * BLOCK_M
    for first in range(0, length, BLOCK):
        assignments = first + tl.arange(0, BLOCK)
        is_chosen = tl.load(index + assignments, mask=assignments < length, other=-1) == expert
        count = tl.cumsum(is_chosen.to(tl.int32), 0)
        tl.store(slots + end + count - 1, assignments, mask=is_chosen)
        end += tl.sum(is_chosen.to(tl.int32), 0)


@jit
def _tile(
    row_tiles, column_tiles, slots, tile_experts, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
):
    """Return the expert, assignments and columns of a program; in 64 bits where multiplied by the length of a row."""
    pid = tl.program_id(0)
    row, column = tl.swizzle2d(pid // column_tiles, pid % column_tiles, row_tiles, column_tiles, GROUP)
    rows = tl.load(slots + row * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    return tl.load(tile_experts + row).to(tl.int64), rows, column * BLOCK_N + tl.arange(0, BLOCK_N)


@jit
def _swiglu(
    x, gate_up, activations, pre_activations, slots, starts, tile_experts, EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, CHOICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """activations[row] = silu(x[token] @ gate^T) * (x[token] @ up^T); also writes both products if asked to."""
    row_tiles, column_tiles = tl.load(starts + EXPERTS) // BLOCK_M, tl.cdiv(INNER, BLOCK_N)
    if tl.program_id(0) >= row_tiles * column_tiles:
        return
    expert, rows, columns = _tile(row_tiles, column_tiles, slots, tile_experts, BLOCK_M, BLOCK_N, GROUP)
    row_mask, column_mask, ks = rows >= 0, columns < INNER, tl.arange(0, BLOCK_K)
    left = x + (rows // CHOICES)[:, None] * HIDDEN + ks[None, :]
    right = gate_up + expert * (2 * INNER * HIDDEN) + columns[None, :] * HIDDEN + ks[:, None]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, HIDDEN, BLOCK_K):
        inside = ks < HIDDEN - first
        mask = inside[:, None] & column_mask[None, :]
        block = tl.load(left, mask=row_mask[:, None] & inside[None, :], other=0.0)
        gate = tl.dot(block, tl.load(right, mask=mask, other=0.0), gate, input_precision="ieee")
        up = tl.dot(block, tl.load(right + INNER * HIDDEN, mask=mask, other=0.0), up, input_precision="ieee")
        left += BLOCK_K
        right += BLOCK_K
    mask = row_mask[:, None] & column_mask[None, :]
    kind = activations.dtype.element_ty
    tl.store(activations + rows[:, None] * INNER + columns[None, :], (gate * tl.sigmoid(gate) * up).to(kind), mask=mask)
    if pre_activations is not None:
        target = pre_activations + rows[:, None] * (2 * INNER) + columns[None, :]
        tl.store(target, gate.to(kind), mask=mask)
        tl.store(target + INNER, up.to(kind), mask=mask)


@jit
def _swiglu_backward(
    grad, pre_activations, weights, grad_pre, weighted, grad_weights, INNER: tl.constexpr, BLOCK: tl.constexpr
):
    """Backward pass of SwiGLU for one assignment: gradients of its pre-activations and of its router weight.

    `grad` is the gradient of the activations, not yet multiplied by the router weight.
    """
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, INNER, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < INNER
        gate = tl.load(pre_activations + row * (2 * INNER) + columns, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(pre_activations + row * (2 * INNER) + INNER + columns, mask=mask, other=0.0).to(tl.float32)
        part = tl.load(grad + row * INNER + columns, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += part * silu * up
        part *= weight
        if grad_pre is not None:
            kind = grad_pre.dtype.element_ty
            target = grad_pre + row * (2 * INNER) + columns
            tl.store(target, (part * up * (sigmoid + silu * (1 - sigmoid))).to(kind), mask=mask)
            tl.store(target + INNER, (part * silu).to(kind), mask=mask)
        if weighted is not None:
            target = weighted + row * INNER + columns
            tl.store(target, (weight * silu * up).to(weighted.dtype.element_ty), mask=mask)
    if grad_weights is not None:
        tl.store(grad_weights + row, tl.sum(total, 0).to(grad_weights.dtype.element_ty))


@jit
def _matmul(
    a, b, out, slots, starts, tile_experts, EXPERTS: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    A_CHOICES: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[row] = a[row // A_CHOICES] @ b[expert], where b is (E, K, N) of these strides."""
    row_tiles, column_tiles = tl.load(starts + EXPERTS) // BLOCK_M, tl.cdiv(N, BLOCK_N)
    if tl.program_id(0) >= row_tiles * column_tiles:
        return
    expert, rows, columns = _tile(row_tiles, column_tiles, slots, tile_experts, BLOCK_M, BLOCK_N, GROUP)
    row_mask, column_mask, ks = rows >= 0, columns < N, tl.arange(0, BLOCK_K)
    left = a + (rows // A_CHOICES)[:, None] * K + ks[None, :]
    right = b + expert * (K * N) + columns[None, :] * STRIDE_N + ks[:, None] * STRIDE_K
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        inside = ks < K - first
        block = tl.load(left, mask=row_mask[:, None] & inside[None, :], other=0.0)
        weight = tl.load(right, mask=inside[:, None] & column_mask[None, :], other=0.0)
        total = tl.dot(block, weight, total, input_precision="ieee")
        left += BLOCK_K
        right += BLOCK_K * STRIDE_K
    target = out + rows[:, None] * N + columns[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@jit
def _outer(
    a, b, out, slots, starts, M: tl.constexpr, N: tl.constexpr, A_CHOICES: tl.constexpr, B_CHOICES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[expert] = a^T @ b over the expert's assignments."""
    row_tiles, column_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    expert, pid = tl.program_id(0) // (row_tiles * column_tiles), tl.program_id(0) % (row_tiles * column_tiles)
    row, column = tl.swizzle2d(pid // column_tiles, pid % column_tiles, row_tiles, column_tiles, GROUP)
    ms, ns = row * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(starts + expert + 1)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(tl.load(starts + expert), end, BLOCK_K):
        indices = first + tl.arange(0, BLOCK_K)
        rows = tl.load(slots + indices, mask=indices < end, other=-1).to(tl.int64)[:, None]
        left = tl.load(a + rows // A_CHOICES * M + ms[None, :], mask=(rows >= 0) & (ms < M)[None, :], other=0.0)
        right = tl.load(b + rows // B_CHOICES * N + ns[None, :], mask=(rows >= 0) & (ns < N)[None, :], other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    target = out + expert.to(tl.int64) * (M * N) + ms[:, None] * N + ns[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(ms < M)[:, None] & (ns < N)[None, :])


@jit
def _combine(rows, weights, out, HIDDEN: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """out[token] = sum of the token's rows, weighted if there are weights, in float32 and in the choices' order."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(CHOICES):
        row = token * CHOICES + choice
        part = tl.load(rows + row * HIDDEN + columns, mask=columns < HIDDEN, other=0.0).to(tl.float32)
        if weights is not None:
            part *= tl.load(weights + row).to(tl.float32)
        total += part
    tl.store(out + token * HIDDEN + columns, total.to(out.dtype.element_ty), mask=columns < HIDDEN)


def sort_by_expert(top_k_index: torch.Tensor, num_experts: int, block_m: int) -> Saved:
    """Sort assignments by expert, stably, each expert's group padded to a multiple of `block_m` slots.

    Args:
        top_k_index: Experts of each token, shape (T, k), integers in [0, E).
        num_experts: E.
        block_m: Rows of a tile.

    Returns:
        `Saved` without pre-activations; with slots for the worst routing, so that the host need not wait for a count.
    """
    index, length = top_k_index.contiguous(), top_k_index.numel()
    tiles = triton.cdiv(length + num_experts * (block_m - 1), block_m)
    slots = index.new_full((tiles * block_m,), -1, dtype=torch.int32)
    counts, starts, tile_experts = (
        index.new_empty(size, dtype=torch.int32) for size in (num_experts, num_experts + 1, tiles)
    )
    with torch.cuda.device_of(index):
        _count[(num_experts,)](index, counts, length, BLOCK=ROUTING_BLOCK, num_warps=8)
        _place[(num_experts,)](
            index, counts, slots, starts, tile_experts, length, EXPERTS=num_experts,
            BLOCK_EXPERTS=triton.next_power_of_2(num_experts), BLOCK_M=block_m, BLOCK=ROUTING_BLOCK, num_warps=8,
        )  # fmt: skip
    return Saved(slots, starts, tile_experts)


def experts_forward(
    hidden_states: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    for_backward: bool = False,
) -> tuple[torch.Tensor, Saved]:
    """Compute the weighted sum of the experts of each token, `down(silu(gate(x)) * up(x))` each.

    Args:
        hidden_states: Inputs, shape (T, H); float32, float16 or bfloat16.
        gate_up: Gate rows, then up rows, of each expert, shape (E, 2I, H), in the same dtype.
        down: Down weights of each expert, shape (E, H, I), in the same dtype.
        top_k_index: Experts of each token, shape (T, k), integers in [0, E); this is not checked.
        top_k_weights: Their weights, shape (T, k), any floating dtype; computed with in float32.
        for_backward: Whether to save the pre-activations for `experts_backward`.

    Returns:
        The output, shape (T, H), in the dtype of `hidden_states`; and the tensors that `experts_backward` needs.

    Raises:
        ValueError: if shapes or dtypes do not match.

    Example:
        ```python
        >>> output, _ = experts_forward(hidden_states, gate_up, down, top_k_index, top_k_weights)
        >>> output.shape == hidden_states.shape
        True
        ```
    """
    x, gate_up, down, weights = _checked(hidden_states, gate_up, down, top_k_index, top_k_weights)
    (num_experts, hidden, inner), (tokens, choices) = down.shape, top_k_index.shape
    blocks = _blocks(x, tokens * choices / num_experts)
    saved = sort_by_expert(top_k_index, num_experts, blocks.m)
    activations = x.new_empty(tokens * choices, inner)
    if for_backward:
        saved = saved._replace(pre_activations=x.new_empty(tokens * choices, 2 * inner))
    with torch.cuda.device_of(x):
        _launch(
            _swiglu, len(saved.tile_experts), inner, blocks._replace(n=blocks.n // 2),
            x, gate_up, activations, saved.pre_activations, *saved[:3],
            EXPERTS=num_experts, HIDDEN=hidden, INNER=inner, CHOICES=choices,
        )  # fmt: skip
        return _sum_choices(_grouped_matmul(activations, 1, down.mT, saved, blocks), weights, choices), saved


def experts_backward(
    grad_output: torch.Tensor,
    saved: Saved,
    hidden_states: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, True),
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Compute the gradients of `experts_forward`.

    Args:
        grad_output: Gradient of the output, shape (T, H).
        saved: Tensors that the forward pass returned; `Saved(*tensors)` if they were unpacked.
        hidden_states: Inputs as in `experts_forward`, shape (T, H).
        gate_up: Gate and up weights as in `experts_forward`, shape (E, 2I, H).
        down: Down weights as in `experts_forward`, shape (E, H, I).
        top_k_index: Experts of each token, shape (T, k).
        top_k_weights: Their weights, shape (T, k).
        needs: Flags of the four gradients, in the order in which they are returned: False skips one.

    Returns:
        Gradients of hidden_states, gate_up, down and top_k_weights, in their shapes and dtypes; None if not needed.
        Experts without tokens get zeros.

    Raises:
        ValueError: if shapes or dtypes do not match, or the forward pass was not `for_backward`.
    """
    x, gate_up, down, weights = _checked(hidden_states, gate_up, down, top_k_index, top_k_weights)
    if saved.pre_activations is None:
        raise ValueError("The forward pass saved nothing for a backward pass: call it with for_backward=True.")
    if not any(needs):
        return None, None, None, None
    grad_output = grad_output.to(x.dtype).contiguous()
    (num_experts, _, inner), (tokens, choices) = down.shape, top_k_index.shape
    blocks = _blocks(x, tokens * choices / num_experts)
    grad_pre = torch.empty_like(saved.pre_activations) if needs[0] or needs[1] else None
    grad_weights = torch.empty_like(weights) if needs[3] else None
    with torch.cuda.device_of(x):
        # Not yet multiplied by the router's weights: a factor per row, which is applied in float32 later.
        grad = _grouped_matmul(grad_output, choices, down, saved, blocks)
        weighted = torch.empty_like(grad) if needs[2] else None
        _swiglu_backward[(tokens * choices,)](
            grad, saved.pre_activations, weights, grad_pre, weighted, grad_weights,
            INNER=inner, BLOCK=_row_block(inner),
        )  # fmt: skip
        grad_hidden = grad_gate_up = grad_down = None
        if needs[0] and grad_pre is not None:
            grad_hidden = _sum_choices(_grouped_matmul(grad_pre, 1, gate_up, saved, blocks), None, choices)
        if needs[1] and grad_pre is not None:
            grad_gate_up = _grouped_outer(grad_pre, 1, x, choices, saved)
        if weighted is not None:
            grad_down = _grouped_outer(grad_output, choices, weighted, 1, saved)
    return grad_hidden, grad_gate_up, grad_down, grad_weights


def _checked(
    hidden_states: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    tensors = (hidden_states, gate_up, down, top_k_index, top_k_weights)
    if not (
        down.ndim == 3
        and top_k_index.ndim == 2
        and top_k_weights.shape == top_k_index.shape
        and gate_up.shape == (len(down), 2 * down.shape[2], down.shape[1])
        and hidden_states.shape == (len(top_k_index), down.shape[1])
    ):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(f"The shapes are {shapes}: give (T, H), (E, 2I, H), (E, H, I), (T, k) and (T, k).")
    dtypes = [tensor.dtype for tensor in tensors[:3]]
    if len(set(dtypes)) > 1 or dtypes[0] not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"The dtypes are {dtypes}: give one of float32, float16 and bfloat16.")
    return tuple(tensor.contiguous() for tensor in (hidden_states, gate_up, down, top_k_weights))


def _blocks(x: torch.Tensor, rows_per_expert: float) -> Blocks:
    if x.device.type != "cuda":
        return choose_blocks(rows_per_expert, x.dtype)
    properties = torch.cuda.get_device_properties(x.device)
    # AMD GPUs lack this property, and have 64 KiB.
    return choose_blocks(rows_per_expert, x.dtype, getattr(properties, "shared_memory_per_block_optin", 64 * 1024))


def _launch(kernel: Any, row_tiles: int, columns: int, blocks: Blocks, *arguments: Any, **constants: int) -> None:
    kernel[(row_tiles * triton.cdiv(columns, blocks.n),)](
        *arguments, **constants, BLOCK_M=blocks.m, BLOCK_N=blocks.n, BLOCK_K=blocks.k, GROUP=GROUP,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip


def _row_block(columns: int) -> int:
    return min(ROW_BLOCK, triton.next_power_of_2(columns))


def _grouped_matmul(a: torch.Tensor, a_choices: int, b: torch.Tensor, saved: Saved, blocks: Blocks) -> torch.Tensor:
    """Multiply rows (T * k, K), or (T, K) if `a_choices` is k, by the matrices (E, K, N) of their experts."""
    num_experts, depth, columns = b.shape
    out = a.new_empty(len(a) * a_choices, columns)
    _launch(
        _matmul, len(saved.tile_experts), columns, blocks, a, b, out, *saved[:3],
        EXPERTS=num_experts, N=columns, K=depth, A_CHOICES=a_choices, STRIDE_N=b.stride(2), STRIDE_K=b.stride(1),
    )  # fmt: skip
    return out


def _grouped_outer(a: torch.Tensor, a_choices: int, b: torch.Tensor, b_choices: int, saved: Saved) -> torch.Tensor:
    """a^T @ b over the assignments of each expert; rows belong to assignments, or to tokens if choices are k."""
    num_experts, rows, columns = len(saved.starts) - 1, a.shape[1], b.shape[1]
    blocks = _blocks(a, math.inf)
    # Assignments are loaded a stage ahead of their rows, so each further buffer of rows takes two more stages.
    blocks = blocks._replace(stages=2 * blocks.stages - 1)
    out = a.new_empty(num_experts, rows, columns)
    _launch(
        _outer, num_experts * triton.cdiv(rows, blocks.m), columns, blocks, a, b, out, saved.slots, saved.starts,
        M=rows, N=columns, A_CHOICES=a_choices, B_CHOICES=b_choices,
    )  # fmt: skip
    return out


def _sum_choices(rows: torch.Tensor, weights: torch.Tensor | None, choices: int) -> torch.Tensor:
    """Sum the rows of the assignments, (T * k, H), weighted or not, to (T, H)."""
    tokens, hidden = len(rows) // choices, rows.shape[1]
    block = _row_block(hidden)
    out = rows.new_empty(tokens, hidden)
    _combine[(tokens, triton.cdiv(hidden, block))](rows, weights, out, HIDDEN=hidden, CHOICES=choices, BLOCK=block)
    return out
