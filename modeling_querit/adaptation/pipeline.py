"""`querit adapt`: the stages one after the other, each from files to files."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow
from filelock import FileLock, Timeout

from ..files import replacing, sha256, write_jsonl
from ..retrieval.collection import check_judgements
from ..retrieval.dense import check_index, check_package
from ..retrieval.runs import is_run, write_run
from ..training.checks import check_settings
from ..training.record import FREE
from ..training.run import train
from ..training.settings import as_flags, parse
from . import corpus as corpora
from .building import check_options, make_first_stages, make_generators, make_teachers
from .candidates import FirstStage, Fused, draw_candidates, rank_queries
from .corpus import Document
from .extractive import ExtractiveGenerator
from .filters import Query, judged
from .fingerprints import fingerprint_of, identities_of, models_of
from .generators import Generator
from .manifest import Manifest, in_words
from .processes import Processes
from .prompts import read_examples
from .queries import requests_for, write_queries
from .report import write_report
from .scoring import pairs_of, rows_of, score_pairs
from .settings import EXTRACTIVE, AdaptSettings
from .shards import Shards, key_of
from .teachers import Teacher
from .weights import check_there

logger = logging.getLogger(__name__)

# In the folder of training: what it was begun with.
_MARK = "fingerprint.txt"
_LOCK = ".lock"
_LENGTH = {"max_steps", "num_train_epochs"}


@dataclass(frozen=True)
class Stage:
    """What a stage depends on and leaves behind.

    Args:
        name: Its name, and that of its section of the settings.
        reads: Files in `data/`.
        writes: Files of the run's folder, as patterns.
        sections: Other settings that it depends on.
        is_shared_out: Whether all processes take part.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    sections: tuple[str, ...]
    is_shared_out: bool = False


_STAGES = (
    Stage("corpus", (), ("data/corpus.jsonl", "data/sample.jsonl"), ("corpus",)),
    # Queries make their round trip through the first stages.
    Stage(
        "queries",
        ("corpus.jsonl", "sample.jsonl"),
        ("data/queries.jsonl", "data/dropped_queries.jsonl"),
        ("queries", "candidates"),
    ),
    Stage("candidates", ("corpus.jsonl", "queries.jsonl"), ("data/run.trec", "data/candidates.jsonl"), ("candidates",)),
    Stage(
        "teachers",
        ("corpus.jsonl", "queries.jsonl", "candidates.jsonl"),
        ("data/train.jsonl",),
        ("teachers", "candidates", "queries"),
        is_shared_out=True,
    ),
    Stage(
        "train",
        ("train.jsonl",),
        ("train/model/*.json", "train/model/*.safetensors", "train/teachers.json"),
        ("train", "teachers"),
        is_shared_out=True,
    ),
    Stage(
        "report",
        ("queries.jsonl", "train.jsonl"),
        ("report/report.md", "report/figures.json", "report/*.png"),
        (
            *("evaluation", "evaluation_depth", "evaluation_max_length", "evaluation_dtype"),
            *("train", "teachers", "candidates"),
        ),
    ),
)
STAGES = tuple(stage.name for stage in _STAGES)


