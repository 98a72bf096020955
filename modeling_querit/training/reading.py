"""Ranking rows from files: JSONL, parquet, and whatever `datasets` loads; broken ones are set aside."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .rows import Row, check_row

_SHOWN = 2000


class Rejects:
    """A file for rows that are no rows: where each stood, what is wrong with it, and what it was.

    Args:
        path: A JSONL file, written anew; it is there only if something was rejected. None: rows are only counted.

    Example:
        ```python
        >>> with Rejects("rejects.jsonl") as rejects:
        ...     rows = list(read_rows("rows.jsonl", rejects))
        >>> rejects.count
        ```
    """

    def __init__(self, path: str | os.PathLike | None):
        self.path = None if path is None else Path(path)
        self.count = 0
        self._file = None

    def add(self, error: ValueError, row: Any) -> None:
        """Set a row aside."""
        self.count += 1
        if self.path is None:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", encoding="utf-8", errors="backslashreplace")
        text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=repr)
        entry = {"error": str(error)[:_SHOWN], "row": text[:_SHOWN]}
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()

    def __enter__(self) -> Rejects:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def read_rows(path: str | os.PathLike, rejects: Rejects | None = None) -> Iterator[Row]:
    """The rows of a file, `.jsonl` (also `.json`, `.gz`) or `.parquet`, one after the other.

    Args:
        path: The file.
        rejects: Where broken rows go.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a row is broken and there is nowhere to put it; the message names file and line.
    """
    read = _parquet if str(path).endswith(".parquet") else _jsonl
    for where, row in read(Path(path)):
        try:
            if isinstance(row, UnicodeDecodeError):
                raise ValueError(f"{where}: {row}")
            if isinstance(row, bytes):
                row = _parsed(row, where)
            check_row(row, where)
        except ValueError as error:
            if rejects is None:
                raise
            rejects.add(error, row.decode(errors="replace").rstrip() if isinstance(row, bytes) else row)
        else:
            yield row


def _jsonl(path: Path) -> Iterator[tuple[str, bytes]]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}, line {number}", line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is cut off after line {number}, or no gzip file: {error}") from None


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, Row | UnicodeDecodeError]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = (batch.slice(place, 1) for batch in file.iter_batches() for place in range(len(batch)))
            for number, row in enumerate(rows, start=1):
                try:
                    (found,) = row.to_pylist()
                except UnicodeDecodeError as error:
                    found = error
                yield f"{path}, row {number}", found
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: {error}") from None


def read_table(name: str, split: str, rejects: Rejects | None = None) -> Iterator[Row]:
    """The rows of a dataset on the Hub, streamed by `datasets`."""
    from datasets import load_dataset

    for number, row in enumerate(load_dataset(name, split=split, streaming=True), start=1):
        try:
            check_row(row, f"{name}, row {number} of {split}")
        except ValueError as error:
            if rejects is None:
                raise
            rejects.add(error, row)
        else:
            yield row
