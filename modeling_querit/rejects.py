"""The file of rejected lines: what was set aside, and why."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

# Longest excerpt of a rejected row, or of its error, in characters.
_EXCERPT_LENGTH = 2000


class Rejects:
    """A JSONL file of invalid rows: the error, which names file and line, and the row as it was.

    Args:
        path: File to write anew; it exists only if a row was rejected. None: rejected rows are only counted.

    Example:
        ```python
        >>> with Rejects("rejects.jsonl") as rejects:
        ...     rows = list(read_rows("rows.jsonl", rejects))
        >>> rejects.count
        ```
    """

    def __init__(self, path: str | os.PathLike[str] | None):
        self.path = None if path is None else Path(path)
        self.count = 0
        #: The first error, with a full stop; empty while there is none.
        self.first_error = ""
        self._file: TextIO | None = None
        self._made_folders: list[Path] = []

    def add(self, error: ValueError, row: Any) -> None:
        """Write down a row that cannot be used, and why."""
        self.count += 1
        self.first_error = self.first_error or f"{str(error).rstrip('.')}."
        if self.path is None:
            return
        if self._file is None:
            self._made_folders = [folder for folder in self.path.parents if not folder.exists()]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", encoding="utf-8", errors="backslashreplace")
        text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=repr)
        entry = {"error": str(error)[:_EXCERPT_LENGTH], "row": text[:_EXCERPT_LENGTH]}
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()

    def discard(self) -> None:
        """Remove the file, and the folders that were made for it: the rows are refused as a whole."""
        if self._file is not None and self.path is not None:
            self._file.close()
            self.path.unlink(missing_ok=True)
            for folder in self._made_folders:
                if not any(folder.iterdir()):
                    folder.rmdir()

    def __enter__(self) -> Rejects:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
