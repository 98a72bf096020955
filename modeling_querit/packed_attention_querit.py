"""Attention within the segments of a pack, for every decoder that uses transformers' attention interface.

A decoder of transformers hands the keyword arguments of its forward pass through its layers to the attention function
that its config names. So a packed forward pass is one keyword, `packed_forward=PackedForward(...)`, which
`accept_packed_forward` teaches that function to take. It also reaches layers that gradient checkpointing recomputes.

transformers has one table of attention functions, while this file exists once in the package and once beside every
checkpoint that was loaded. So the function in the table only calls the `attend` of what it is given, whichever copy of
this file that comes from.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .packing_querit import Pack, Segment

# Queries in one product on a CPU: with fewer, products get small; with more, more masked positions are computed.
_QUERIES = 128
# On a GPU, a segment is padded to a longer one if it has at least this share of its length.
_SIMILAR_LENGTH = 0.8

# Shape of the mask that goes with a packed forward pass. Models hand on masks of four dimensions as they are, so they
# build none of their own; `attend` does not look at it.
PLACEHOLDER_MASK_SHAPE = (1, 1, 0, 0)

# Prefix KV cache: keys and values of a shared prefix, (1, heads, tokens, head size) each, by index of the attention.
KeyValueStates = dict[int, tuple[Tensor, Tensor]]


class PackingError(Exception):
    """Raised for a backbone that packs cannot go through: soft caps, sinks, position biases, masks of its own."""

    def __init__(self, reason: str):
        super().__init__(f"Pairs cannot be packed for this model, which has {reason}: give padded batches.")


class PackedForward:
    """One forward pass of a pack: the layout for the attention of every layer, and the states that it keeps.

    Args:
        pack: The pack.
        carried: Prefix KV cache of the previous pack, from the `carry_over` of its forward pass.
        implementation: Name of the attention implementation that the model is set to.
        pruned_layer: Index of the layer in which only scored positions are computed; None computes all everywhere.
        is_causal: Whether tokens attend to no later ones, as the backbone's config says.

    Attributes:
        carry_over: Prefix KV cache for the next pack.
    """

    def __init__(
        self,
        pack: Pack,
        carried: KeyValueStates,
        implementation: str,
        pruned_layer: int | None = None,
        is_causal: bool = True,
    ):
        self.pack = pack
        self.carried = carried
        self.carry_over: KeyValueStates = {}
        self.implementation = implementation
        self.pruned_layer = pruned_layer
        self.is_causal = is_causal
        # Attention modules, with their indices in the order in which they are called.
        self.attention_modules: dict[nn.Module, int] = {}
        self._is_finished = False
        self._cache: dict[tuple[Any, ...], Any] = {}

    def finish(self, num_layers: int) -> None:
        """End the forward pass; from here on, layers are recomputed only by a backward pass.

        Raises:
            PackingError: if fewer than `num_layers` modules asked for this attention.
        """
        if len(self.attention_modules) < num_layers:
            raise PackingError("layers that do not use transformers' attention interface")
        self._is_finished = True

    def cached(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, computed once: all layers need the same masks and indices."""
        key = (function, *args)
        if key not in self._cache:
            self._cache[key] = function(*args)
        return self._cache[key]

    def scored_positions(self, device: torch.device) -> Tensor:
        """Return the positions of the pack that are scored, (pairs,)."""
        return self.cached(_to_tensor, tuple(self.pack.scored_positions), device)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend within each segment, in place of the implementation that the model is set to.

        Args:
            module: The attention module.
            query: (1, heads, tokens, head size).
            key: (1, key heads, tokens, head size); a key head may serve several heads.
            value: (1, key heads, tokens, value size).
            scaling: Factor of the products of queries and keys; head size ** -0.5 by default.
            sliding_window: Number of tokens that a token attends to in each direction, itself included; None for all.
            **kwargs: Further arguments of the attention interface, which are checked.

        Returns:
            (1, tokens, heads, value size), and None in place of the attention weights.

        Raises:
            PackingError: if the module asks for something that is not computed here.
        """
        if not self._is_finished:
            self._check(module, sliding_window, kwargs)
            self.attention_modules[module] = len(self.attention_modules)
        index = self.attention_modules[module]
        key, value = self._with_carried(index, key, value)
        if index == self.pruned_layer:
            return _attend_scored_positions(self, query, key, value, scaling, sliding_window), None
        if "flash" in self.implementation:
            return _attend_flash(self, query, key, value, scaling, sliding_window), None
        if query.device.type == "cpu":
            return _attend_by_segment(self, query, key, value, scaling, sliding_window), None
        return _attend_by_length(self, query, key, value, scaling, sliding_window), None

    def _check(self, module: nn.Module, window: int | None, kwargs: dict[str, Any]) -> None:
        """Raise if attention is more than a softmax over a segment, or over a window in it."""
        for name in ("softcap", "s_aux", "position_bias"):
            if kwargs.get(name) is not None:
                raise PackingError(f"attention with {name}")
        if kwargs.get("dropout"):
            raise PackingError("dropout in its attention")
        is_causal = kwargs.get("is_causal")
        if (getattr(module, "is_causal", True) if is_causal is None else is_causal) != self.is_causal:
            raise PackingError("layers whose attention direction differs from the others' or from the config")
        config = getattr(module, "config", None)
        if window is None and getattr(config, "sliding_window", None) and not getattr(config, "layer_types", None):
            raise PackingError("a sliding window that is only in its mask")
        if module in self.attention_modules:
            raise PackingError("several attentions in one module")

    def _with_carried(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.pack.carried_length:
            carried_key, carried_value = self.carried[index]
            key, value = torch.cat((carried_key, key), 2), torch.cat((carried_value, value), 2)
        kept = self.pack.carry_over
        if kept.stop and not self._is_finished:
            # Copies: a view would keep the states of the whole pack in memory.
            self.carry_over[index] = key[:, :, kept].clone(), value[:, :, kept].clone()
        return key, value


def accept_packed_forward(implementation: str) -> None:
    """Teach a registered attention implementation the keyword `packed_forward`; without it, nothing changes.

    Args:
        implementation: Name of the implementation (`sdpa`, `flash_attention_2`, ...).

    Raises:
        PackingError: if it is not registered: `eager`, which every model has in its own file.
    """
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if function is None:
        raise PackingError(f"{implementation} attention")
    # Another copy of this file, beside another checkpoint, may have been here before.
    if getattr(function, "accepts_packed_forward", False):
        return
    accepting = _accepting_packed_forward(function)
    AttentionInterface.register(implementation, accepting)
    if ALL_ATTENTION_FUNCTIONS[implementation] is function:
        # It was set for transformers' models alone, by `ALL_ATTENTION_FUNCTIONS[name] = function`.
        ALL_ATTENTION_FUNCTIONS[implementation] = accepting


def _accepting_packed_forward(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        packed_forward: PackedForward | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if packed_forward is not None and not args:
            return packed_forward.attend(module, query, key, value, **kwargs)
        if isinstance(attention_mask, Tensor) and attention_mask.shape == PLACEHOLDER_MASK_SHAPE:
            raise NotImplementedError("The model does not hand the keyword packed_forward to its attention function.")
        return function(module, query, key, value, attention_mask, *args, **kwargs)

    attention.accepts_packed_forward = True  # type: ignore[attr-defined]
    return attention


# --- On a CPU: segment by segment, since a loop costs little there and padding much ---------------------------------


def _attend_by_segment(
    packed_forward: PackedForward, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """(1, heads, tokens, size) each -> (1, tokens, heads, value size); long segments in pieces of `_QUERIES`."""
    pack = packed_forward.pack
    mask = packed_forward.cached(_relative_mask, pack, window, packed_forward.is_causal, query.dtype)
    outputs = []
    # Split and concatenated, not sliced and written: the backward pass of a slice is as large as the whole tensor.
    segment_queries = query.split([segment.length for segment in pack.segments], 2)
    segment_keys, segment_values = _by_segment(pack, key), _by_segment(pack, value)
    for segment, queries, keys, values in zip(
        pack.segments, segment_queries, segment_keys, segment_values, strict=True
    ):
        first = segment.prefix_length
        for chunk in queries.split(_QUERIES, 2):  # (1, heads, chunk, size)
            end = first + chunk.shape[2]
            attended = end if packed_forward.is_causal else keys.shape[2]
            chunk_mask = None if mask is None else mask.cut(first, chunk.shape[2], attended)
            outputs.append(_attend_chunk(chunk, keys[:, :, :attended], values[:, :, :attended], chunk_mask, scaling))
            first = end
    return torch.cat([output.transpose(1, 2) for output in outputs], 1)


def _attend_chunk(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    if key.shape[3] == value.shape[3] or query.shape[1] != key.shape[1]:
        has_groups = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=has_groups)
    # Values narrower than keys (MLA) have no kernel on CPUs, and torch's way around that is slower than this.
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    bias = query.new_zeros(()) if mask is None else mask
    weights = torch.baddbmm(
        bias.expand(query.shape[1], query.shape[2], key.shape[2]), query[0], key[0].transpose(1, 2), alpha=scale
    )
    return torch.bmm(weights.softmax(-1), value[0]).unsqueeze(0)


def _by_segment(pack: Pack, states: Tensor) -> Iterator[Tensor]:
    """Yield keys or values of each segment, those of its prefix first: (1, heads, prefix + length, size)."""
    lengths = [segment.length for segment in pack.segments]
    carried, *segments = states.split([pack.carried_length, *lengths], 2)
    starts = [0, *itertools.accumulate(lengths, initial=pack.carried_length)]
    starting_at = dict(zip(starts, [carried, *segments], strict=False))
    for segment, own in zip(pack.segments, segments, strict=True):
        yield torch.cat((starting_at[segment.prefix.start], own), 2) if segment.prefix_length else own


class _RelativeMask(NamedTuple):
    """Additive mask of queries at positions from `offset` on, (queries, keys); serves queries from any position on."""

    mask: Tensor
    offset: int

    def cut(self, first: int, queries: int, keys: int) -> Tensor:
        """(queries, keys) for queries at positions from `first` on and keys at positions from 0 on."""
        start = self.offset - first
        return self.mask[:queries, start : start + keys]


def _relative_mask(pack: Pack, window: int | None, is_causal: bool, dtype: torch.dtype) -> _RelativeMask | None:
    """Make the mask for all segments of a pack; None where nothing is masked."""
    if window is None and not is_causal:
        return None
    longest = max(segment.prefix_length + segment.length for segment in pack.segments)
    positions = torch.arange(longest, longest + _QUERIES).unsqueeze(1)
    keys = torch.arange(longest + (_QUERIES if is_causal else longest))
    blocked = _blocked(positions, keys, window, is_causal)
    return _RelativeMask(torch.zeros(blocked.shape, dtype=dtype).masked_fill(blocked, torch.finfo(dtype).min), longest)


def _blocked(positions: Tensor, keys: Tensor, window: int | None, is_causal: bool) -> Tensor:
    """Whether a query at a position must not attend to a key at another."""
    if window is None:
        return keys > positions if is_causal else torch.zeros_like(keys > positions)
    is_too_early = keys <= positions - window
    return is_too_early | (keys > positions if is_causal else keys >= positions + window)


# --- In the pruned layer: the scored positions alone ----------------------------------------------------------------


def _attend_scored_positions(
    packed_forward: PackedForward, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """Attend from the last token of each pair, (1, tokens, heads, value size); zero elsewhere.

    The last token has none after it, so both kinds of attention are the same here.
    """
    pack, positions = packed_forward.pack, packed_forward.scored_positions(query.device)
    queries, outputs = iter(query[:, :, positions].split(1, 2)), []
    attended = slice(-window, None) if window else slice(None)
    for segment, keys, values in zip(pack.segments, _by_segment(pack, key), _by_segment(pack, value), strict=True):
        if segment.is_scored:
            output = scaled_dot_product_attention(
                next(queries),
                keys[:, :, attended],
                values[:, :, attended],
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            outputs.append(output.transpose(1, 2))
    result = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
    return result.index_copy(1, positions, torch.cat(outputs, 1)) if outputs else result


# --- On a GPU: segments of similar length together, since calls cost more there than a little padding ----------------


class _PaddedSegments(NamedTuple):
    """Segments of similar length, padded.

    Args:
        positions: Position of each query in the pack, (segments, queries).
        is_token: Whether a query is a token, not padding, (segments, queries).
        keys: Index of each key among the pack's keys, (segments, keys).
        may_attend: Mask, True where a query attends to a key, (segments, 1, queries, keys).
    """

    positions: Tensor
    is_token: Tensor
    keys: Tensor
    may_attend: Tensor


def _attend_by_length(
    packed_forward: PackedForward, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """(1, heads, tokens, size) each -> (1, tokens, heads, value size)."""
    output = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    has_groups = query.shape[1] != key.shape[1]
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # (tokens, heads, size)
    for batch in packed_forward.cached(
        _padded_batches, packed_forward.pack, window, packed_forward.is_causal, query.device
    ):
        attended = scaled_dot_product_attention(
            query[batch.positions].transpose(1, 2),  # (segments, heads, queries, size)
            key[batch.keys].transpose(1, 2),
            value[batch.keys].transpose(1, 2),
            attn_mask=batch.may_attend,
            scale=scaling,
            enable_gqa=has_groups,
        )
        output[batch.positions[batch.is_token]] = attended.transpose(1, 2)[batch.is_token]
    return output.unsqueeze(0)


def _padded_batches(pack: Pack, window: int | None, is_causal: bool, device: torch.device) -> list[_PaddedSegments]:
    segments = sorted(pack.segments, key=lambda segment: -segment.length)
    batches = []
    while segments:
        size = sum(segment.length >= _SIMILAR_LENGTH * segments[0].length for segment in segments)
        batches.append(_pad(segments[:size], pack.carried_length, window, is_causal, device))
        segments = segments[size:]
    return batches


def _pad(
    segments: list[Segment], carried_length: int, window: int | None, is_causal: bool, device: torch.device
) -> _PaddedSegments:
    lengths = torch.tensor([segment.length for segment in segments]).unsqueeze(1)  # (segments, 1), as the next three
    prefixes = torch.tensor([segment.prefix_length for segment in segments]).unsqueeze(1)
    starts = torch.tensor([segment.positions.start for segment in segments]).unsqueeze(1)
    prefix_starts = torch.tensor([segment.prefix.start for segment in segments]).unsqueeze(1)
    queries, keys = torch.arange(int(lengths.max())), torch.arange(int((prefixes + lengths).max()))
    is_token = queries < lengths
    in_pack = torch.where(is_token, starts + queries, starts)
    own = (starts + carried_length + keys - prefixes).clamp(max=starts + carried_length + lengths - 1)
    key_indices = torch.where(keys < prefixes, prefix_starts + keys, own)
    # Padding attends to what the last token attends to, so that no row of a softmax is empty.
    positions = prefixes + torch.minimum(queries, lengths - 1)
    is_key = (keys < prefixes + lengths).unsqueeze(1)
    may_attend = is_key & ~_blocked(positions.unsqueeze(-1), keys, window, is_causal)
    return _PaddedSegments(*(part.to(device) for part in (in_pack, is_token, key_indices, may_attend.unsqueeze(1))))


# --- With flash attention: all segments in one call for variable lengths ----------------------------------------------


def _attend_flash(
    packed_forward: PackedForward, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """(1, heads, tokens, size) each -> (1, tokens, heads, value size), by the implementation the model is set to."""
    keys, query_ends, key_ends, longest = packed_forward.cached(_flash_layout, packed_forward.pack, query.device)
    value_size = value.shape[3]
    value = nn.functional.pad(value, (0, query.shape[3] - value_size))
    output = _flash_attention_forward(
        query.transpose(1, 2),
        key[:, :, keys].transpose(1, 2),
        value[:, :, keys].transpose(1, 2),
        None,
        query_length=query.shape[2],
        is_causal=packed_forward.is_causal,
        softmax_scale=scaling,
        sliding_window=window,
        attn_implementation=packed_forward.implementation,
        cu_seq_lens_q=query_ends,
        cu_seq_lens_k=key_ends,
        max_length_q=longest[0],
        max_length_k=longest[1],
    )
    return output[..., :value_size]


def _flash_layout(pack: Pack, device: torch.device) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Return indices of all segments' keys end to end, where a segment's queries and keys end, and the most of both."""
    keys: list[int] = []
    query_counts, key_counts = [0], [0]
    for segment in pack.segments:
        keys.extend(range(segment.prefix.start, segment.prefix.stop))
        keys.extend(range(segment.positions.start + pack.carried_length, segment.positions.stop + pack.carried_length))
        query_counts.append(segment.length)
        key_counts.append(segment.prefix_length + segment.length)
    query_ends, key_ends = (
        torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32) for counts in (query_counts, key_counts)
    )
    return torch.tensor(keys, device=device), query_ends, key_ends, (max(query_counts), max(key_counts))


def _to_tensor(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)
