"""How the engine lays out tokenized pairs: end to end in one row, without padding, what they begin with only once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_NOTHING = slice(0, 0)


class Text(NamedTuple):
    """A run of tokens: each attends to the prefix that the run continues, to those before it in the run, to itself.

    Args:
        rows: Of the run in its pack.
        prefix: Of its prefix among the pack's keys: carried ones first, then one a row.
        is_read: Whether a pair ends here, so that its last row is scored.
    """

    rows: slice
    prefix: slice
    is_read: bool

    @property
    def length(self) -> int:
        """Tokens of the run itself."""
        return self.rows.stop - self.rows.start

    @property
    def prefix_length(self) -> int:
        """Tokens it continues."""
        return self.prefix.stop - self.prefix.start


@dataclass(eq=False)
class Pack:
    """The tokens of one forward pass, in one row of shape (1, tokens).

    Args:
        carried: Keys at the front that come from the pack before: its `keeps`.
        input_ids, position_ids: As models take them; positions count from the start of each pair.
        texts: The runs that the row consists of, in order.
        pairs: Which pair each read text ends.
        keeps: Keys that the next pack goes on using: the prefix of pairs that did not all fit here.
    """

    carried: int = 0
    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    keeps: slice = field(default_factory=lambda: _NOTHING)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def read_rows(self) -> list[int]:
        """The last row of each pair, in the order of `pairs`."""
        return [text.rows.stop - 1 for text in self.texts if text.is_read]

    def add_prefix(self, ids: Sequence[int]) -> slice:
        """Append what several pairs begin with; returns its keys."""
        rows = self._add(ids, _NOTHING, is_read=False)
        return slice(rows.start + self.carried, rows.stop + self.carried)

    def add_pair(self, pair: int, ids: Sequence[int], prefix: slice) -> None:
        """Append the rest of a pair, behind the prefix with these keys."""
        self._add(ids, prefix, is_read=True)
        self.pairs.append(pair)

    def _add(self, ids: Sequence[int], prefix: slice, is_read: bool) -> slice:
        rows = slice(len(self), len(self) + len(ids))
        text = Text(rows, prefix, is_read)
        self.input_ids.extend(ids)
        self.position_ids.extend(range(text.prefix_length, text.prefix_length + text.length))
        self.texts.append(text)
        return rows


def plan_packs(
    input_ids: Sequence[Sequence[int]], groups: Sequence[Sequence[int]], batch_tokens: int, share_prefix: bool = True
) -> Iterator[Pack]:
    """Put pairs into packs of at most `batch_tokens` tokens each; a single longer pair is a pack by itself.

    Args:
        input_ids: Token ids of every pair.
        groups: Pairs (as indices of `input_ids`) that may begin alike: those of one query.
        batch_tokens: Tokens of a forward pass.
        share_prefix: Whether what all pairs of a group begin with is computed only once.

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
                    pack.keeps, prefix = prefix, slice(0, len(shared))
                yield pack
                pack = Pack(carried=len(shared) if prefix is not None else 0)
            if prefix is None:
                prefix = pack.add_prefix(shared) if shared else _NOTHING
            pack.add_pair(pair, rest, prefix)
    if pack:
        yield pack


def common_prefix(input_ids: Sequence[Sequence[int]]) -> list[int]:
    """The token ids that several sequences begin with, leaving at least one to each; none for a single sequence."""
    if len(input_ids) < 2:
        return []
    # What the smallest and the largest begin with, all that are sorted between them begin with too.
    first, last = min(input_ids), max(input_ids)
    longest = min(len(ids) for ids in input_ids) - 1
    length = next((place for place in range(longest) if first[place] != last[place]), longest)
    return list(first[:length])
