"""Attention within each pair of a pack, for whatever decoder asks transformers' attention interface for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask
from transformers.modeling_flash_attention_utils import _flash_attention_forward

from .packing_querit import Pack, Text

NAME = "querit_packed"

# Queries attended for at once on a CPU: with fewer, products get small; with more, more is computed of what is masked.
_QUERIES = 128
# Texts of at least this share of a longer one's length are padded to it where a GPU attends for them together.
_SIMILAR_LENGTH = 0.8
States = dict[nn.Module, tuple[Tensor, Tensor]]


class CannotPack(Exception):
    """The backbone's attention does what is not known here: soft caps, sinks, position biases, masks of its own."""

    def __init__(self, what: str):
        super().__init__(f"Pairs cannot be laid end to end for this model, which has {what}: give padded batches.")


class Run:
    """What the parts of a forward pass have to know about the pack that goes through.

    Args:
        pack: The pack.
        carried: Keys and values, for each attention module, that the run before has kept.
        implementation: The attention implementation that the model is set to.
        last_layer: The index of the layer that may leave out rows nobody reads; None: none may.
    """

    def __init__(self, pack: Pack, carried: States, implementation: str, last_layer: int | None):
        self.pack = pack
        self.carried = carried
        self.kept: States = {}
        self.seen: set[nn.Module] = set()
        self.implementation = implementation
        self.last_layer = last_layer
        self._made: dict[tuple, Any] = {}

    def made_once(self, make: Callable[..., Any], *args: Any) -> Any:
        """`make(*args)`: the layers of a model need the same masks and indices."""
        key = (make, *args)
        if key not in self._made:
            self._made[key] = make(*args)
        return self._made[key]

    def read_rows(self, device: torch.device) -> Tensor:
        """The rows that are scored, (pairs,)."""
        return self.made_once(_to_tensor, tuple(self.pack.read_rows), device)


