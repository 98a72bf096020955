"""What took long to compute, kept by key in append-only parquet shards: a killed run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from ..files import replacing


def key_of(*parts: Any) -> bytes:
    """16 bytes that stand for values of JSON: other values, another key."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


class Shards(Mapping[bytes, Any]):
    """A mapping from keys to values on disk, to which whole batches are added, each a parquet file of its own.

    A batch is there once `add` has returned, whatever happens to the process then; before, nothing of it is. Several
    processes may add to one folder, each its own batches.

    Args:
        folder: Of the shards; need not exist.
        kind: Of the values: `float64` for scores, `string` for texts.

    Raises:
        ValueError: if a file in the folder is no such shard; the message names it.

    Example:
        ```python
        >>> scores = Shards("runs/a/scores/bm25", pyarrow.float64())
        >>> scores.add({key_of("bm25", "a query", "a text"): 7.1})
        >>> scores[key_of("bm25", "a query", "a text")]
        7.1
        ```
    """

    def __init__(self, folder: str | os.PathLike, kind: pyarrow.DataType):
        self.folder = Path(folder)
        self._schema = pyarrow.schema([("key", pyarrow.binary(16)), ("value", kind)])
        self._values: dict[bytes, Any] = {}
        self._read: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes have added."""
        for path in sorted(self.folder.glob("*.parquet")):
            if path.name in self._read:
                continue
            try:
                table = parquet.read_table(path)
                if not table.schema.equals(self._schema):
                    raise ValueError(f"its columns are {', '.join(map(str, table.schema))}")
                keys, values = (table[name].to_pylist() for name in self._schema.names)
            except (pyarrow.ArrowException, ValueError, OSError) as error:
                raise ValueError(
                    f"{path} is no shard of this run ({error}): remove it, and it is made again."
                ) from None
            self._values.update(zip(keys, values, strict=True))
            self._read.add(path.name)

    def add(self, values: Mapping[bytes, Any]) -> None:
        """Add a batch."""
        if not values:
            return
        name = f"{key_of([key.hex() for key in values]).hex()}.parquet"
        columns = {"key": list(values), "value": list(values.values())}
        with replacing(self.folder / name) as aside:
            parquet.write_table(pyarrow.table(columns, schema=self._schema), aside)
        self._values.update(values)
        self._read.add(name)

    def __getitem__(self, key: bytes) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
