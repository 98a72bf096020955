"""The six stages of an adaptation: what each reads, writes and depends on, and how it runs.

To add a stage, write a class with the members of `Stage`, and list it in `STAGES`.
"""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from accelerate import PartialState
from accelerate.utils import gather_object

from ..cache import TEXTS, DiskCache, key_of
from ..files import atomic_write, read_jsonl, sha256, write_jsonl
from ..retrieval.collection import Source
from ..retrieval.runs import is_run, write_run
from ..training.arguments import settings_from_mapping
from ..training.distillation import TEACHERS_FILE
from ..training.record import CHANGEABLE_ON_RESUME
from ..training.train import train
from .candidates import FirstStage, FusedFirstStage, draw_candidates, make_first_stages, rank_queries
from .corpus import (
    CorpusDocument,
    add_languages,
    drop_near_duplicates,
    read_corpus,
    sample,
    source_files,
    truncate_all,
)
from .endpoint import count_retries
from .extractive import ExtractiveGenerator
from .filters import Query, filter_queries
from .generators import Generator, make_generators
from .manifest import Counts, Dependencies, Manifest, model_identities, summarize
from .prompts import read_examples
from .queries import make_requests, write_queries
from .report import QueryRow, write_report
from .scoring import make_rows, pairs_of, score_with_teachers
from .settings import EXTRACTIVE, AdaptSettings
from .teachers import Teacher, make_teachers

logger = logging.getLogger(__name__)

# Files that one stage writes and a later one reads, in the run's folder.
CORPUS, SAMPLE = "data/corpus.jsonl", "data/sample.jsonl"
QUERIES, DROPPED_QUERIES = "data/queries.jsonl", "data/dropped_queries.jsonl"
RANKINGS, CANDIDATES, TRAIN_ROWS = "data/run.trec", "data/candidates.jsonl", "data/train.jsonl"
# In the training folder: fingerprint of the rows, settings and weights that it began with.
_FINGERPRINT_FILE = "fingerprint.txt"
# Settings that a resumed training may change, but that change the learning rate schedule from its first step on.
_SCHEDULE_SETTINGS = {"max_steps", "num_train_epochs"}


class Context:
    """Shared state of a run: settings, folders, and lazily loaded data and models.

    Args:
        settings: Settings of the run.
        process: State of this process.
    """

    def __init__(self, settings: AdaptSettings, process: PartialState):
        self.settings, self.process = settings, process
        self.folder = Path(settings.output_dir)
        self.cache = self.folder / "cache"
        self.manifest = Manifest(self.folder)

    @cached_property
    def documents(self) -> dict[str, CorpusDocument]:
        """Documents by id."""
        return {document["_id"]: document for document in read_stage_file(self.folder / CORPUS)}

    @cached_property
    def query_rows(self) -> list[QueryRow]:
        """Rows of `data/queries.jsonl`."""
        return list(read_stage_file(self.folder / QUERIES))

    @property
    def query_texts(self) -> dict[str, str]:
        """Texts of the queries by id."""
        return {row["_id"]: row["text"] for row in self.query_rows}

    @cached_property
    def first_stages(self) -> dict[str, FirstStage]:
        """First stages by name."""
        return make_first_stages(self.settings.candidates, self.documents, self.cache / "embeddings")

    @cached_property
    def extractive(self) -> ExtractiveGenerator:
        """The extractive generator of the collection."""
        return ExtractiveGenerator(list(self.documents.values()), self.settings.seed)

    @cached_property
    def generators(self) -> dict[str, Generator]:
        """Generators by name."""
        return make_generators(self.settings.queries.generators, self.extractive)

    @cached_property
    def teachers(self) -> dict[str, Teacher]:
        """Teachers by name."""
        settings, cache = self.settings, self.cache / "embeddings"
        return make_teachers(settings.teachers, settings.candidates, self.first_stages, self.documents, cache)


