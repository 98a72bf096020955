"""Training rows: their type, the check of a row, and readers for files and datasets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Required, TypedDict, cast

from torch.utils.data import Dataset

from ..files import read_jsonl
from ..pair_encoding_querit import Document
from ..rejects import Rejects
from ..retrieval.collection import Source

ROW_FILES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")

_FLOAT32_MAX = 3.4e38


class Row(TypedDict, total=False):
    """One query with documents to rank, and what is known of their relevance; either `labels` or `scores` is there.

    Args:
        query: Text of the query.
        documents: Documents to rank, at least one; strings or `{"title", "text"}`.
        labels: One number per document: 0 and 1, grades, or a teacher's scores in [0, 1].
        scores: Scores by name of the teacher, one number per document on any scale; None where it was not asked.
        instruction: Task in one sentence; the default instruction if missing or None.
        source: Origin of the row, such as `COLLECTION/QUERY_ID`.
        positive: Index of the document that the query was written for, if it was generated.
    """

    query: Required[str]
    documents: Required[list[Document]]
    labels: list[float] | None
    scores: Mapping[str, Sequence[float | None] | None] | None
    instruction: str | None
    source: str
    positive: int | None


def check_row(row: Any, where: str) -> Row:
    """Check what was read or made by hand; code behind this check relies on the form of a `Row`.

    Args:
        row: The value that should be a row.
        where: File and line of the row, for the error message.

    Returns:
        The same row.

    Raises:
        ValueError: if it is not of that form; the message begins with `where`.
    """
    missing = [key for key in ("query", "documents") if not isinstance(row, dict) or row.get(key) is None]
    if not missing and row.get("labels") is None and not has_scores(row):
        missing = ["labels"]
    if missing:
        raise ValueError(f"{where}: no {missing[0]!r}; a row has query, documents, and labels or scores.")
    if not isinstance(row["query"], str):
        raise ValueError(f"{where}: the query is {row['query']!r}, not a string.")
    if not isinstance(row.get("instruction"), str | None):
        raise ValueError(f"{where}: the instruction is {row['instruction']!r}, not a string.")
    _check_encodable(row["query"], f"{where}: the query")
    other_fields = {key: value for key, value in row.items() if key not in ("query", "documents")}
    _check_encodable(json.dumps(other_fields, ensure_ascii=False, default=str), f"{where}: a field")
    documents = row["documents"]
    if not isinstance(documents, list) or not documents:
        raise ValueError(f"{where}: documents is not a list of at least one document.")
    for document in documents:
        _check_document(document, where)
    if row.get("labels") is not None:
        _check_numbers(row["labels"], len(documents), f"{where}: labels", "label")
    _check_scores(row.get("scores"), len(documents), where)
    return cast(Row, row)


def has_scores(row: Mapping[str, Any]) -> bool:
    """Whether at least one teacher scored the documents of a row."""
    scores = row.get("scores")
    if not isinstance(scores, dict):
        # Anything but a mapping is refused by check_row.
        return scores is not None
    return any(values is not None for values in scores.values())


def _check_document(document: Any, where: str) -> None:
    if not isinstance(document.get("text") if isinstance(document, dict) else document, str):
        raise ValueError(f"{where}: a document is a string or has a 'text', not {document!r}.")
    if isinstance(document, dict) and not isinstance(document.get("title"), str | None):
        raise ValueError(f"{where}: the title is {document['title']!r}, not a string.")
    text = document if isinstance(document, str) else f"{document.get('title')} {document['text']}"
    _check_encodable(text, f"{where}: a document")


def _check_scores(scores: Any, count: int, where: str) -> None:
    if not isinstance(scores, dict | None):
        raise ValueError(f"{where}: scores is {scores!r}, not {{teacher: [one number per document]}}.")
    for teacher, values in (scores or {}).items():
        # A table has a column for every teacher, empty where one was not asked.
        if values is not None:
            _check_numbers(values, count, f"{where}: scores of {teacher!r}", "score", may_be_none=True)


def _check_encodable(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: a lone surrogate at character {error.start}, which UTF-8 cannot encode: remove it."
        ) from None


def _check_numbers(values: Any, count: int, where: str, kind: str, may_be_none: bool = False) -> None:
    if not isinstance(values, list):
        raise ValueError(f"{where} are {values!r}, not a list.")
    if len(values) != count:
        raise ValueError(f"{where}: {count} documents and {len(values)} {kind}s; give one {kind} per document.")
    for value in values:
        if value is None and may_be_none:
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or not _fits_float32(value):
            raise ValueError(f"{where}: {kind} {repr(value)[:50]} is not a finite number.")


def _fits_float32(value: Real) -> bool:
    try:
        return abs(float(value)) <= _FLOAT32_MAX
    except OverflowError:
        return False


def row_length(row: Row) -> int:
    """Count the characters of a row's pairs, each of which repeats the query: a proxy of computing time to sort by."""
    texts = (document if isinstance(document, str) else document["text"] for document in row["documents"])
    return len(row["query"]) * len(row["documents"]) + sum(map(len, texts))


