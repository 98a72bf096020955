"""Packs: tokenized pairs in one sequence without padding, with the prefix that they share computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

_EMPTY = slice(0, 0)


class Segment(NamedTuple):
    """Consecutive tokens of a pack: a shared prefix, a whole pair, or the rest of a pair whose prefix is shared.

    With causal attention a token attends to the segment's prefix, to the tokens before it in the segment and to itself;
    with attention in both directions, where nothing can be shared, to all tokens of the segment.

    Args:
        positions: Positions of the segment's tokens in its pack.
        prefix: Keys of the prefix that the segment continues, among the pack's keys: those of the prefix KV cache come
            first, then one for each position.
        is_scored: Whether a pair ends here, so that the last position of the segment is scored.
    """

    positions: slice
    prefix: slice
    is_scored: bool

    @property
    def length(self) -> int:
        """Return the number of tokens in the segment itself."""
        return self.positions.stop - self.positions.start

    @property
    def prefix_length(self) -> int:
        """Return the number of tokens in the prefix that it continues."""
        return self.prefix.stop - self.prefix.start


@dataclass(eq=False)
class Pack:
    """The tokens of one forward pass, in one sequence of shape (1, tokens).

    Args:
        carried_length: Number of keys at the front that come from the previous pack: the length of the prefix KV cache.
        input_ids: Token ids of the pack.
        position_ids: Position of each token, counted from the start of its pair.
        segments: Segments that the pack consists of, in order.
        pairs: Indices of the pairs that the scored segments end, in order.
        carry_over: Keys to keep as the prefix KV cache of the next pack: the prefix of pairs that did not all fit into
            this one.
    """

    carried_length: int = 0
    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    carry_over: slice = field(default_factory=lambda: _EMPTY)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def scored_positions(self) -> list[int]:
        """Return the last position of each pair, in the order of `pairs`."""
        return [segment.positions.stop - 1 for segment in self.segments if segment.is_scored]

    @property
    def has_shared_prefix(self) -> bool:
        """Whether a segment continues another one, or will in the next pack."""
        return self.carry_over.stop > 0 or any(segment.prefix_length for segment in self.segments)

    def add_prefix(self, ids: Sequence[int]) -> slice:
        """Append a prefix that several pairs share; return its keys."""
        positions = self._add(ids, _EMPTY, is_scored=False)
        return slice(positions.start + self.carried_length, positions.stop + self.carried_length)

    def add_pair(self, pair: int, ids: Sequence[int], prefix: slice) -> None:
        """Append the rest of a pair, behind the prefix with these keys."""
        self._add(ids, prefix, is_scored=True)
        self.pairs.append(pair)

    def to_tensors(self, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """Return `input_ids` and `position_ids` as models take them, (1, tokens) each."""
        inputs = {"input_ids": self.input_ids, "position_ids": self.position_ids}
        return {name: torch.tensor([values], device=device) for name, values in inputs.items()}

    def _add(self, ids: Sequence[int], prefix: slice, is_scored: bool) -> slice:
        positions = slice(len(self), len(self) + len(ids))
        segment = Segment(positions, prefix, is_scored)
        self.input_ids.extend(ids)
        self.position_ids.extend(range(segment.prefix_length, segment.prefix_length + segment.length))
        self.segments.append(segment)
        return positions


def plan_packs(
    input_ids: Sequence[Sequence[int]], groups: Sequence[Sequence[int]], batch_tokens: int, share_prefix: bool = True
) -> Iterator[Pack]:
    """Put pairs into packs of at most `batch_tokens` tokens each; a single longer pair is a pack by itself.

    Args:
        input_ids: Token ids of every pair.
        groups: Indices of the pairs that may share a prefix, one sequence for each group: those of one query.
        batch_tokens: Maximum number of tokens in a pack.
        share_prefix: Whether the prefix that all pairs of a group have in common is computed only once; needs a
            backbone with causal attention.

    Yields:
        The packs in the order of `groups`; each continues where the previous one ended.

    Example:
        ```python
        >>> [pack.input_ids for pack in plan_packs([[1, 2, 3, 9], [1, 2, 4, 9]], [[0, 1]], batch_tokens=100)]
        [[1, 2, 3, 9, 4, 9]]
        ```
    """
    pack = Pack()
    for group in groups:
        shared = common_prefix([input_ids[pair] for pair in group]) if share_prefix else []
        prefix = None
        for pair in group:
            rest = input_ids[pair][len(shared) :]
            needed = len(rest) + (len(shared) if prefix is None else 0)
            if pack and len(pack) + needed > batch_tokens:
                if prefix is not None:
                    pack.carry_over, prefix = prefix, slice(0, len(shared))
                yield pack
                pack = Pack(carried_length=len(shared) if prefix is not None else 0)
            if prefix is None:
                prefix = pack.add_prefix(shared) if shared else _EMPTY
            pack.add_pair(pair, rest, prefix)
    if pack:
        yield pack


def common_prefix(input_ids: Sequence[Sequence[int]]) -> list[int]:
    """Return the longest prefix of several sequences that leaves each at least one token; empty for a single one."""
    if len(input_ids) < 2:
        return []
    # All sequences sort between the smallest and the largest, so they share whatever prefix these two share.
    first, last = min(map(list, input_ids)), max(map(list, input_ids))
    longest = min(len(ids) for ids in input_ids) - 1
    length = next((index for index in range(longest) if first[index] != last[index]), longest)
    return first[:length]
