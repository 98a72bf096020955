"""Terminal output of the command line: rankings, without the messages of libraries."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ranking_querit import RankedDocument

# Loggers that report missing kernels and deprecations when torchao is imported.
_NOISY_LOGGERS = ("torchao", "torch.utils._pytree")


def escape_unwritable() -> None:
    """Escape characters that standard output or error cannot encode, such as lone surrogates, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def quiet_libraries() -> None:
    """Hide the libraries' progress bars, deprecations and start-up messages."""
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


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


def ranking_json(model: str, ranking: Sequence[RankedDocument]) -> str:
    """Format a ranking as JSON: `{"model", "results": [{"index", "score", "document"}]}`."""
    results = [ranked._asdict() for ranked in ranking]
    return json.dumps({"model": model, "results": results}, ensure_ascii=False, indent=2)


def print_ranking(query: str, ranking: Sequence[RankedDocument]) -> None:
    """Print a ranking as a table: rank, score, index of the document in the input, and as much of it as fits a line."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from .processing_querit import document_text

    table = Table(title=Text(query), title_justify="left", box=None, pad_edge=False, expand=True)
    for name, width, style in (("rank", 4, "dim"), ("score", 6, "bold"), ("index", 5, "dim")):
        table.add_column(name, justify="right", width=width, style=style)
    table.add_column("document", ratio=1, overflow="ellipsis", no_wrap=True)
    for rank, (index, score, document) in enumerate(ranking, start=1):
        # Text, not markup: brackets in a document are its own.
        line = Text(" ".join(document_text(document).split()))
        table.add_row(str(rank), f"{score:+.3f}", str(index), line)
    Console().print(table)
