"""`querit evaluate`: candidates, then scores, then results, each in files, so that any of it can be interrupted."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..cache import key_of
from ..checkpoints.identity import identity_of
from ..checkpoints.loading import default_device, load_model
from ..files import atomic_write, plain_json, read_json, write_json
from ..retrieval.collection import Collection
from ..retrieval.runs import Run, check_id, read_run, write_run
from .evaluate import FIRST_STAGE, Evaluation, Reranker, evaluate_scores, score_query
from .first_stages import (
    Candidates,
    check_collection,
    find_candidates,
    identity_of_first_stage,
    sample_queries,
)
from .mteb_tasks import MtebSplit, measure_tasks
from .report import write_report
from .score_store import ScoreStore, share
from .settings import QRELS_NAME, file_name

if TYPE_CHECKING:
    from .settings import EvaluationSettings
    from .sources import CollectionSource

RECORD_FILE, QRELS_FILE, EMBEDDINGS_FOLDER = "evaluation.json", f"{QRELS_NAME}.trec", "embeddings"
# How long a process waits for the others, which may score for days.
_PROCESS_TIMEOUT = timedelta(days=7)
# Settings that may change when an evaluation is resumed, since they change no score.
_FREE_SETTINGS = ("device", "output")


class EvaluationPipeline:
    """An evaluation in one folder.

    What is done already is read from the folder: the same settings resume an evaluation that was killed. Under
    `accelerate launch`, processes share out the queries, and the files are the same.

    Args:
        settings: Models, collections and options.
        echo: Function called with a line for each step and each warning.

    Example:
        ```python
        >>> EvaluationPipeline(EvaluationSettings(("mini",), ("data/scifact:test",))).run()
        ```
    """

    def __init__(self, settings: EvaluationSettings, echo: Callable[[str], None] = lambda line: None):
        self.settings, self.folder = settings, settings.output
        self.names = settings.model_names()
        self.tasks = settings.find_tasks()
        self.sources = settings.sources(self.tasks)
        settings.check(self.sources)
        # Unless it is told to use CPUs, accelerate does not connect processes on a machine without an accelerator.
        self.process = PartialState(cpu=not torch.accelerator.is_available(), timeout=_PROCESS_TIMEOUT)
        self._echo = echo if self.process.is_main_process else lambda line: None
        self._collection: tuple[str, Collection] | None = None

    def run(self) -> dict[str, Any]:
        """Evaluate, as far as it is not done yet.

        Returns:
            What `results.json` holds; empty in all processes but the main one.

        Raises:
            ValueError: if a collection cannot be measured, or the folder holds another evaluation.
        """
        if self.process.is_main_process:
            self._check_record()
            for source in self.sources:
                self._write_candidates(source)
        self.process.wait_for_everyone()
        with self._progress() as advance:
            for name in self.names:
                self._score(name, advance)
        results = self._write_results() if self.process.is_main_process else {}
        self.process.wait_for_everyone()
        return results

    def disconnect(self) -> None:
        """Disconnect this process from the others; a process that exits while it is connected may hang or crash."""
        gc.collect()
        self.process.destroy_process_group()

    # Record

    @cached_property
    def _record(self) -> dict[str, Any]:
        """What decides the results: settings, and the identities of models and collections."""
        settings = dataclasses.asdict(self.settings)
        return {
            "settings": {name: value for name, value in settings.items() if name not in _FREE_SETTINGS},
            "models": {name: identity_of(model) for name, model in self.names.items()},
            "first_stage": {self.settings.first_stage: identity_of_first_stage(self.settings.first_stage)},
            "collections": {source.name: source.identity() for source in self.sources},
        }

    def _check_record(self) -> None:
        """Check that the folder is new, or that of the same evaluation."""
        path = self.folder / RECORD_FILE
        if not path.exists():
            # Embeddings of an evaluation that was killed before its first candidates were found are used again.
            if self.folder.exists() and any(entry.name != EMBEDDINGS_FOLDER for entry in self.folder.iterdir()):
                raise FileExistsError(f"{self.folder} holds other files: name another output.")
            return
        before, now = read_json(path), plain_json(self._record)
        for part in now:
            if before.get(part) != now[part]:
                old, new = before.get(part, {}), now[part]
                differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
                raise FileExistsError(
                    f"{self.folder} holds an evaluation of other {part} ({', '.join(differing)}): name another output."
                )

    # Candidates

    def _paths(self, source: CollectionSource) -> Path:
        return self.folder / "runs" / file_name(source.name)

    def _write_candidates(self, source: CollectionSource) -> None:
        """Write the judgements and the first stage's run of a collection; the run last."""
        folder, settings = self._paths(source), self.settings
        if (folder / f"{FIRST_STAGE}.trec").exists():
            return
        self._echo(f"{source.name}: first stage {settings.first_stage}")
        collection = self._load(source)
        queries = sample_queries(collection, settings.limit, settings.seed)
        if warning := check_collection(collection, queries):
            self._echo(f"warning: {warning}")
        if isinstance(source, MtebSplit) and settings.limit is None:
            # mteb wants to see all queries.
            queries = sorted(collection.qrels)
        embeddings = self.folder / EMBEDDINGS_FOLDER / key_of(self._record["first_stage"]).hex()
        candidates = find_candidates(collection, settings.first_stage, queries, settings.depth, embeddings)
        if empty := [query for query in queries if not candidates[query]]:
            self._echo(f"warning: {source.name}: {len(empty)} queries have no candidates, and count as 0.")
        for query in queries:
            for identifier in (query, *collection.qrels[query], *candidates[query]):
                check_id(identifier, source.name)
        if not (self.folder / RECORD_FILE).exists():
            write_json(self._record, self.folder / RECORD_FILE)
        _write_qrels({query: collection.qrels[query] for query in queries}, folder / QRELS_FILE)
        _write_scores(candidates, folder / f"{FIRST_STAGE}.trec", FIRST_STAGE)

    def _read_candidates(self, source: CollectionSource) -> Candidates:
        run = read_run(self._paths(source) / f"{FIRST_STAGE}.trec")
        return {query: dict(run.get(query, ())) for query in _read_qrels(self._paths(source) / QRELS_FILE)}

    def _load(self, source: CollectionSource) -> Collection:
        """Read a collection; the last one is kept, as it is often the next one."""
        if self._collection is None or self._collection[0] != source.name:
            self._collection = None
            self._collection = source.name, source.load()
        return self._collection[1]

    # Scores

    def _run_path(self, source: CollectionSource, name: str) -> Path:
        return self._paths(source) / f"{file_name(name)}.trec"

    def _store(self, source: CollectionSource, name: str) -> ScoreStore:
        return ScoreStore(self.folder / "scores" / file_name(source.name) / file_name(name))

    def _score(self, name: str, advance: Callable[[int], None]) -> None:
        """Score the candidates of all collections by one model."""
        model: Reranker | None = None
        for source in self.sources:
            path, store = self._run_path(source, name), self._store(source, name)
            is_done = path.exists()
            candidates = {} if is_done else self._read_candidates(source)
            done = {} if is_done else store.read()
            # No process may write before all have read what there is.
            self.process.wait_for_everyone()
            if is_done:
                continue
            queries = share(list(candidates), done, self.process.process_index, self.process.num_processes)
            if queries:
                model = model or self._load_model(self.names[name])
                collection = self._load(source)
                for query in queries:
                    scores = score_query(model, collection, query, list(candidates[query]), self._predict_options)
                    store.add(query, scores, self.process.process_index)
                    advance(len(scores))
                store.close()
            self.process.wait_for_everyone()
            if self.process.is_main_process:
                scores_by_query = store.read()
                scored = {
                    query: dict(zip(hits, scores_by_query[query], strict=True)) for query, hits in candidates.items()
                }
                _write_scores(scored, path, file_name(name))
                store.remove()
            self.process.wait_for_everyone()

    def _load_model(self, model: str) -> Reranker:
        is_alone = self.process.num_processes == 1
        device = self.settings.device or (default_device() if is_alone else self.process.device)
        return load_model(model, self.settings.dtype, self.settings.int8, device)

    @property
    def _predict_options(self) -> dict[str, Any]:
        options = {"max_length": self.settings.max_length, "instruction": self.settings.instruction}
        return options | {"show_progress_bar": False}

    @contextmanager
    def _progress(self) -> Iterator[Callable[[int], None]]:
        """Show pairs done and time left, on a terminal: those of the main process, which has its share of all."""
        total = sum(
            len(hits)
            for name in self.names
            for source in self.sources
            if not self._run_path(source, name).exists()
            for done in [self._store(source, name).read()]
            for query, hits in self._read_candidates(source).items()
            if query not in done
        )
        hide = None if self.process.is_main_process else True
        with tqdm(
            total=total // self.process.num_processes, desc="Scoring", unit="pair", disable=hide, leave=False
        ) as bar:
            yield lambda count: bar.update(count) and None

    # Results

    def _write_results(self) -> dict[str, Any]:
        """Write `results.json` and its plot, and let mteb measure its tasks."""
        evaluations = [self._evaluation(source) for source in self.sources]
        main_scores = self._measure_tasks() if self.tasks and self.settings.limit is None else {}
        names = {"models": list(self.names), "collections": [source.name for source in self.sources]}
        return write_report(evaluations, list(self.names), self._record["settings"] | names, main_scores, self.folder)

    def _evaluation(self, source: CollectionSource) -> Evaluation:
        qrels, candidates = _read_qrels(self._paths(source) / QRELS_FILE), self._read_candidates(source)
        scores = {}
        for name in self.names:
            run = {query: dict(hits) for query, hits in read_run(self._run_path(source, name)).items()}
            scores[name] = {
                query: [run[query][document] for document in hits] for query, hits in candidates.items() if hits
            }
            scores[name] |= {query: [] for query, hits in candidates.items() if not hits}
        return evaluate_scores(scores, Collection(source.name, {}, {}, qrels), candidates, self.settings.seed)

    def _measure_tasks(self) -> dict[str, dict[str, float]]:
        """Task -> model -> main score of mteb."""
        splits = [source for source in self.sources if isinstance(source, MtebSplit)]
        main_scores: dict[str, dict[str, float]] = {task.metadata.name: {} for task in self.tasks}
        for name, model in self.names.items():
            runs: dict[tuple[str, str, str], Run] = {
                split.key: read_run(self._run_path(split, name)) for split in splits
            }
            for task, score in measure_tasks(model, self.tasks, runs, self.folder / "mteb").items():
                main_scores[task][name] = score
        return main_scores


def _write_scores(scores: Mapping[str, Mapping[str, float]], path: Path, tag: str) -> None:
    """Write a run, best first; equal scores keep their order."""
    run = {query: sorted(hits.items(), key=lambda hit: -hit[1]) for query, hits in scores.items()}
    write_run(run, path, tag)


def _write_qrels(qrels: Mapping[str, Mapping[str, int]], path: Path) -> None:
    lines = [f"{query} 0 {document} {grade}\n" for query, grades in qrels.items() for document, grade in grades.items()]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def _read_qrels(path: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        query, _, document, grade = line.split()
        qrels.setdefault(query, {})[document] = int(grade)
    return qrels
