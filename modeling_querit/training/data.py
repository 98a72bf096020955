"""Ranking data: rows of one query with its documents and labels, and the collator that flattens them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ..processing_querit import QueritProcessor

Row = dict[str, Any]


class RankingDataset(Dataset):
    """Rows `{"query", "documents", "labels"}`, optionally with an `"instruction"`.

    Documents are strings or `{"title", "text"}`; labels are numbers, one a document: 0 and 1, grades, or a
    teacher's scores in [0, 1].

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
        """Read files with one row a line."""
        return cls([row for path in paths for row in read_rows(path)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def read_rows(path: str | os.PathLike) -> Iterator[Row]:
    """The rows of a JSONL file; a broken one is a ValueError that names file and line."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: {error}") from None
            check_row(row, where)
            yield row


def check_row(row: Any, where: str) -> None:
    """Raise a ValueError that says what is wrong with a row, and where it stands."""
    missing = [key for key in ("query", "documents", "labels") if not isinstance(row, dict) or key not in row]
    if missing:
        raise ValueError(f"{where}: no {missing[0]!r}; a row has query, documents and labels.")
    if not isinstance(row["query"], str):
        raise ValueError(f"{where}: the query is {row['query']!r}, not a string.")
    if not isinstance(row.get("instruction"), str | None):
        raise ValueError(f"{where}: the instruction is {row['instruction']!r}, not a string.")
    documents, labels = row["documents"], row["labels"]
    if not isinstance(documents, list) or not isinstance(labels, list):
        raise ValueError(f"{where}: documents and labels are lists.")
    if not documents or len(documents) != len(labels):
        raise ValueError(f"{where}: {len(documents)} documents and {len(labels)} labels; give one label a document.")
    for document in documents:
        if not isinstance(document.get("text") if isinstance(document, dict) else document, str):
            raise ValueError(f"{where}: a document is a string or has a 'text', not {document!r}.")
        if isinstance(document, dict) and not isinstance(document.get("title"), str | None):
            raise ValueError(f"{where}: the title is {document['title']!r}, not a string.")
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, int | float) or not math.isfinite(label):
            raise ValueError(f"{where}: label {label!r} is not a finite number.")


class RankingCollator:
    """Flattens rows into one batch of pairs: every document of a query stays in its batch.

    Args:
        processor: Of the model that is trained.
        max_length: Tokens a pair may have; the processor's own by default.

    Returns (when called): `input_ids` and `attention_mask`, (pairs, sequence), padded on the left; `labels`,
    (pairs,), float32; `query_ids`, (pairs,): the row a pair came from.
    """

    def __init__(self, processor: QueritProcessor, max_length: int | None = None):
        self.processor = processor
        self.max_length = max_length

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """One batch of all pairs of the rows."""
        pairs = [(index, document) for index, row in enumerate(rows) for document in row["documents"]]
        instructions = [rows[index].get("instruction") for index, _ in pairs]
        batch = self.processor(
            [rows[index]["query"] for index, _ in pairs],
            [document for _, document in pairs],
            instruction=instructions,
            max_length=self.max_length,
        )
        labels = [label for row in rows for label in row["labels"]]
        return dict(batch) | {
            "labels": torch.tensor(labels, dtype=torch.float32),
            "query_ids": torch.tensor([index for index, _ in pairs]),
        }


def write_rows(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Write rows as JSONL: aside first, then renamed, so that a file is whole or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    with aside.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    aside.replace(path)