# By thread: a plain forward pass beside a run must not be mistaken for a part of it.
CURRENT_RUN: ContextVar[Run | None] = ContextVar("querit_run", default=None)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each pair of a pack, as transformers' attention interface calls it; without a run, plain SDPA.

    Args:
        module: The attention module.
        query, key, value: (1, heads, tokens, size) each; keys and values may have fewer heads.
        attention_mask: Not looked at in a run.
        scaling: Of the products of queries and keys.
        sliding_window: How many tokens back a token sees, itself included.

    Returns:
        (1, tokens, heads, size), and None in the place of attention weights.
    """
    run = CURRENT_RUN.get()
    if run is None:
        kwargs |= {"scaling": scaling, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    _check(run, module, sliding_window, kwargs)
    key, value = _with_carried(run, module, key, value)
    is_last = run.last_layer is not None and getattr(module, "layer_idx", None) == run.last_layer
    if is_last:
        attend = _attend_last_rows
    elif "flash" in run.implementation:
        attend = _attend_flash
    else:
        attend = _attend_each if query.device.type == "cpu" else _attend_together
    return attend(run, query, key, value, scaling, sliding_window), None


AttentionInterface.register(NAME, packed_attention)
# Additive, so that a plain forward pass beside a run, which may end after it, can go on with any attention.
AttentionMaskInterface.register(NAME, eager_mask)


def _check(run: Run, module: nn.Module, window: int | None, kwargs: dict[str, Any]) -> None:
    """Raise if a module attends otherwise than each token to those before it, or within a window."""
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise CannotPack(f"attention with {name}")
    if kwargs.get("dropout"):
        raise CannotPack("dropout in its attention")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise CannotPack("attention to later tokens")
    config = getattr(module, "config", None)
    if window is None and getattr(config, "sliding_window", None) and not getattr(config, "layer_types", None):
        raise CannotPack("a sliding window that only the mask knows of")
    if module in run.seen:
        raise CannotPack("several attentions in one module")
    run.seen.add(module)


def _with_carried(run: Run, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    if run.pack.carried:
        key, value = (torch.cat(both, 2) for both in zip(run.carried[module], (key, value), strict=True))
    keeps = run.pack.keeps
    if keeps.stop:
        # Copies, lest the whole pack's states stay in memory.
        run.kept[module] = key[:, :, keeps].clone(), value[:, :, keeps].clone()
    return key, value


def _attend_each(
    run: Run, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """Text by text, and a long one in pieces: on a CPU, a loop costs little and padding much."""
    masks = run.made_once(_causal_mask, run.pack, window, query.dtype)
    keys, values = _by_text(run.pack, key), _by_text(run.pack, value)
    attended = []
    # Split and concatenated, not sliced and written: the backward pass of a slice is as large as the whole.
    queries = query.split([text.length for text in run.pack.texts], 2)
    for text, mine, own_keys, own_values in zip(run.pack.texts, queries, keys, values, strict=True):
        seen = text.prefix_length
        for some in mine.split(_QUERIES, 2):
            count, first, seen = some.shape[2], seen, seen + some.shape[2]
            mask = masks[:count, masks.shape[1] - _QUERIES - first :][:, :seen]
            attended.append(_attend(some, own_keys[:, :, :seen], own_values[:, :, :seen], mask, scaling))
    return torch.cat([each.transpose(1, 2) for each in attended], 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    if key.shape[3] == value.shape[3] or query.shape[1] != key.shape[1]:
        has_groups = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=has_groups)
    # Values narrower than keys (MLA) have no kernel on CPUs, and torch's way around that is slower than this.
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    weights = torch.baddbmm(mask.expand(query.shape[1], -1, -1), query[0], key[0].transpose(1, 2), alpha=scale)
    return torch.bmm(weights.softmax(-1), value[0]).unsqueeze(0)


def _by_text(pack: Pack, states: Tensor) -> Iterator[Tensor]:
    """Keys or values of each text, those of its prefix first: (1, heads, prefix + length, size)."""
    lengths = [text.length for text in pack.texts]
    carried, *own = states.split([pack.carried, *lengths], 2)
    starts = [0, *itertools.accumulate(lengths, initial=pack.carried)]
    starting_at = dict(zip(starts, [carried, *own], strict=False))
    for text, mine in zip(pack.texts, own, strict=True):
        yield torch.cat((starting_at[text.prefix.start], mine), 2) if text.prefix_length else mine


def _causal_mask(pack: Pack, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive, (queries, keys): for queries from any position on, the last columns up to that position are theirs."""
    most = max(text.prefix_length + text.length for text in pack.texts)
    blocked = _blocked(torch.arange(most, most + _QUERIES).unsqueeze(1), torch.arange(most + _QUERIES), window)
    return torch.zeros(blocked.shape, dtype=dtype).masked_fill(blocked, torch.finfo(dtype).min)


