"""Atomic writes of files and folders, JSONL, and hashes of files."""

from __future__ import annotations

import codecs
import errno
import glob
import gzip
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How safetensors, and torch's writer of zip files, report a full disk, a quota or a limit of a file's size.
_DISK_FULL_MESSAGES = (
    *("No space left", "File too large", "quota exceeded", "] . unexpected pos ", "PytorchStreamWriter failed writing"),
    *(f"os error {number}" for number in _DISK_FULL_ERRNOS),
)
_DISK_FULL = "The disk is full"
_REASONS = {errno.EDQUOT: "The disk quota is used up", errno.EFBIG: "A file would exceed the limit of its size"}
_NOT_WRITTEN = "could not be written. Files written before are complete"


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to, which replaces `path` when the block ends without an error.

    Args:
        path: Path of the file; its folder is made if it does not exist.

    Raises:
        OSError: if the disk is full, or the file cannot be written; the previous file is then unchanged.

    Example:
        ```python
        >>> with atomic_write("metrics.json") as temporary:
        ...     temporary.write_text("{}")
        ```
    """
    path = Path(path)
    # Processes that compute the same values do not write to the same temporary file.
    rank = os.environ.get("RANK", "")
    temporary = path.with_name(f"{path.name}{rank and '.'}{rank}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno in _DISK_FULL_ERRNOS:
            raise _disk_full(path, error.errno) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def explain_full_disk(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Raise the error of `atomic_write` if a library reports, in its own words, that the disk is full.

    Args:
        folder: Folder that the library writes to, for the message.

    Raises:
        OSError: if the disk is full.
    """
    try:
        yield
    except Exception as error:
        number = _full_disk_errno(error)
        if number and _NOT_WRITTEN not in str(error):
            raise _disk_full(folder, number) from error
        raise


def _full_disk_errno(error: Exception) -> int | None:
    """The number of an error that says that nothing more can be written; None for other errors."""
    number = getattr(error, "errno", None)
    if number in _DISK_FULL_ERRNOS:
        return number
    if not any(message in str(error) for message in _DISK_FULL_MESSAGES):
        return None
    stated = (number for number in _DISK_FULL_ERRNOS if f"os error {number}" in str(error))
    return next(stated, errno.ENOSPC)


def _disk_full(path: str | os.PathLike[str], number: int) -> OSError:
    return OSError(
        number,
        f"{_REASONS.get(number, _DISK_FULL)}: {path} {_NOT_WRITTEN}: free some space and run the same command again.",
    )


def write_json(value: Any, path: str | os.PathLike[str]) -> None:
    """Write a value as indented JSON, atomically; values that JSON does not have are written as strings."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def write_jsonl(rows: Iterable[Any], path: str | os.PathLike[str], default: Callable[[Any], Any] | None = None) -> None:
    """Write rows as JSONL, atomically.

    Args:
        rows: Rows, one per line.
        path: Path of the file.
        default: Function that converts values that JSON does not have, as in `json.dumps`.
    """
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(_json_line(row, default) for row in rows)


def read_jsonl(
    path: str | os.PathLike[str], on_error: Callable[[ValueError, bytes], None] | None = None
) -> Iterator[tuple[str, Any]]:
    """Read the values of a JSONL file, each with its location `"PATH, line N"`, for error messages.

    Blank lines are skipped; a byte order mark is not part of the first line; `.gz` files are decompressed.

    Args:
        path: Path of the file, in UTF-8.
        on_error: Callback that gets the error and the raw line; without it, a bad line raises.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is not JSON or not UTF-8, or a `.gz` file is damaged; the message names file and line.

    Example:
        ```python
        >>> write_jsonl([{"text": "red fox"}], "documents.jsonl")
        >>> list(read_jsonl("documents.jsonl"))
        [('documents.jsonl, line 1', {'text': 'red fox'})]
        ```
    """
    for location, line in read_lines(path):
        try:
            value = parse_json(line, location)
        except ValueError as error:
            if on_error is None:
                raise
            on_error(error, line)
        else:
            yield location, value


def read_lines(file: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> Iterator[tuple[str, bytes]]:
    """Read the lines of a file that are not blank, each with its location `"NAME, line N"`; as `read_jsonl` otherwise.

    Args:
        file: Path of the file, or an open one.
        name: Name for error messages; by default the path.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a `.gz` file is damaged.
    """
    if isinstance(file, str | os.PathLike):
        path = Path(file)
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as opened:
            yield from _numbered_lines(opened, name or str(file))
    else:
        yield from _numbered_lines(file, str(name))


def _numbered_lines(file: Iterable[bytes], name: str) -> Iterator[tuple[str, bytes]]:
    number = 0
    try:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield f"{name}, line {number}", line.rstrip(b"\r\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name} is cut off after line {number}, or is not a gzip file: {error}") from None


def decode_line(line: bytes, location: str) -> str:
    """Decode a line of UTF-8.

    Args:
        line: The line.
        location: File and line number, for the error message.

    Raises:
        ValueError: if the line is not UTF-8.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{location}: {error}; save it as UTF-8.") from None


