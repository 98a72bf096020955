"""Text files and JSONL that users give, atomic writes of files and folders, and hashes of files."""

from __future__ import annotations

import codecs
import errno
import glob
import gzip
import hashlib
import json
import os
import shutil
import stat
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

# No line of a text file is longer, and no file that is read as a whole: a device without an end is.
_MAX_LINE_BYTES, _MAX_FILE_BYTES = 1 << 28, 1 << 26
# JSON that is nested deeper is an attack or a mistake, and breaks whatever walks over it later.
_MAX_JSON_DEPTH = 100
# How files begin that are no text, and what to do with them.
_NOT_TEXT = {
    b"\x1f\x8b": "a gzip file: give it a name that ends in .gz",
    b"PK\x03\x04": "a zip file or an office document: unpack it, or export it as text",
    b"PAR1": "a parquet file: give it a name that ends in .parquet where rows are read, or convert it to JSONL",
    b"%PDF": "a PDF: extract its text first",
    b"BZh": "a bzip2 file: decompress it",
    b"\xfd7zXZ": "an xz file: decompress it",
    b"\x28\xb5\x2f\xfd": "a zstd file: decompress it",
}


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
    """Write a value as indented JSON, atomically; see `plain_json` for what JSON does not have."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(plain_json(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def plain_json(value: Any) -> Any:
    """Return a value as it is read back from JSON; what JSON does not have, NaN and infinity too, becomes a string.

    Example:
        ```python
        >>> plain_json({"max_grad_norm": math.inf})
        {'max_grad_norm': 'Infinity'}
        ```
    """
    return json.loads(json.dumps(value, default=str), parse_constant=str)


def write_jsonl(rows: Iterable[Any], path: str | os.PathLike[str], default: Callable[[Any], Any] | None = None) -> None:
    """Write rows as JSONL, atomically.

    Args:
        rows: Rows, one per line.
        path: Path of the file.
        default: Function that converts values that JSON does not have, as in `json.dumps`.
    """
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json_line(row, default) for row in rows)


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
        ValueError: if a line is not JSON or not UTF-8; the message names file and line. Whatever `on_error` is, also if
            the file as a whole is of another kind: UTF-16, compressed, a JSON array, a value over several lines.

    Example:
        ```python
        >>> write_jsonl([{"text": "red fox"}], "documents.jsonl")
        >>> list(read_jsonl("documents.jsonl"))
        [('documents.jsonl, line 1', {'text': 'red fox'})]
        ```
    """
    return parse_lines(read_lines(path), str(path), on_error)


def parse_lines(
    lines: Iterable[tuple[str, bytes]], name: str, on_error: Callable[[ValueError, bytes], None] | None = None
) -> Iterator[tuple[str, Any]]:
    """Parse lines of JSONL; as `read_jsonl`.

    Args:
        lines: Lines with their locations, from `read_lines`.
        name: Name of the file, for error messages.
        on_error: Function called with the error and the raw line instead of raising.
    """
    for number, (location, line) in enumerate(lines):
        if number == 0 and (is_json_array(line) or line.strip() == b"{"):
            kind, program = ("a JSON array", ".[]") if is_json_array(line) else ("JSON over several lines", ".")
            raise ValueError(f"{name} is {kind}: write one object per line (.jsonl), as jq -c '{program}' does.")
        try:
            value = parse_json(line, location)
        except ValueError as error:
            if on_error is None:
                raise
            on_error(error, line)
        else:
            yield location, value


def is_json_array(first_line: bytes) -> bool:
    """Whether a first line begins an array of objects or texts, not a text such as `[CLS]` or `[1]`."""
    line = first_line.strip()
    return line == b"[" or line.startswith((b"[{", b'["'))