class Stage(ABC):
    """A step of an adaptation, from files to files.

    Attributes:
        name: Name of the stage, for `--stage` and the manifest.
        reads: Files of earlier stages, in the run's folder.
        writes: Patterns of the files that it writes, in the run's folder.
        sections: Names of the settings and sections that its result depends on.
        runs_on_all_processes: Whether it runs on all processes, not on the main one alone.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[tuple[str, ...]]
    sections: ClassVar[tuple[str, ...]]
    runs_on_all_processes: ClassVar[bool] = False

    def depends_on(self, context: Context) -> Dependencies:
        """Return all that the result depends on, besides the seed and `reads`."""
        return Dependencies(self.sections, context.settings.local_models(self.sections))

    @abstractmethod
    def run(self, context: Context) -> Counts:
        """Run the stage, and return what to report; only the main process writes files, and reports."""


class CorpusStage(Stage):
    """Documents, and the sample of them that queries are written for."""

    name = "corpus"
    writes = (CORPUS, SAMPLE)
    sections = ("corpus",)

    def depends_on(self, context: Context) -> Dependencies:
        """Depends on the section and its source files."""
        sources = context.settings.corpus.source
        return Dependencies(self.sections, files=[file for source in sources for file in source_files(source)])

    def run(self, context: Context) -> Counts:
        """Read, truncate, select by language, deduplicate, sample."""
        settings, dropped, truncated = context.settings.corpus, Counter[str](), Counter[str]()
        texts = truncate_all(read_corpus(settings.source, dropped), settings.max_chars, truncated)
        in_languages = add_languages(texts, settings.languages, dropped)
        documents = list(drop_near_duplicates(in_languages, dropped, settings.similarity))
        if len(documents) < 2:
            raise ValueError(
                f"{', '.join(settings.source)}: {len(documents)} documents are left, but a reranker compares two or "
                f"more. Dropped: {summarize(dropped) or 'none'}."
            )
        sampled = sample(documents, settings.sample, context.settings.seed)
        write_jsonl(documents, context.folder / CORPUS)
        write_jsonl([document["_id"] for document in sampled], context.folder / SAMPLE)
        languages = Counter(document["language"] for document in documents)
        counts = {"documents": len(documents), **truncated, "sample": len(sampled)}
        return counts | {"languages": languages, "dropped": dropped}


class QueryStage(Stage):
    """Queries for the sample, filtered."""

    name = "queries"
    reads = (CORPUS, SAMPLE)
    writes = (QUERIES, DROPPED_QUERIES)
    # The round trip goes through the first stages.
    sections = ("queries", "candidates")

    def depends_on(self, context: Context) -> Dependencies:
        """Depends on the sections, their models, and the file of examples."""
        examples = context.settings.queries.examples
        models = context.settings.local_models(self.sections)
        return Dependencies(self.sections, models, [examples] if examples else [])

    def run(self, context: Context) -> Counts:
        """Draw requests, write queries, filter them."""
        settings, seed, dropped = context.settings.queries, context.settings.seed, Counter[str]()
        sampled = [context.documents[name] for name in read_stage_file(context.folder / SAMPLE)]
        examples = read_examples(settings.examples) if settings.examples else []
        requests = make_requests(sampled, settings.styles, settings.per_document, settings.languages, examples, seed)
        cache: DiskCache[str] = DiskCache(context.cache / "queries", TEXTS)
        fallback = (EXTRACTIVE, context.extractive) if settings.fallback else None
        with _progress_bar("queries", len(requests)) as advance:
            written = list(write_queries(requests, context.generators, cache, dropped, fallback, advance))
        first_stage = FusedFirstStage(list(context.first_stages.values())) if settings.round_trip else None
        queries: list[Query] = []
        dropped_rows = []
        for query, reason in filter_queries(written, context.documents, settings.limits(), first_stage):
            if reason is None:
                queries.append(query)
            else:
                dropped[reason] += 1
                dropped_rows.append({"reason": reason, **asdict(query)})
        path = context.folder / DROPPED_QUERIES
        write_jsonl(dropped_rows, path)
        if not queries:
            raise ValueError(f"No query is left of {len(requests)}: {summarize(dropped)}. They are in {path}.")
        write_jsonl(map(_query_row, queries), context.folder / QUERIES)
        kinds = Counter(f"{query.language}, {query.style}, {query.generator}" for query in queries)
        counts = {"requests": len(requests), "queries": len(queries), "dropped": dropped, "kinds": kinds}
        return counts | {"retries": count_retries(context.generators)}


class CandidateStage(Stage):
    """A ranking for each query, and the candidates drawn from it."""

    name = "candidates"
    reads = (CORPUS, QUERIES)
    writes = (RANKINGS, CANDIDATES)
    sections = ("candidates",)

    def depends_on(self, context: Context) -> Dependencies:
        """Depends on the section, its models, and its TREC runs."""
        models = context.settings.local_models(self.sections)
        return Dependencies(self.sections, models, [Path(path) for path in self._runs(context)])

    def run(self, context: Context) -> Counts:
        """Rank documents per query and sample candidates."""
        settings = context.settings.candidates
        first_stages, run_files = list(context.first_stages.values()), self._runs(context)
        rankings = rank_queries(context.query_texts, context.documents, first_stages, run_files, settings.depth)
        write_run(rankings, context.folder / RANKINGS)
        source_documents = {row["_id"]: row["metadata"]["document"] for row in context.query_rows}
        bands, seed = settings.bands(), context.settings.seed
        candidates = list(draw_candidates(rankings, source_documents, list(context.documents), bands, seed))
        write_jsonl(candidates, context.folder / CANDIDATES)
        return {"queries": len(candidates), "pairs": sum(len(candidate["documents"]) for candidate in candidates)}

    @staticmethod
    def _runs(context: Context) -> list[str]:
        return [name for name in context.settings.candidates.first_stages if is_run(name)]


class TeacherStage(Stage):
    """Training rows with the scores of all teachers."""

    name = "teachers"
    reads = (CORPUS, QUERIES, CANDIDATES)
    writes = (TRAIN_ROWS,)
    # Candidates: first stages may be teachers. Queries: `queries.masked` is the share of queries to mask.
    sections = ("teachers", "candidates", "queries")
    runs_on_all_processes = True

    def run(self, context: Context) -> Counts:
        """Score on all processes, make rows on the main one."""
        process, folder = context.process, context.cache / "scores"
        candidates = list(read_stage_file(context.folder / CANDIDATES))
        pairs = pairs_of(candidates, context.query_texts, context.documents)
        total = len(pairs) * len(context.teachers) // process.num_processes
        with _progress_bar("scores", total) as advance:
            failed_here = score_with_teachers(
                context.teachers,
                pairs,
                folder,
                process=process.process_index,
                processes=process.num_processes,
                advance=advance,
            )
        counts_by_process = gather_object([(failed_here, count_retries(context.teachers))])
        if not process.is_main_process:
            return {}
        dropped: Counter[str] = Counter()
        texts, settings = context.query_texts, context.settings
        inputs = (candidates, texts, context.documents, context.teachers, folder, dropped)
        rows = list(make_rows(*inputs, settings.queries.masked, settings.seed))
        if not rows:
            raise ValueError(f"No query has two documents with scores of all teachers: {summarize(dropped)}.")
        write_jsonl(rows, context.folder / TRAIN_ROWS)
        failed = sum((failed for failed, _ in counts_by_process), Counter[str]())
        retries = sum((retries for _, retries in counts_by_process), Counter[str]())
        return {"rows": len(rows), "pairs": len(pairs), "failed": failed, "dropped": dropped, "retries": retries}


class TrainStage(Stage):
    """The student, trained on the rows."""

    name = "train"
    reads = (TRAIN_ROWS,)
    writes = ("train/model/*.json", "train/model/*.safetensors", f"train/{TEACHERS_FILE}")
    # Teachers: their weights and calibrations.
    sections = ("train", "teachers")
    runs_on_all_processes = True

    def run(self, context: Context) -> Counts:
        """Train, or resume a training that began with the same rows, settings and weights."""
        rows, folder = context.folder / TRAIN_ROWS, context.folder / "train"
        mapping = context.settings.training(rows, folder)
        if context.process.is_main_process:
            ignored = CHANGEABLE_ON_RESUME - _SCHEDULE_SETTINGS
            fixed = {name: value for name, value in mapping.items() if name not in ignored}
            identities = model_identities([mapping["model"]])
            _set_aside_other_training(folder, key_of(fixed, sha256(rows), identities).hex())
        context.process.wait_for_everyone()
        train(settings_from_mapping(mapping, "the section train"))
        return {}


class ReportStage(Stage):
    """The report, with measurements on collections with relevance judgements."""

    name = "report"
    reads = (QUERIES, TRAIN_ROWS)
    writes = ("report/report.md", "report/figures.json", "report/*.png")
    sections = (
        *("evaluation", "evaluation_depth", "evaluation_max_length", "evaluation_dtype"),
        *("train", "teachers", "candidates"),
    )

    def depends_on(self, context: Context) -> Dependencies:
        """Depends on the sections, their models, the trained model, the collections, and the other stages' counts."""
        settings, folder = context.settings, context.folder / "train"
        files = [folder / TEACHERS_FILE, *sorted((folder / "model").glob("*.safetensors"))]
        files += [path for source in settings.evaluation for path in Source.parse(source).files()]
        counts = {name: record["counts"] for name, record in context.manifest.stages.items() if name != self.name}
        return Dependencies(self.sections, settings.local_models(self.sections), files, (counts,))

    def run(self, context: Context) -> Counts:
        """Measure the models, plot, and write the report."""
        records = context.manifest.stages
        # Training may have been run by hand.
        if missing := [stage.name for stage in STAGES[:-2] if stage.name not in records]:
            raise ValueError(f"{context.manifest.path} has no stage {missing[0]}: run it before the report.")
        rows = list(read_stage_file(context.folder / TRAIN_ROWS))
        return write_report(context.settings, records, context.query_rows, rows)