def _blocked(positions: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Whether a query at a position must not see a key."""
    blocked = keys > positions
    return blocked if window is None else blocked | (keys <= positions - window)


def _attend_last_rows(
    run: Run, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """For the last token of each pair only; zero elsewhere."""
    rows = run.read_rows(query.device)
    queries, attended = iter(query[:, :, rows].split(1, 2)), []
    seen = slice(-window, None) if window else slice(None)
    for text, keys, values in zip(run.pack.texts, _by_text(run.pack, key), _by_text(run.pack, value), strict=True):
        if text.is_read:
            has_groups = query.shape[1] != key.shape[1]
            of_text = scaled_dot_product_attention(
                next(queries), keys[:, :, seen], values[:, :, seen], scale=scaling, enable_gqa=has_groups
            )
            attended.append(of_text.transpose(1, 2))
    output = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
    return output.index_copy(1, rows, torch.cat(attended, 1)) if attended else output


class _Batch(NamedTuple):
    """Texts of similar length, padded.

    Args:
        rows, is_token: (texts, queries).
        keys: (texts, keys).
        may_attend: (texts, 1, queries, keys).
    """

    rows: Tensor
    is_token: Tensor
    keys: Tensor
    may_attend: Tensor


def _attend_together(
    run: Run, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """Many texts in one call, padded to each other: on a GPU, calls cost more than a little padding."""
    output = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
    for batch in run.made_once(_batches, run.pack, window, query.device):
        attended = scaled_dot_product_attention(
            query[batch.rows].transpose(1, 2),
            key[batch.keys].transpose(1, 2),
            value[batch.keys].transpose(1, 2),
            attn_mask=batch.may_attend,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        output[batch.rows[batch.is_token]] = attended.transpose(1, 2)[batch.is_token]
    return output.unsqueeze(0)


def _batches(pack: Pack, window: int | None, device: torch.device) -> list[_Batch]:
    texts = sorted(pack.texts, key=lambda text: -text.length)
    batches = []
    while texts:
        size = sum(text.length >= _SIMILAR_LENGTH * texts[0].length for text in texts)
        batches.append(_padded(texts[:size], pack.carried, window, device))
        texts = texts[size:]
    return batches


def _padded(texts: list[Text], carried: int, window: int | None, device: torch.device) -> _Batch:
    lengths = torch.tensor([text.length for text in texts]).unsqueeze(1)
    prefixes = torch.tensor([text.prefix_length for text in texts]).unsqueeze(1)
    starts = torch.tensor([text.rows.start for text in texts]).unsqueeze(1)
    prefix_starts = torch.tensor([text.prefix.start for text in texts]).unsqueeze(1)
    queries, keys = torch.arange(int(lengths.max())), torch.arange(int((prefixes + lengths).max()))
    is_token = queries < lengths
    rows = torch.where(is_token, starts + queries, starts)
    own = (starts + carried + keys - prefixes).clamp(max=starts + carried + lengths - 1)
    key_rows = torch.where(keys < prefixes, prefix_starts + keys, own)
    # Padding sees what the last token sees, so that no row of a softmax is empty.
    positions = prefixes + torch.minimum(queries, lengths - 1)
    may_attend = ~_blocked(positions.unsqueeze(-1), keys, window)
    return _Batch(*(each.to(device) for each in (rows, is_token, key_rows, may_attend.unsqueeze(1))))


def _attend_flash(
    run: Run, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """All texts in one call of flash attention for variable lengths, whichever implementation the model is set to."""
    keys, query_ends, key_ends, longest = run.made_once(_flash_layout, run.pack, query.device)
    size = value.shape[3]
    value = nn.functional.pad(value, (0, query.shape[3] - size))
    output = _flash_attention_forward(
        query.transpose(1, 2),
        key[:, :, keys].transpose(1, 2),
        value[:, :, keys].transpose(1, 2),
        None,
        query_length=query.shape[2],
        is_causal=True,
        softmax_scale=scaling,
        sliding_window=window,
        attn_implementation=run.implementation,
        cu_seq_lens_q=query_ends,
        cu_seq_lens_k=key_ends,
        max_length_q=longest[0],
        max_length_k=longest[1],
    )
    return output[..., :size]


def _flash_layout(pack: Pack, device: torch.device) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Keys of all texts in a row, where queries and keys of each text end, and the most that a text has of both."""
    keys, queries_of, keys_of = [], [0], [0]
    for text in pack.texts:
        keys.extend(range(text.prefix.start, text.prefix.stop))
        keys.extend(range(text.rows.start + pack.carried, text.rows.stop + pack.carried))
        queries_of.append(text.length)
        keys_of.append(text.prefix_length + text.length)
    ends = (torch.tensor(each, device=device).cumsum(0, dtype=torch.int32) for each in (queries_of, keys_of))
    return torch.tensor(keys, device=device), *ends, (max(queries_of), max(keys_of))


def _to_tensor(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)
