"""Files that are whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of safetensors, and of torch's writer of zip files.
_FULL_WORDS = ("No space left", "os error 28", "] . unexpected pos ", "PytorchStreamWriter failed writing")
_TOLD = "The disk is full"


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path to write to, beside `path`, whose place it takes once the block has ended without an error.

    Raises:
        OSError: if the disk is full; what was there before is still there.

    Example:
        ```python
        >>> with replacing("figures.json") as aside:
        ...     aside.write_text("{}")
        ```
    """
    path = Path(path)
    # Processes that compute the same do not write to the same file.
    rank = os.environ.get("RANK", "")
    aside = path.with_name(f"{path.name}{rank and '.'}{rank}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        if error.errno in _FULL:
            raise _full(path, error) from error
        raise
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def writing_in(folder: str | os.PathLike) -> Iterator[None]:
    """While libraries write in a folder, each of which has words of its own for a disk that is full.

    Raises:
        OSError: if it is, as `replacing` says it.
    """
    try:
        yield
    except Exception as error:
        is_full = isinstance(error, OSError) and error.errno in _FULL
        if _TOLD not in str(error) and (is_full or any(words in str(error) for words in _FULL_WORDS)):
            raise _full(folder, error) from error
        raise


def _full(path: str | os.PathLike, error: Exception) -> OSError:
    return OSError(
        getattr(error, "errno", None) or errno.ENOSPC,
        f"{_TOLD}: {path} could not be written. What was written before is whole; make room, and give the same command "
        "again.",
    )


def write_json(value: Any, path: str | os.PathLike) -> None:
    """Write a value as JSON, indented."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def write_jsonl(rows: Iterable[Any], path: str | os.PathLike, default: Callable[[Any], Any] | None = None) -> None:
    """Write values as JSON, one a line; `default` stands in for what JSON has no value for, as in `json.dumps`."""
    with replacing(path) as aside, aside.open("w", encoding="utf-8") as lines:
        lines.writelines(_line(row, default) for row in rows)


def jsonl_sha256(rows: Iterable[Any], default: Callable[[Any], Any] | None = None) -> str:
    """Of the file that `write_jsonl` makes of rows, in hexadecimal."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_line(row, default).encode("utf-8"))
    return digest.hexdigest()


def _line(row: Any, default: Callable[[Any], Any] | None) -> str:
    return json.dumps(row, ensure_ascii=False, default=default) + "\n"


def sha256(path: str | os.PathLike) -> str:
    """Of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