STAGES: tuple[Stage, ...] = (
    CorpusStage(),
    QueryStage(),
    CandidateStage(),
    TeacherStage(),
    TrainStage(),
    ReportStage(),
)


def read_stage_file(path: Path) -> Iterator[Any]:
    """Read a JSONL file that a stage has written.

    Raises:
        ValueError: if a line is damaged; the message names file and line.
    """

    def refuse(error: ValueError, line: bytes) -> None:
        raise ValueError(f"{error}. Remove the file, and its stage is run again.") from None

    return (row for _, row in read_jsonl(path, refuse))


def _query_row(query: Query) -> dict[str, Any]:
    values = asdict(query)
    return {"_id": values.pop("id"), "text": values.pop("text"), "metadata": values}


def _set_aside_other_training(folder: Path, fingerprint: str) -> None:
    """Rename the folder of a training that began with other rows, settings or weights, and so cannot be resumed."""
    path = folder / _FINGERPRINT_FILE
    if folder.exists() and not (path.exists() and path.read_text() == fingerprint):
        names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(1))
        new_name = next(name for name in names if not name.exists())
        folder.rename(new_name)
        logger.warning("%s was trained with other rows, settings or weights: renamed to %s.", folder, new_name)
    if not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_text(fingerprint, encoding="utf-8")


@contextmanager
def _progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.update(task, advance=count)
