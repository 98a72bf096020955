"""The command line: `querit rerank | train | adapt | merge | convert | export`."""

from __future__ import annotations

import atexit
import io
import json
import os
import sys
import threading
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="querit",
    help="Rerank documents, and train rerankers: Querit (arXiv 2606.19037).",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Format(StrEnum):
    """How documents are written in a file."""

    auto = "auto"
    text = "text"
    jsonl = "jsonl"


class Layout(StrEnum):
    """How a checkpoint is laid out."""

    querit = "querit"
    published = "published"


class ExportFormat(StrEnum):
    """What a checkpoint is exported as."""

    seq_cls = "seq-cls"


@app.command()
def rerank(
    documents: Annotated[
        str, typer.Argument(metavar="[FILE]", help="One document a line; '-' is standard input.", show_default=False)
    ] = "-",
    query: Annotated[str, typer.Option("--query", "-q", help="What is searched for.", show_default=False)] = ...,
    model: Annotated[str, typer.Option(help="'mini' (the default model), or a folder or repository.")] = "mini",
    top_k: Annotated[int | None, typer.Option(help="How many documents to show; all by default.")] = None,
    instruction: Annotated[str | None, typer.Option(help="The task in one sentence, if not the usual one.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a query and document may have together.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU where there is one.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Compute in int8 (torchao): a little less exact.")] = False,
    format: Annotated[
        Format, typer.Option(help="text: a line is a document; jsonl: a line is a string or has a 'text'.")
    ] = Format.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Put documents in the order in which they answer a query, best first."""
    if top_k is not None and top_k < 1:
        raise ValueError(f"--top-k is {top_k}: ask for at least one document.")
    docs = read_documents(documents, format)
    reranker = _load(model, device, int8)
    ranked = reranker.rank(query, docs, instruction=instruction, top_k=top_k, max_length=max_length)
    if as_json:
        results = [each._asdict() for each in ranked]
        typer.echo(json.dumps({"model": model, "results": results}, ensure_ascii=False, indent=2))
    else:
        _print_table(query, ranked)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="Train a reranker: querit train CONFIG.yaml [--setting value ...], or settings alone; --help lists them.",
)
def train(context: typer.Context) -> None:
    """Hand the settings to `modeling_querit.training.run`."""
    from .training.run import main as run_training

    run_training(context.args)


@app.command()
def adapt(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Settings, a section for each stage.")],
    stage: Annotated[
        list[str] | None,
        typer.Option(help="corpus, queries, candidates, teachers, train or report; may be repeated. All by default."),
    ] = None,
) -> None:
    """Adapt a reranker to documents without labels: queries are written, teachers score, the model learns from them.

    What has been done is not done again: the same command goes on after whatever ended a run.
    """
    from .adaptation.pipeline import STAGES, Adaptation
    from .adaptation.settings import AdaptSettings

    _quiet()
    adaptation = Adaptation(AdaptSettings.load(config), echo=lambda line: typer.echo(line, err=True))
    adaptation.run(stage or STAGES)
    adaptation.processes.end()


@app.command()
def merge(
    models: Annotated[
        list[str] | None, typer.Argument(help="Two or more: 'mini', folders, repositories, LoRA adapters.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.", show_default=False)] = ...,
    method: Annotated[str | None, typer.Option(help="slerp (the default), linear or task_arithmetic.")] = None,
    t: Annotated[
        list[str] | None,
        typer.Option(help="Of two models, from 0 to 1: 0.5, 0:1 (first layer to last), mlp=0.3; may be repeated."),
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="Of any number: 1,2,1 or attention=1,0:1,1; may be repeated.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="For task_arithmetic: what the models were trained from.")] = None,
    scale: Annotated[float | None, typer.Option(help="For task_arithmetic: of the task vectors; 1 by default.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto (that of the models), float32, bfloat16 or float16.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A merge.json, to merge as it says; name the models if they are elsewhere.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of one weight file.")] = "5GB",
    search: Annotated[
        list[str] | None,
        typer.Option(help="Find t by nDCG@10 on a judged collection, FOLDER:SPLIT; may be repeated."),
    ] = None,
    evaluations: Annotated[int, typer.Option(help="Of a search: how many merges to try.")] = 9,
    queries: Annotated[int, typer.Option(help="Of a search: how many of each collection.")] = 50,
    depth: Annotated[int, typer.Option(help="Of a search: candidates of a query.")] = 20,
    max_length: Annotated[int | None, typer.Option(help="Of a search: tokens a pair may have.")] = None,
) -> None:
    """Merge rerankers into one, by SLERP; groups: attention, mlp, experts, router, embeddings, score."""
    from .checkpoints.merge import Recipe, merge_checkpoints

    _quiet()
    given = {
        "models": models,
        "method": method,
        "t": t,
        "weights": weights,
        "base": base,
        "scale": scale,
        "dtype": dtype,
    }
    given = {name: value for name, value in given.items() if value not in (None, [])}
    plan = Recipe.load(recipe, **given) if recipe else Recipe(**{"models": ()} | given)
    if search:
        from .checkpoints.search import Judged, search_merge

        collections = [Judged.load(source, queries, depth) for source in search]
        options = {"evaluations": evaluations, "max_length": max_length, "max_shard_size": max_shard_size}
        search_merge(plan, collections, output, **options, echo=lambda line: typer.echo(line, err=True))
    else:
        merge_checkpoints(plan, output, max_shard_size=max_shard_size)
    typer.echo(f"Wrote {output}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A published checkpoint, or any reranker: folder or repository.")],
    destination: Annotated[Path, typer.Argument(help="A new folder.")],
    dtype: Annotated[str, typer.Option(help="auto (that of the checkpoint), float32, bfloat16 or float16.")] = "auto",
    to: Annotated[Layout, typer.Option(help="querit: loads everywhere; published: as the first release.")] = "querit",
) -> None:
    """Write a published checkpoint as one folder that transformers, sentence-transformers and mteb load, or back."""
    from .checkpoints.convert import convert_checkpoint, publish_checkpoint

    _quiet()
    (convert_checkpoint if to == Layout.querit else publish_checkpoint)(source, destination, dtype)
    typer.echo(f"Wrote {destination}")


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="'mini', or any reranker: folder, repository or LoRA adapter.")],
    destination: Annotated[Path, typer.Argument(help="A new folder.")],
    format: Annotated[ExportFormat, typer.Option(help="seq-cls: a classifier with one label.")] = "seq-cls",
    dtype: Annotated[str, typer.Option(help="auto (that of the checkpoint), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Write a reranker for servers that run none of its code, as a sequence classifier of transformers."""
    from .checkpoints.export import EXPORTS

    _quiet()
    EXPORTS[format](source, destination, dtype)
    typer.echo(f"Wrote {destination}")


def read_documents(source: str, format: Format = Format.auto) -> list[str | dict[str, Any]]:
    """Documents of a file or of standard input (`-`), one a line; blank lines are none.

    Lines are JSON where the name ends in `.jsonl`, or else where the first one starts with `{`.

    Raises:
        ValueError: if there are none, a line is broken, or the text is not UTF-8; it names file and line.
        OSError: if the file cannot be read.
    """
    name = "standard input" if source == "-" else source
    if source == "-" and sys.stdin is None:
        raise ValueError("There is no standard input: name a file.")
    try:
        raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 (byte {error.start}): convert it first, with iconv for example."
        ) from None
    # split, not splitlines: a line ends at a line feed, not at every separator that Unicode has.
    lines = [(number, line.strip("\r")) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{name} is empty: give one document a line.")
    if format == Format.auto:
        is_json = source.endswith((".jsonl", ".ndjson")) or lines[0][1].lstrip().startswith("{")
        format = Format.jsonl if is_json else Format.text
    if format == Format.text:
        return [line for _, line in lines]
    return [_parse_document(line, f"{name}, line {number}") for number, line in lines]


def _parse_document(line: str, where: str) -> str | dict[str, Any]:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(document.get("text") if isinstance(document, dict) else document, str):
        raise ValueError(f"{where}: a document is a string or an object with a 'text'.")
    if isinstance(document, dict) and not isinstance(document.get("title"), str | None):
        raise ValueError(f"{where}: the title is not a string.")
    return document


def _load(name: str, device: str | None, int8: bool = False):
    import torch

    from .checkpoints.loading import load_model

    _quiet()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {error}") from None
    return load_model(name, int8=int8).to(device)


def _quiet() -> None:
    """Results belong on the screen, not the library's progress in loading."""
    from transformers.utils import logging

    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _print_table(query: str, ranked: list) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(query), title_justify="left", box=None, pad_edge=False, expand=True)
    for name, width, style in (("rank", 4, "dim"), ("score", 6, "bold"), ("index", 5, "dim")):
        table.add_column(name, justify="right", width=width, style=style)
    table.add_column("document", ratio=1, overflow="ellipsis", no_wrap=True)
    for rank, (index, score, document) in enumerate(ranked, start=1):
        if isinstance(document, dict):
            document = f"{document.get('title') or ''} {document['text']}".strip()
        # Text, not markup: brackets in a document are its own.
        table.add_row(str(rank), f"{score:+.3f}", str(index), Text(" ".join(document.split())))
    Console().print(table)


def main(argv: list[str] | None = None) -> None:
    """Run the command line: exit code 0, or 2 with one line on standard error where the input is at fault."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What a terminal cannot show, a lone surrogate for one, is escaped: no ranking is lost to it.
            stream.reconfigure(errors="backslashreplace")
    try:
        app(args=argv)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        message = " ".join(str(error).split())
        print(f"querit: {message}", file=sys.stderr)
        sys.exit(2)


def run() -> None:
    """The console script: `main` in a process of its own, which ends as soon as the work is done.

    An interpreter that has imported torch and transformers takes more than a second to take them down object by object.
    """
    try:
        main()
    except SystemExit as end:
        # A profiler or debugger has something to do yet.
        if isinstance(end.code, int) and not (sys.getprofile() or sys.gettrace()) and _is_told():
            os._exit(end.code)
        raise


def _is_told() -> bool:
    """Do what is left to be done at the end; False if what was printed could not be written, which Python tells of."""
    # What Python does first at its own end, and multiprocessing in a child: uploads end here, and trackers close.
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except OSError:
        return False
    return True
