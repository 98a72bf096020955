"""Scores on disk while a bulk reranking runs: every process appends to a shard of its own, block by block."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

from ..files import explain_full_disk

_PATTERN = "scores-*.jsonl"
_NOT_SCORED = -1


def shard_path(folder: Path, process: int) -> Path:
    """Return the path of the shard of a process, by its number."""
    return folder / f"scores-{process:05}.jsonl"


class ShardWriter:
    """Appends the scores of blocks to a shard: a block is on disk as a whole, or not there.

    Args:
        path: Path of the shard; the end of a line that a killed process left is removed.
    """

    def __init__(self, path: Path):
        self._path = path
        path.touch()
        with path.open("rb") as file:
            end = max((end for end, _, _ in _complete_lines(file)), default=0)
        os.truncate(path, end)
        # Without a buffer, which would be written once more after an error.
        self._file: RawIOBase = path.open("ab", buffering=0)

    def add(self, block: int, scores: Sequence[float]) -> None:
        """Append the scores of a block."""
        rest = json.dumps({"block": block, "scores": list(scores)}).encode() + b"\n"
        with explain_full_disk(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Shards:
    """Reader of all shards of a folder.

    Args:
        folder: Folder of the shards.
        num_blocks: Number of blocks.
    """

    def __init__(self, folder: Path, num_blocks: int):
        self._files = [path.open("rb") for path in sorted(folder.glob(_PATTERN))]
        # A few bytes a block, so that a billion pairs take some 50 MB.
        self._shards = array("i", [_NOT_SCORED]) * num_blocks
        self._offsets = array("q", [0]) * num_blocks
        for number, file in enumerate(self._files):
            for _, start, value in _complete_lines(file):
                self._shards[value["block"]], self._offsets[value["block"]] = number, start

    def is_scored(self, block: int) -> bool:
        """Whether the scores of a block are there."""
        return self._shards[block] != _NOT_SCORED

    def scores(self, block: int) -> list[float]:
        """Read the scores of a block."""
        file = self._files[self._shards[block]]
        file.seek(self._offsets[block])
        return json.loads(file.readline())["scores"]

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _complete_lines(file: BinaryIO) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield end, start and value of the lines up to the first that was not written to its end."""
    start = 0
    while (line := file.readline()).endswith(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            # A machine that stopped may leave anything after what had reached its disk.
            return
        end = start + len(line)
        yield end, start, value
        start = end