def read_lines(file: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> Iterator[tuple[str, bytes]]:
    """Read the lines of a file that are not blank, each with its location `"NAME, line N"`; as `read_jsonl` otherwise.

    Args:
        file: Path of the file, or an open one.
        name: Name for error messages; by default the path.

    Raises:
        OSError: if there is no such file, or it is a folder or a device.
        ValueError: if it is in UTF-16, compressed under a name that does not say so, damaged, or has an endless line.
    """
    if isinstance(file, str | os.PathLike):
        with open_file(file) as opened:
            if Path(file).suffix == ".gz":
                yield from _numbered_lines(gzip.GzipFile(fileobj=opened), name or str(file))  # type: ignore[arg-type]
            else:
                yield from _numbered_lines(opened, name or str(file))
    else:
        yield from _numbered_lines(file, str(name))


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file or a pipe for reading in binary.

    Raises:
        OSError: if there is no such file, or it is a folder or a device, which may have no end.
    """
    try:
        mode = Path(path).stat().st_mode
    except ValueError as error:
        raise FileNotFoundError(f"{str(path)!r} is not the name of a file: {error}.") from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder: name a file.")
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        raise OSError(f"{path} is a device, not a file: name a file.")
    return Path(path).open("rb")


def _numbered_lines(file: BinaryIO, name: str) -> Iterator[tuple[str, bytes]]:
    number = 0
    try:
        while line := file.readline(_MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                line = _without_mark(line, name)
            if len(line) > _MAX_LINE_BYTES:
                raise ValueError(
                    f"{name}, line {number} is longer than {_MAX_LINE_BYTES >> 20} MB: write shorter lines."
                )
            if line.strip():
                yield f"{name}, line {number}", line.rstrip(b"\r\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name} is cut off after line {number}, or is not a gzip file: {error}") from None


def _without_mark(text: bytes, name: str) -> bytes:
    """The beginning of a text file without its byte order mark; an error if it is not the beginning of UTF-8 text."""
    for signature, kind in _NOT_TEXT.items():
        if text.startswith(signature):
            raise ValueError(f"{name} is {kind}.")
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in text[:4]:
        raise ValueError(f"{name} is in UTF-16 or UTF-32, or no text: save it as UTF-8.")
    return text.removeprefix(codecs.BOM_UTF8)


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file as a whole: settings, records, lists of examples; without its byte order mark.

    Raises:
        OSError: if there is no such file, or it is a folder or a device.
        ValueError: if it is not UTF-8, or larger than 64 MB.
    """
    with open_file(path) as file:
        text = file.read(_MAX_FILE_BYTES + 1)
    if len(text) > _MAX_FILE_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_FILE_BYTES >> 20} MB: is it the right file?")
    return decode_line(_without_mark(text, str(path)), str(path))


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; errors as in `read_text`, and a ValueError that names file and line if it is not JSON."""
    return parse_json(read_text(path).encode("utf-8"), str(path))


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


def parse_json(text: bytes, location: str) -> Any:
    """Parse JSON in UTF-8.

    Args:
        text: A line, or the content of a file.
        location: File and perhaps line number, for the error message.

    Raises:
        ValueError: if it is not UTF-8, not JSON, or nested too deeply.
    """
    decoded = decode_line(text, location)
    try:
        value = json.loads(decoded)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{location}: {error.msg} ({line}column {error.colno}).") from None
    except RecursionError:
        raise ValueError(f"{location}: nested too deeply.") from None
    except ValueError as error:
        # A number of too many digits.
        raise ValueError(f"{location}: {error}") from None
    # Counting the brackets is quick, and enough for nearly all.
    if text.count(b"[") + text.count(b"{") > _MAX_JSON_DEPTH and _is_deep(value):
        raise ValueError(f"{location}: nested more than {_MAX_JSON_DEPTH} levels deep.")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_JSON_DEPTH):
        level = [
            item
            for inner in level
            if isinstance(inner, dict | list)
            for item in (inner.values() if isinstance(inner, dict) else inner)
        ]
    return bool(level)


def jsonl_sha256(rows: Iterable[Any], default: Callable[[Any], Any] | None = None) -> str:
    """Return the SHA-256, in hexadecimal, of the file that `write_jsonl` would write; arguments as there."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json_line(row, default).encode("utf-8"))
    return digest.hexdigest()


def json_line(row: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Format a row as a line of JSONL; NaN and infinity, which JSON does not have, become null.

    Args:
        row: The row.
        default: Function that converts other values that JSON does not have, as in `json.dumps`.
    """
    line = json.dumps(row, ensure_ascii=False, default=default)
    if "NaN" in line or "Infinity" in line:
        line = json.dumps(json.loads(line, parse_constant=lambda _: None), ensure_ascii=False)
    return line + "\n"


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