def parse_json(line: bytes, location: str) -> Any:
    """Parse a line of JSON in UTF-8; arguments and errors as in `decode_line`."""
    text = decode_line(line, location)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{location}: {error}") from None


def jsonl_sha256(rows: Iterable[Any], default: Callable[[Any], Any] | None = None) -> str:
    """Return the SHA-256, in hexadecimal, of the file that `write_jsonl` would write; arguments as there."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_json_line(row, default).encode("utf-8"))
    return digest.hexdigest()


def _json_line(row: Any, default: Callable[[Any], Any] | None) -> str:
    return json.dumps(row, ensure_ascii=False, default=default) + "\n"


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Lock file in a temporary folder, held while a process writes there.
_LOCK = ".lock"


def check_destination(destination: str | os.PathLike[str]) -> Path:
    """Check, before any work is done for it, that a new folder can be written.

    Args:
        destination: Path of the folder; it must not exist, or be empty.

    Returns:
        Its real path; the parent folder exists.

    Raises:
        OSError: if the path is taken, is a mount point, or cannot be written.
    """
    try:
        destination = Path(destination).resolve()
    except RuntimeError:
        raise FileExistsError(f"{destination} is a link to itself: name a new folder.") from None
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists: name a new folder.")
    if destination.is_mount():
        raise FileExistsError(f"{destination} is a mount point: name a folder in it.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(destination.parent, os.W_OK):
        raise PermissionError(f"{destination} cannot be written: no write permission in {destination.parent}.")
    return destination


@contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """Yield a temporary folder to write to, which becomes `destination` when the block ends without an error.

    Temporary folders that killed processes left for the same destination are removed.

    Args:
        destination: Path of the folder, from `check_destination`.

    Example:
        ```python
        >>> with atomic_folder(check_destination("merged")) as folder:
        ...     write_json({}, folder / "config.json")
        ```
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(destination.parent, f".{destination.name}-") as temporary, explain_full_disk(destination):
        folder = temporary / destination.name
        folder.mkdir()
        yield folder
        # Replaces an empty folder; fails if somebody has put files there in the meantime.
        folder.replace(destination)


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A temporary folder, which other processes leave alone as long as this one lives.

    Folders of the same prefix that killed processes left are removed.

    Args:
        parent: Folder to make it in.
        prefix: First characters of its name.
    """
    _remove_abandoned(parent, prefix)
    # The lock is released when this process ends, however it ends.
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as temporary, FileLock(Path(temporary) / _LOCK):
        yield Path(temporary)


def scratch_folder(folder: Path) -> Path:
    """Return a path for intermediate files of an `atomic_folder`, beside it; removed when the block ends."""
    return folder.with_name(f"{folder.name}-scratch")


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the temporary folders that no living process writes to."""
    for lock in parent.glob(f"{glob.escape(prefix)}*/{_LOCK}"):
        try:
            with FileLock(lock, timeout=0):
                pass
        except Timeout:
            continue
        shutil.rmtree(lock.parent, ignore_errors=True)
