"""Scores of an evaluation under way: a query is a line, written at once, so that a kill loses one query at most."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class ScoreStore:
    """Scores of one model on one collection, in a folder with a file for each process.

    Args:
        folder: Folder of the files; it need not exist.

    Example:
        ```python
        >>> store = ScoreStore(Path("evaluation/scores/scifact/mini"))
        >>> store.add("q1", [0.25, -0.5], process=0)
        >>> store.read()
        {'q1': [0.25, -0.5]}
        ```
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: Any = None

    def read(self) -> dict[str, list[float]]:
        """Read the scores of all processes: query id -> scores, in the order of its candidates."""
        return {query: scores for path in sorted(self.folder.glob("*.jsonl")) for query, scores in _read(path)}

    def add(self, query: str, scores: Sequence[float], process: int) -> None:
        """Append the scores of a query to the file of a process."""
        if self._file is None:
            self._file = self._open(self.folder / f"{process}.jsonl")
        self._file.write(json.dumps([query, list(scores)]) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file of this process."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Remove the files, once their scores are elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def _open(path: Path) -> Any:
        """Open a file to append to, without the beginning of a line that a killed process has left."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        return path.open("a", encoding="utf-8")


def _read(path: Path) -> Iterator[tuple[str, list[float]]]:
    for line in path.read_bytes().split(b"\n")[:-1]:
        query, scores = json.loads(line)
        yield query, scores


def share(queries: Sequence[str], done: Mapping[str, object], process: int, processes: int) -> list[str]:
    """Return the queries that a process has to score: every n-th of those that nobody has scored yet."""
    return [query for query in queries if query not in done][process::processes]
