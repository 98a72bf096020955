"""Disk cache for values that take long to compute: scores, texts and embeddings, by hash, in append-only files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow
from pyarrow import parquet

from .files import atomic_write

Value = TypeVar("Value", float, str, np.ndarray)

# Kinds of values: a float, a string, or a float32 vector (its bytes are stored).
SCORES, TEXTS, EMBEDDINGS = pyarrow.float64(), pyarrow.string(), pyarrow.binary()


def key_of(*parts: Any) -> bytes:
    """Hash JSON values to a key of 16 bytes; different values have different keys.

    Example:
        ```python
        >>> key_of("bm25", "a query", "a text").hex()
        '283ae9cbb718e2e01d7414d81934248b'
        ```
    """
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


class DiskCache(Mapping[bytes, Value]):
    """A mapping from keys to computed values on disk, to which batches are added.

    Each batch is a parquet file of its own, written atomically: it is complete once `add` has returned, and absent if
    the process dies before. Several processes may add to the same folder.

    Args:
        folder: Folder of the files; it need not exist.
        kind: Kind of the values: `SCORES`, `TEXTS` or `EMBEDDINGS`.

    Raises:
        ValueError: if a parquet file in the folder is damaged or holds values of another kind; the message names it.

    Example:
        ```python
        >>> scores = DiskCache("runs/a/scores/bm25", SCORES)
        >>> scores.add({key_of("bm25", "a query", "a text"): 7.1})
        >>> scores[key_of("bm25", "a query", "a text")]
        7.1
        ```
    """

    def __init__(self, folder: str | os.PathLike[str], kind: pyarrow.DataType):
        self.folder = Path(folder)
        self._kind = kind
        self._schema = pyarrow.schema([("key", pyarrow.binary(16)), ("value", kind)])
        self._values: dict[bytes, Value] = {}
        self._files_read: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Read the batches that other processes have added."""
        for path in sorted(self.folder.glob("*.parquet")):
            if path.name in self._files_read:
                continue
            try:
                self._values.update(self._read(path))
            except (pyarrow.ArrowException, ValueError, OSError) as error:
                raise ValueError(
                    f"{path} is not a file of this cache ({error}). Remove it, and its values are computed again."
                ) from None
            self._files_read.add(path.name)

    def add(self, values: Mapping[bytes, Value]) -> None:
        """Write a batch of values; a key that is there already gets the new value.

        Args:
            values: Key of 16 bytes -> value; embeddings are float32, (dimensions,).
        """
        if not values:
            return
        name = f"{key_of([key.hex() for key in values]).hex()}.parquet"
        stored = [_stored(value) for value in values.values()]
        with atomic_write(self.folder / name) as temporary:
            columns = {"key": list(values), "value": stored}
            parquet.write_table(pyarrow.table(columns, schema=self._schema), temporary)
        self._values.update(values)
        self._files_read.add(name)

    def _read(self, path: Path) -> dict[bytes, Value]:
        table = parquet.read_table(path)
        if not table.schema.equals(self._schema):
            raise ValueError(f"its columns are {', '.join(map(str, table.schema))}")
        keys, values = (table[name].to_pylist() for name in self._schema.names)
        if self._kind == EMBEDDINGS:
            values = [np.frombuffer(value, np.float32) for value in values]
        return dict(zip(keys, values, strict=True))

    def __getitem__(self, key: bytes) -> Value:
        return self._values[key]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _stored(value: float | str | np.ndarray) -> float | str | bytes:
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype != np.float32 or value.ndim != 1:
        raise TypeError(f"An embedding is a float32 vector, not {value.dtype} of shape {value.shape}.")
    return value.tobytes()
