"""Ranking rows in memory, as trainers take them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch.utils.data import Dataset

from .reading import read_rows
from .rows import Row, check_row


class RankingDataset(Dataset):
    """Rows in memory: `{"query", "documents", "labels"}`, or `"scores"` for labels, optionally an `"instruction"`.

    Documents are strings or `{"title", "text"}`. Labels are numbers, one a document: 0 and 1, grades, or a teacher's
    scores in [0, 1]. Scores are those of teachers by name, `{teacher: [a number a document]}`, on any scale; None where
    a teacher was not asked. Trainers also take tables of `datasets` with such rows, streaming ones too.

    Args:
        rows: The rows, checked here.

    Raises:
        ValueError: if a row is not of that form; the message says which.

    Example:
        ```python
        >>> len(RankingDataset([{"query": "a", "documents": ["b", "c"], "labels": [1, 0]}]))
        1
        ```
    """

    def __init__(self, rows: Sequence[Row]):
        for number, row in enumerate(rows):
            check_row(row, f"row {number}")
        self.rows = list(rows)

    @classmethod
    def from_jsonl(cls, *paths: str | os.PathLike) -> RankingDataset:
        """Read files with one row a line.

        Raises:
            ValueError: if a row is broken; the message names file and line.
        """
        return cls([row for path in paths for row in read_rows(path)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def length_of(row: Row) -> int:
    """Characters of a row's query and documents: how long it takes, near enough to sort by."""
    documents = (each if isinstance(each, str) else each["text"] for each in row["documents"])
    return len(row["query"]) * len(row["documents"]) + sum(map(len, documents))