class RankingDataset(Dataset[Row]):
    """Rows in memory that were made by hand, checked once, here.

    Trainers take any sequence of rows; rows from `read_rows` are checked already. They take tables of `datasets` with
    such rows too, also streaming ones.

    Args:
        rows: Rows as `Row` describes them.

    Raises:
        ValueError: if a row is not of that form; the message says which.

    Example:
        ```python
        >>> len(RankingDataset([{"query": "a", "documents": ["b", "c"], "labels": [1, 0]}]))
        1
        ```
    """

    def __init__(self, rows: Sequence[Row]):
        self.rows = [check_row(row, f"row {number}") for number, row in enumerate(rows)]

    @classmethod
    def from_jsonl(cls, *paths: str | os.PathLike[str]) -> RankingDataset:
        """Read files with one row per line.

        Raises:
            ValueError: if a row is invalid; the message names file and line.
        """
        dataset = cls([])
        dataset.rows = [row for path in paths for row in read_rows(path)]
        return dataset

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def _reject(error: ValueError, row: Any, rejects: Rejects | None) -> None:
    if rejects is None:
        raise error from None
    rejects.add(error, row)


def checked_rows(located_rows: Iterable[tuple[str, Any]], rejects: Rejects | None = None) -> Iterator[Row]:
    """Yield the rows that pass `check_row`.

    Args:
        located_rows: Pairs of the location of a row, for error messages, and the row.
        rejects: Collector of invalid rows.

    Raises:
        ValueError: if a row is invalid and `rejects` is None.
    """
    for where, row in located_rows:
        try:
            checked = check_row(row, where)
        except ValueError as error:
            _reject(error, row, rejects)
        else:
            yield checked


def read_rows(path: str | os.PathLike[str], rejects: Rejects | None = None) -> Iterator[Row]:
    """Read the rows of a file, one after the other, checked.

    Args:
        path: A `.jsonl` or `.json` file with one row per line, also gzipped (`.gz`), or a `.parquet` file.
        rejects: Collector of invalid rows.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a row is invalid and `rejects` is None; the message names file and line.
    """
    if str(path).endswith(".parquet"):
        located_rows = _read_parquet(Path(path), rejects)
    else:
        located_rows = read_jsonl(
            path, on_error=lambda error, line: _reject(error, line.decode(errors="replace").rstrip(), rejects)
        )
    return checked_rows(located_rows, rejects)


def read_table(name: str, split: str, rejects: Rejects | None = None) -> Iterator[Row]:
    """Stream the rows of a dataset on the Hub by `datasets`, checked.

    Args:
        name: Name of the dataset.
        split: Name of the split.
        rejects: Collector of invalid rows.

    Raises:
        ValueError: if a row is invalid and `rejects` is None.
    """
    from datasets import load_dataset

    table = enumerate(load_dataset(name, split=split, streaming=True), start=1)
    return checked_rows(((f"{name}, row {number} of {split}", row) for number, row in table), rejects)


def _read_parquet(path: Path, rejects: Rejects | None) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            slices = (batch.slice(index, 1) for batch in file.iter_batches() for index in range(len(batch)))
            for number, table_slice in enumerate(slices, start=1):
                where = f"{path}, row {number}"
                try:
                    (row,) = table_slice.to_pylist()
                except UnicodeDecodeError as error:
                    _reject(ValueError(f"{where}: {error}"), repr(error), rejects)
                else:
                    yield where, row
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: {error}") from None


def is_collection(source: str) -> bool:
    """Whether a source is a folder in the BEIR layout, `FOLDER` or `FOLDER:SPLIT`."""
    return Source.parse(source).folder.is_dir()
