"""Ranking data: rows of one query with its documents and their labels or teachers' scores."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

Row = dict[str, Any]


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
        from .reading import read_rows

        return cls([row for path in paths for row in read_rows(path)])

    def lengths(self) -> list[int]:
        """Characters of each row's query and documents: how long it takes, near enough to sort by."""
        return [
            len(row["query"]) * len(row["documents"])
            + sum(len(each if isinstance(each, str) else each["text"]) for each in row["documents"])
            for row in self.rows
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def check_row(row: Any, where: str) -> None:
    """Raise a ValueError that says what is wrong with a row, and where it stands."""
    missing = [key for key in ("query", "documents") if not isinstance(row, dict) or row.get(key) is None]
    if not missing and row.get("labels") is None and row.get("scores") is None:
        missing = ["labels"]
    if missing:
        raise ValueError(f"{where}: no {missing[0]!r}; a row has query, documents, and labels or scores.")
    if not isinstance(row["query"], str):
        raise ValueError(f"{where}: the query is {row['query']!r}, not a string.")
    if not isinstance(row.get("instruction"), str | None):
        raise ValueError(f"{where}: the instruction is {row['instruction']!r}, not a string.")
    documents = row["documents"]
    if not isinstance(documents, list) or not documents:
        raise ValueError(f"{where}: documents is a list, of at least one.")
    for document in documents:
        if not isinstance(document.get("text") if isinstance(document, dict) else document, str):
            raise ValueError(f"{where}: a document is a string or has a 'text', not {document!r}.")
        if isinstance(document, dict) and not isinstance(document.get("title"), str | None):
            raise ValueError(f"{where}: the title is {document['title']!r}, not a string.")
    if row.get("labels") is not None:
        _check_numbers(row["labels"], len(documents), f"{where}: labels", "label")
    scores = row.get("scores")
    if not isinstance(scores, dict | None):
        raise ValueError(f"{where}: scores is {scores!r}, not {{teacher: [a number a document]}}.")
    for teacher, values in (scores or {}).items():
        # A table has a column for every teacher, empty where one was not asked.
        if values is not None:
            known = [value for value in values if value is not None] if isinstance(values, list) else values
            _check_numbers(values, len(documents), f"{where}: scores of {teacher!r}", "score", known)


def _check_numbers(values: Any, count: int, where: str, kind: str, known: Any = None) -> None:
    if not isinstance(values, list):
        raise ValueError(f"{where} are {values!r}, not a list.")
    if len(values) != count:
        raise ValueError(f"{where}: {count} documents and {len(values)} {kind}s; give one {kind} a document.")
    for value in values if known is None else known:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{where}: {kind} {value!r} is not a finite number.")


def write_rows(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Write rows as JSONL: aside first, then renamed, so that a file is whole or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    with aside.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    aside.replace(path)
