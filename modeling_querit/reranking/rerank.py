"""`querit rerank --run`: a run or rows in, the same reranked out; resumed after a kill, on any number of processes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..checkpoints.identity import identity_of
from ..files import atomic_write, explain_full_disk, open_file, read_json, sha256, write_json
from ..modeling_querit import QueritForSequenceRanking
from ..rejects import Rejects
from ..retrieval.fusion import NORMALIZATIONS
from ..retrieval.texts import Texts, open_texts
from .output import Keep, fuse_by, write_output
from .shards import Shards, ShardWriter, shard_path
from .tasks import Tasks, stage_rows, stage_run

Result = TypeVar("Result")
_ROWS = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_TASKS_FILE, _RECORD_FILE, _OUTPUT_FILE = "tasks.sqlite", "settings.json", "output"
# How long a process waits for the others, which may score for days.
_PROCESS_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class BulkSettings:
    """What to rerank, and how.

    Args:
        model: Name of the model: "mini", a folder or a repository.
        run: TREC run, or JSONL rows of `{"query", "documents"}`; gzipped or not.
        output: File to write, a TREC run or rows with `scores`.
        collection: Collection with the texts of a run, as `open_texts` takes it; None for rows.
        depth: Number of documents of a query to rerank, by the score of the run; all by default.
        fuse: Weight of the run's scores in [0, 1], to which the model's are added with the rest; None for the model's
            alone.
        fusion: Key of `NORMALIZATIONS`.
        instruction: Task in one sentence; by default that of the model.
        max_length: Maximum number of tokens in a pair.
        skip_broken: Whether lines that cannot be used are set aside instead of raising.
        int8: Whether the model computes in int8.

    Raises:
        ValueError: if a value is out of range, or a collection is missing or of no use.
    """

    model: str
    run: str
    output: str
    collection: str | None = None
    depth: int | None = None
    fuse: float | None = None
    fusion: str = "min-max"
    instruction: str | None = None
    max_length: int | None = None
    skip_broken: bool = False
    int8: bool = False

    def __post_init__(self) -> None:
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"--depth is {self.depth}: rerank at least one document of a query.")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"--max-length is {self.max_length}: a pair has at least one token.")
        if self.fuse is not None and not 0 <= self.fuse <= 1:
            raise ValueError(f"--fuse is {self.fuse}: the weight of the run's scores is in [0, 1].")
        if self.fusion not in NORMALIZATIONS:
            raise ValueError(f"--fusion is {self.fusion!r}: choose from {', '.join(NORMALIZATIONS)}.")
        if self.is_rows and self.collection is not None:
            raise ValueError(f"{self.run} has rows, which hold their texts: leave out --collection.")
        if not self.is_rows and self.collection is None:
            raise ValueError(f"{self.run} is a run of ids: give the collection with their texts, --collection FOLDER.")

    @property
    def is_rows(self) -> bool:
        """Whether the input is rows, by its name, and not a TREC run."""
        return self.run.endswith(_ROWS)

    @property
    def work_folder(self) -> Path:
        """Folder beside the output where the work lies until it is done."""
        return Path(f"{self.output}.parts")

    @property
    def rejects_file(self) -> Path:
        """File of the lines that are set aside."""
        return Path(f"{self.output}.rejects.jsonl")


class BulkResult(NamedTuple):
    """What a bulk reranking did: numbers of queries, of pairs, and of lines that were set aside."""

    queries: int
    pairs: int
    rejected: int


def rerank_in_bulk(
    settings: BulkSettings,
    load: Callable[[str | None], QueritForSequenceRanking],
    make_keep: Callable[[QueritForSequenceRanking], Keep] | None = None,
) -> BulkResult | None:
    """Rerank a run or rows to a new file, in constant memory.

    The work is divided into blocks of whole queries, each scored by itself, so that the output does not depend on the
    number of processes (of `torchrun` or `accelerate launch`; those of several machines share the output's file
    system) nor on kills. The same call resumes: a block whose scores are on disk is not scored again. The output is
    written atomically, and is complete once it is there.

    Args:
        settings: Model, input, output and options.
        load: Function that loads the model on a device; None is the default device.
        make_keep: Function that makes the `keep` of `write_output` for the model.

    Returns:
        What was done; None in all but the main process.

    Raises:
        OSError: if an input or the output's folder is missing, the output exists, or the disk is full.
        ValueError: if a line is broken, an id has no text, another process writes to the same output, or the scores on
            disk are of other settings.
    """
    # Unless it is told to use CPUs, accelerate does not connect processes on a machine without an accelerator.
    process = PartialState(cpu=not torch.accelerator.is_available(), timeout=_PROCESS_TIMEOUT)
    texts = open_texts(settings.collection) if settings.collection is not None else None
    _check_run(settings.run)
    _on_main_process(process, lambda: _check_output(settings))
    model = load(str(process.device) if process.num_processes > 1 else None)
    keep = make_keep(model) if make_keep else None
    result = _Bulk(settings, process, model).run(texts, keep)
    # A process that exits while it is connected to the others may hang or crash.
    process.destroy_process_group()
    return result


def _check_run(run: str) -> None:
    if Path(run).is_fifo():
        raise ValueError(f"{run} is a pipe, which cannot be read again after a kill: write it to a file first.")
    open_file(run).close()


def _on_main_process(process: PartialState, action: Callable[[], None]) -> None:
    """Do something in the main process while the others wait; if it fails there, they end too, without a word.

    Raises:
        SystemExit: in the other processes, if it fails.
    """
    error: Exception | None = None
    if process.is_main_process:
        try:
            action()
        except (OSError, ValueError) as caught:
            error = caught
    has_failed = _together(lambda: broadcast_object_list([error is not None])[0])
    if error is not None:
        raise error
    if has_failed:
        raise SystemExit(2)


def _together(exchange: Callable[[], Result]) -> Result:
    """Exchange something with the other processes.

    Raises:
        ChildProcessError: if one of them has ended.
    """
    try:
        return exchange()
    except RuntimeError:
        raise ChildProcessError("Another process of this command has ended early: see what it says.") from None


def _check_output(settings: BulkSettings) -> None:
    output = Path(settings.output)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {output.parent} for {output.name}: make it first.")
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder: name a file.")
    if not os.access(output.parent, os.W_OK):
        raise PermissionError(f"{output} cannot be written: no write permission in {output.parent}.")
    if output.exists() and not (settings.work_folder / _RECORD_FILE).exists():
        raise FileExistsError(f"{output} exists: remove it, or name a new file.")


class _Bulk:
    """One process of a bulk reranking."""

    def __init__(self, settings: BulkSettings, process: PartialState, model: QueritForSequenceRanking):
        self.settings, self.process, self.model = settings, process, model
        self.folder = settings.work_folder

    def run(self, texts: tuple[Texts, Texts] | None, keep: Keep | None) -> BulkResult | None:
        """Do the share of this process; the main process prepares before the others begin, and writes once all end."""
        with ExitStack() as locks:
            _on_main_process(self.process, lambda: self._begin(texts, locks))
            if not self.process.is_main_process:
                locks.enter_context(self._locked())
            self._score()
            _together(self.process.wait_for_everyone)
            if not self.process.is_main_process:
                return None
            result = self._write(keep)
        shutil.rmtree(self.folder, ignore_errors=True)
        return result

    def _begin(self, texts: tuple[Texts, Texts] | None, locks: ExitStack) -> None:
        self.folder.mkdir(exist_ok=True)
        locks.enter_context(self._locked())
        # Another process may have written it since the last check.
        _check_output(self.settings)
        self._prepare(texts)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of this process's shard."""
        lock = FileLock(f"{shard_path(self.folder, self.process.process_index)}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another process writes {self.settings.output}: wait for it, or name another file."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _prepare(self, texts: tuple[Texts, Texts] | None) -> None:
        """Stage the input, unless that is done, and check that what was scored before is of the same settings."""
        record, path = self._fingerprint(texts), self.folder / _RECORD_FILE
        if path.exists():
            _check_same(read_json(path)["settings"], record, self.settings)
            return
        with explain_full_disk(self.folder), self._rejects() as rejects:
            try:
                with atomic_write(self.folder / _TASKS_FILE) as temporary:
                    temporary.unlink(missing_ok=True)
                    self._stage(temporary, texts, rejects)
            except BaseException:
                rejects.discard()
                shutil.rmtree(self.folder, ignore_errors=True)
                raise
        write_json({"settings": record, "rejected": rejects.count}, path)

    def _rejects(self) -> Rejects:
        return Rejects(self.settings.rejects_file if self.settings.skip_broken else None)

    def _stage(self, path: Path, texts: tuple[Texts, Texts] | None, rejects: Rejects) -> None:
        collector = rejects if self.settings.skip_broken else None
        if texts is None:
            needs_scores = self.settings.fuse is not None
            stage_rows(path, self.settings.run, needs_scores, self.settings.depth, collector)
        else:
            stage_run(path, self.settings.run, *texts, self.settings.depth, collector)

    def _fingerprint(self, texts: tuple[Texts, Texts] | None) -> dict[str, Any]:
        """What the scores depend on, as JSON."""
        files = [path for part in texts or () for path in part.files]
        return json.loads(
            json.dumps(
                {
                    "model": identity_of(self.settings.model),
                    "run": sha256(self.settings.run),
                    "collection": [sha256(path) for path in files] or self.settings.collection,
                    "depth": self.settings.depth,
                    "instruction": self.settings.instruction,
                    "max_length": self.settings.max_length,
                    "skip_broken": self.settings.skip_broken,
                    "device": self.model.device.type,
                    "int8": self.settings.int8,
                    "needs_scores": self.settings.is_rows and self.settings.fuse is not None,
                }
            )
        )

    def _score(self) -> None:
        """Score the blocks of this process that are not scored."""
        tasks = Tasks(self.folder / _TASKS_FILE)
        shards = Shards(self.folder, tasks.num_blocks)
        open_blocks = [block for block in range(tasks.num_blocks) if not shards.is_scored(block)]
        shards.close()
        own_blocks = open_blocks[self.process.process_index :: self.process.num_processes]
        # What is open must not change before all processes know it.
        _together(self.process.wait_for_everyone)
        writer = ShardWriter(shard_path(self.folder, self.process.process_index))
        # Only on a terminal, and of this process alone: the others have as much to do.
        hide = None if self.process.is_main_process else True
        for block in tqdm(own_blocks, desc="Reranking", unit="block", leave=False, disable=hide):
            scores = self.model.predict(
                tasks.pairs(block),
                self.settings.instruction,
                max_length=self.settings.max_length,
                show_progress_bar=False,
            )
            writer.add(block, scores.tolist())
        writer.close()
        tasks.close()

    def _write(self, keep: Keep | None) -> BulkResult:
        tasks = Tasks(self.folder / _TASKS_FILE)
        shards = Shards(self.folder, tasks.num_blocks)
        fuse = fuse_by(self.settings.fuse, self.settings.fusion)
        written = self.folder / _OUTPUT_FILE
        with atomic_write(written) as temporary:
            write_output(temporary, tasks, shards, fuse, keep, is_gzipped=self.settings.output.endswith(".gz"))
        written.replace(self.settings.output)
        result = BulkResult(tasks.num_queries, tasks.num_pairs, read_json(self.folder / _RECORD_FILE)["rejected"])
        shards.close()
        tasks.close()
        return result


def _check_same(before: dict[str, Any], now: dict[str, Any], settings: BulkSettings) -> None:
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        raise ValueError(
            f"{settings.work_folder} has scores with another {changed[0].replace('_', '-')}: repeat that command, "
            f"remove the folder, or name another output than {settings.output}."
        )