class Adaptation:
    """A run of `querit adapt`: a folder, and what has been done in it.

    A stage that has ended is not done again, unless its settings, what it reads or what it wrote have changed. One
    that was killed goes on where it stopped: queries and scores are on disk batch by batch, training has checkpoints.

    Args:
        settings: Of all stages.
        echo: Told in a line what each stage has done.

    Example:
        ```python
        >>> Adaptation(AdaptSettings.load("scifact.yaml")).run()
        ```
    """

    def __init__(self, settings: AdaptSettings, echo: Callable[[str], None] = logger.info):
        self.settings, self.echo = settings, echo
        self.folder = Path(settings.output_dir)
        self.data, self.kept = self.folder / "data", self.folder / "cache"
        self.processes, self.manifest = Processes.here(), Manifest(self.folder)
        self.bands, self.limits = settings.candidates.bands(), settings.queries.limits()

    def run(self, stages: Sequence[str] = STAGES) -> None:
        """Do the stages, as far as they have not been done.

        Raises:
            ValueError: if a stage is unknown, what it reads is not there, or its settings are at fault.
        """
        for name in stages:
            if name not in STAGES:
                raise ValueError(f"stage is {name!r}: choose from {', '.join(STAGES)}.")
        self._check()
        self._forget()
        with self._alone():
            for stage in _STAGES:
                if stage.name in stages and (stage.is_shared_out or self.processes.is_main):
                    self._do(stage)
                self.processes.wait()

    def _check(self) -> None:
        """What can be told now is not told in the middle of the night."""
        for name in (*self.settings.candidates.first_stages, *self.settings.teachers):
            check_package(name)
        for name in models_of(self.settings, ("queries", "candidates", "teachers", "train")):
            check_there(name)
        check_index(self.settings.candidates.index)
        if (examples := self.settings.queries.examples) is not None:
            read_examples(examples)
        check_options(self.settings)
        self._check_training()
        for source in self.settings.evaluation:
            folder, _, split = source.partition(":")
            check_judgements(folder, split or "test")

    def _check_training(self) -> None:
        where = "the section train"
        flags = as_flags(self.settings.training(self.data / "train.jsonl", self.folder / "train"), where)
        try:
            check_settings(*parse(flags))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    # -- Stages

    def do_corpus(self) -> dict[str, Any]:
        """Documents, and those of them that queries are written for."""
        args, dropped = self.settings.corpus, Counter()
        cut: Counter[str] = Counter()
        read = corpora.cut_all(corpora.read_documents(args.source, dropped), args.max_chars, cut)
        wanted = corpora.with_languages(read, args.languages, dropped)
        documents = list(corpora.drop_near_duplicates(wanted, dropped, args.similarity))
        if len(documents) < 2:
            raise ValueError(
                f"{', '.join(args.source)}: {len(documents)} documents are left, but a reranker compares two or more. "
                f"Dropped: {in_words(dropped) or 'none'}."
            )
        chosen = corpora.sample(documents, args.sample, self.settings.seed)
        write_jsonl(documents, self.data / "corpus.jsonl")
        write_jsonl([each["_id"] for each in chosen], self.data / "sample.jsonl")
        languages = Counter(each["language"] for each in documents)
        return {"documents": len(documents), **cut, "sample": len(chosen), "languages": languages, "dropped": dropped}

    def do_queries(self) -> dict[str, Any]:
        """Queries for the sample, and what was dropped."""
        args, dropped, reasons = self.settings.queries, Counter(), []
        sample = [self.documents[name] for name in _jsonl(self.data / "sample.jsonl")]
        examples = read_examples(args.examples) if args.examples else []
        options = (args.styles, args.per_document, args.languages, examples, self.settings.seed)
        requests = requests_for(sample, *options)
        kept = Shards(self.kept / "queries", pyarrow.string())
        fallback = (EXTRACTIVE, self._extractive) if args.fallback else None
        with _progress("queries", len(requests)) as advance:
            written = list(write_queries(requests, self.generators, kept, dropped, fallback, advance))
        first_stage = Fused(list(self.first_stages.values())) if args.round_trip else None
        queries: list[Query] = []
        for query, reason in judged(written, self.documents, self.limits, first_stage):
            if reason is None:
                queries.append(query)
            else:
                dropped[reason] += 1
                reasons.append({"reason": reason, **asdict(query)})
        path = self.data / "dropped_queries.jsonl"
        write_jsonl(reasons, path)
        if not queries:
            raise ValueError(f"No query is left of {len(requests)}: {in_words(dropped)}. They are in {path}.")
        write_jsonl(map(_as_beir, queries), self.data / "queries.jsonl")
        styles = Counter(f"{each.language}, {each.style}, {each.generator}" for each in queries)
        counts = {"requests": len(requests), "queries": len(queries), "dropped": dropped, "kinds": styles}
        return counts | {"repeated": _repeated(self.generators)}

    def do_candidates(self) -> dict[str, Any]:
        """A ranking for each query, and the documents drawn from it."""
        args = self.settings.candidates
        runs = [name for name in args.first_stages if is_run(name)]
        texts = {each["_id"]: each["text"] for each in self.queries}
        run = rank_queries(texts, self.documents, list(self.first_stages.values()), runs, args.depth)
        write_run(run, self.data / "run.trec")
        sources = {each["_id"]: each["metadata"]["document"] for each in self.queries}
        drawn = list(draw_candidates(run, sources, list(self.documents), self.bands, self.settings.seed))
        write_jsonl(drawn, self.data / "candidates.jsonl")
        return {"queries": len(drawn), "pairs": sum(len(each["documents"]) for each in drawn)}

    def do_teachers(self) -> dict[str, Any]:
        """Scores, by all processes; rows, by the main one."""
        candidates = list(_jsonl(self.data / "candidates.jsonl"))
        texts = {each["_id"]: each["text"] for each in self.queries}
        pairs = pairs_of(candidates, texts, self.documents)
        here = {"process": self.processes.index, "processes": self.processes.count}
        with _progress("scores", len(pairs) * len(self.teachers) // self.processes.count) as advance:
            set_aside = score_pairs(self.teachers, pairs, self.kept / "scores", **here, advance=advance)
        found = self.processes.gather((set_aside, _repeated(self.teachers)))
        if not self.processes.is_main:
            return {}
        left_out: Counter[str] = Counter()
        read = (candidates, texts, self.documents, self.teachers, self.kept / "scores", left_out)
        rows = list(rows_of(*read, self.settings.queries.masked, self.settings.seed))
        if not rows:
            raise ValueError(f"No query has two documents with scores of all teachers: {in_words(left_out)}.")
        write_jsonl(rows, self.data / "train.jsonl")
        set_aside, repeated = (sum(counts, Counter()) for counts in zip(*found, strict=True))
        counts = {"rows": len(rows), "pairs": len(pairs), "set aside": set_aside, "left out": left_out}
        return counts | {"repeated": repeated}

    def do_train(self) -> dict[str, Any]:
        """The student: `train/model`."""
        rows, folder = self.data / "train.jsonl", self.folder / "train"
        given = self.settings.training(rows, folder)
        if self.processes.is_main:
            # Training goes on, if it stopped, as long as these are the same: of another length, rates would be others.
            deciding = {name: value for name, value in given.items() if name not in FREE - _LENGTH}
            _make_way(folder, key_of(deciding, sha256(rows), identities_of([given["model"]])).hex())
        self.processes.wait()
        train(*parse(as_flags(given, "the section train")))
        return {}

    def do_report(self) -> dict[str, Any]:
        """`report/report.md`, and its pictures."""
        if missing := [name for name in STAGES[:-2] if name not in self.manifest.stages]:
            raise ValueError(f"{self.manifest.path} does not tell of stage {missing[0]}: do it before the report.")
        rows = list(_jsonl(self.data / "train.jsonl"))
        return write_report(self.settings, self.manifest.stages, self.queries, rows)

    # -- What stages read, loaded once

    @cached_property
    def documents(self) -> dict[str, Document]:
        """By id."""
        return {each["_id"]: each for each in _jsonl(self.data / "corpus.jsonl")}

    @cached_property
    def queries(self) -> list[dict[str, Any]]:
        """As in `data/queries.jsonl`."""
        return list(_jsonl(self.data / "queries.jsonl"))

    @cached_property
    def first_stages(self) -> dict[str, FirstStage]:
        """The indexes, by name."""
        return make_first_stages(self.settings.candidates, self.documents, self.kept / "embeddings")

    @cached_property
    def generators(self) -> dict[str, Generator]:
        """By name."""
        return make_generators(self.settings.queries.generators, self._extractive)

    @cached_property
    def _extractive(self) -> ExtractiveGenerator:
        return ExtractiveGenerator(list(self.documents.values()), self.settings.seed)

    @cached_property
    def teachers(self) -> dict[str, Teacher]:
        """By name."""
        settings, folder = self.settings, self.kept / "embeddings"
        return make_teachers(settings.teachers, settings.candidates, self.first_stages, self.documents, folder)

    # -- What has been done

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other command works in the folder."""
        if not self.processes.is_main:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"Another querit adapt is at work in {self.folder}: wait for it, or end it.") from None
        try:
            yield
        finally:
            lock.release()

    def _do(self, stage: Stage) -> None:
        missing = [name for name in stage.reads if not (self.data / name).exists()]
        if missing:
            raise ValueError(
                f"Stage {stage.name} reads {self.data / missing[0]}, which is not there: do the stages before it first."
            )
        fingerprint = self._fingerprint(stage)
        done = self.manifest.done(stage.name, fingerprint)
        # All have looked before the main process writes anything.
        if stage.is_shared_out:
            self.processes.wait()
        if done is None:
            start = time.perf_counter()
            counts = getattr(self, f"do_{stage.name}")()
            if self.processes.is_main:
                written = [path for pattern in stage.writes for path in sorted(self.folder.glob(pattern))]
                seconds, settings = time.perf_counter() - start, self.settings.model_dump(mode="json")
                self.manifest.record(stage.name, fingerprint, written, counts, seconds, settings)
        else:
            counts = {"done before": "", **done}
        if self.processes.is_main:
            self.echo(f"{STAGES.index(stage.name) + 1}/{len(STAGES)} {stage.name}: {in_words(counts) or 'done'}")

    def _forget(self) -> None:
        """What was loaded in a run before belongs to files that may be others now."""
        for name, value in vars(type(self)).items():
            if isinstance(value, cached_property):
                vars(self).pop(name, None)

    def _fingerprint(self, stage: Stage) -> str:
        reads = [self.data / name for name in stage.reads]
        found = fingerprint_of(self.settings, stage.name, stage.sections, reads)
        # It tells of them, too.
        return key_of(found, self._counts()).hex() if stage.name == "report" else found

    def _counts(self) -> dict[str, Any]:
        return {name: each["counts"] for name, each in self.manifest.stages.items() if name != "report"}


def _make_way(folder: Path, fingerprint: str) -> None:
    """Move aside what was begun with other rows, settings or weights: it cannot go on with these."""
    mark = folder / _MARK
    if folder.exists() and not (mark.exists() and mark.read_text() == fingerprint):
        names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(1))
        aside = next(path for path in names if not path.exists())
        folder.rename(aside)
        logger.warning("%s was made with other rows, settings or weights: it is %s now.", folder, aside)
    if not mark.exists():
        with replacing(mark) as aside:
            aside.write_text(fingerprint, encoding="utf-8")


def _repeated(asked: Mapping[str, Any]) -> Counter[str]:
    """How often each server was asked again, and why."""
    servers = {name: each.endpoint for name, each in asked.items() if hasattr(each, "endpoint")}
    return Counter({f"{name} {why}": n for name, each in servers.items() for why, n in each.repeated.items()})


def _as_beir(query: Query) -> dict[str, Any]:
    values = asdict(query)
    return {"_id": values.pop("id"), "text": values.pop("text"), "metadata": values}


def _jsonl(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}. Remove the file, and it is made again.") from None


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.update(task, advance=count)
