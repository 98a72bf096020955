"""All command-line output goes through here; control characters are escaped before it reaches a terminal or a log."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import select
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from .ranking_querit import RankedDocument

# Loggers that report missing kernels and deprecations when torchao is imported.
_NOISY_LOGGERS = ("torchao", "torch.utils._pytree")


# Longest message, in characters; the middle of a longer one, such as a value that a user gave, is left out.
_MAX_MESSAGE_CHARS = 280
# Control characters except tab and line feed, lone surrogates, line separators, and those that reverse the direction.
_UNPRINTABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
# Of these, JSON escapes only the first.
_UNPRINTABLE_IN_JSON = re.compile("[\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
# As of a program that the signal SIGPIPE ends, which is how others end when nobody reads what they write.
CLOSED_OUTPUT_CODE = 141


def printable(text: str) -> str:
    """Replace characters that a terminal would act on by escape sequences as Python writes them.

    Example:
        ```python
        >>> printable("red \\x1b[2J fox")
        'red \\\\x1b[2J fox'
        ```
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def one_line(message: object) -> str:
    """A message as one printable line, its middle left out if it is too long."""
    line = printable(" ".join(str(message).split()))
    half = _MAX_MESSAGE_CHARS // 2
    return line if len(line) <= _MAX_MESSAGE_CHARS else f"{line[:half].rstrip()} ... {line[4 - half :].lstrip()}"


def say(text: str, is_error: bool = False) -> None:
    """Print a line on standard output or error."""
    _write(printable(text) + "\n", sys.stderr if is_error else sys.stdout)


def say_error(error: object) -> None:
    """Print an error as one line on standard error."""
    say(f"querit: {one_line(_described(error))}", is_error=True)


def _described(error: object) -> object:
    """What the operating system refused, as a sentence that begins with the file; any other error as it is."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is None:
        return error
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} does not exist: check the path."
    if isinstance(error, PermissionError):
        return f"{error.filename} may not be read or written by this user: change its permissions, or name another."
    return f"{error.filename}: {error.strerror}."


def end_with_error(error: object) -> int:
    """Print an error as `say_error` does, if anybody reads it, and return the exit code."""
    try:
        say_error(error)
    except BrokenPipeError:
        drop_closed_output()
    return 2


def say_json(value: Any) -> None:
    """Print a value as JSON, in UTF-8 whatever the encoding of standard output is.

    Numbers that JSON does not have become null, and what a terminal would act on is escaped.
    """
    text = json.dumps(_with_json_numbers(value), ensure_ascii=False, allow_nan=False, indent=2)
    text = _UNPRINTABLE_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"
    buffer = getattr(sys.stdout, "buffer", None)
    if buffer is None:
        _write(text, sys.stdout)
    else:
        sys.stdout.flush()
        buffer.write(text.encode("utf-8"))
        buffer.flush()


def _with_json_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_json_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_json_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(text: str, stream: Any) -> None:
    # A stream is None where the process was started without it.
    if stream is not None:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()


@contextmanager
def safe_output() -> Iterator[None]:
    """Let libraries write in this block what the streams can encode, and log no control characters."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    make_record = logging.getLogRecordFactory()

    def make_printable_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            # Logging reports arguments that do not fit the message.
            return record
        record.msg, record.args = printable(message), None
        return record

    logging.setLogRecordFactory(make_printable_record)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make_record)


def drop_closed_output() -> bool:
    """Whether nobody reads standard output or error any more; what is still to be written there is then dropped."""
    closed = [stream for stream in (sys.stdout, sys.stderr) if stream is not None and _is_closed(stream)]
    for stream in closed:
        # The interpreter flushes them once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(closed)


def _is_closed(stream: Any) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
    except (AttributeError, OSError, ValueError):
        # Not a stream of the operating system.
        return False
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def is_terminal(stream: Any) -> bool:
    """Whether a stream, which is None where the process was started without it, is a terminal."""
    return stream is not None and stream.isatty()


def quiet_progress_bars() -> None:
    """Hide transformers' progress bars for loading and saving, which last a moment."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def quiet_libraries() -> None:
    """Hide the libraries' progress bars, deprecations and start-up messages."""
    warnings.simplefilter("ignore", FutureWarning)
    # Read when datasets is imported, which takes too long to do here.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    quiet_progress_bars()


def quiet_imports() -> None:
    """Hide what libraries report when they are imported, such as kernels that this machine lacks."""
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def skip_torchao(model: str) -> None:
    """Keep transformers from importing torchao if a model does not need it.

    transformers imports torchao, where it is installed, together with its models, which takes half a second and writes
    warnings to standard error. Call this before transformers is imported.

    Args:
        model: `mini`, a folder or a repository. torchao stays available for folders whose weights it has quantized,
            and for repositories, whose config is not known yet.
    """
    config_file = Path(model) / "config.json"
    is_quantized = config_file.is_file() and "torchao" in config_file.read_text(encoding="utf-8", errors="replace")
    is_local = model == "mini" or config_file.is_file()
    if is_local and not is_quantized and "transformers" not in sys.modules:
        # None in sys.modules makes Python treat a package as not installed.
        sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]


def print_ranking_json(model: str, ranking: Sequence[RankedDocument]) -> None:
    """Print a ranking as JSON: `{"model", "results": [{"index", "score", "document"}]}`, `id` where there is one."""
    say_json({"model": model, "results": [_with_id(ranked) for ranked in ranking]})


def _with_id(ranked: RankedDocument) -> dict[str, Any]:
    return ranked._asdict() | ({} if ranked.id is None else {"id": ranked.id})


def print_ranking(query: str, ranking: Sequence[RankedDocument]) -> None:
    """Print a ranking as a table: rank, score, index of the document in the input, and as much of it as fits a line."""
    from rich.table import Table
    from rich.text import Text

    from .pair_encoding_querit import document_text

    table = Table(
        title=Text(printable(" ".join(query.split()))), title_justify="left", box=None, pad_edge=False, expand=True
    )
    for name, width, style in (("rank", 4, "dim"), ("score", 6, "bold"), ("index", 5, "dim")):
        table.add_column(name, justify="right", width=width, style=style)
    table.add_column("document", ratio=1, overflow="ellipsis", no_wrap=True)
    for rank, (index, score, document) in enumerate(ranking, start=1):
        # Text, not markup: brackets in a document are its own.
        line = Text(printable(" ".join(document_text(document).split())))
        table.add_row(str(rank), f"{score:+.3f}", str(index), line)
    print_table(table)


def print_evaluation(rows: Sequence[Sequence[str]], lines: Sequence[str]) -> None:
    """Print the results of `querit evaluate`: a table of collections and systems, and lines below it."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("collection, system", overflow="fold")
    for name in ("nDCG@10", "95 %", "p", "MRR@10"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    print_table(table)
    for line in lines:
        say(line)


def print_table(table: Table) -> None:
    """Print a table of `rich`, styled where standard output is a terminal; its cells are printable already."""
    from rich.console import Console

    console = Console()
    # By itself, rich exits if the output is closed.
    with console.capture() as capture:
        console.print(table)
    _write(capture.get(), sys.stdout)
