"""`querit adapt`: runs the stages one after the other, each from files to files."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout

from ..checkpoints.loading import check_available, check_local_path
from ..retrieval.collection import Source
from ..retrieval.dense import check_index, check_package
from ..training.arguments import settings_from_mapping
from .candidates import is_first_stage
from .endpoint import Endpoint
from .extractive import ExtractiveGenerator
from .generators import make_generators
from .manifest import fingerprint_of, summarize
from .prompts import read_examples
from .queries import check_styles
from .settings import FIRST_STAGE, AdaptSettings
from .stages import STAGES, TRAIN_ROWS, Context, Stage
from .teachers import make_teachers, teacher_type

logger = logging.getLogger(__name__)

STAGE_NAMES = tuple(stage.name for stage in STAGES)
_LOCK_FILE = ".lock"
# How long a process waits for the others, which may train or score for days.
_PROCESS_TIMEOUT = timedelta(days=7)


class Adaptation:
    """A run of `querit adapt`, in one folder.

    A stage that has finished is not run again, unless its settings, its inputs or its files have changed. A stage that
    was killed is resumed: queries and scores are cached batch by batch, and training has checkpoints.

    Args:
        settings: Settings of all stages.
        echo: Function called with one line for each stage.

    Example:
        ```python
        >>> Adaptation(AdaptSettings.load("scifact.yaml")).run()
        ```
    """

    def __init__(self, settings: AdaptSettings, echo: Callable[[str], None] = logger.info):
        self.settings, self.echo = settings, echo
        # Unless it is told to use CPUs, accelerate does not connect processes on a machine without an accelerator.
        self.process = PartialState(cpu=not torch.accelerator.is_available(), timeout=_PROCESS_TIMEOUT)

    def run(self, stages: Sequence[str] = STAGE_NAMES) -> None:
        """Run stages, as far as they have not finished.

        Args:
            stages: Names of stages; all by default.

        Raises:
            ValueError: if a stage is unknown, its inputs are missing, or a setting is invalid.
            FileNotFoundError: if a file or folder in the settings does not exist.
            ModuleNotFoundError: if a package that the settings need is not installed.
        """
        for name in stages:
            if name not in STAGE_NAMES:
                raise ValueError(f"stage is {name!r}: choose from {', '.join(STAGE_NAMES)}.")
        users = check(self.settings, stages)
        # Not kept from run to run: files may have changed.
        context = Context(self.settings, self.process)
        if self.process.is_main_process:
            self._check_servers(users, stages, context)
        with self._locked():
            for stage in STAGES:
                if stage.name in stages and (stage.runs_on_all_processes or self.process.is_main_process):
                    self._run_stage(stage, context)
                self.process.wait_for_everyone()

    def disconnect(self) -> None:
        """Disconnect this process from the others; a process that exits while it is connected may hang or crash."""
        # A trainer that is no longer needed still holds connections.
        gc.collect()
        self.process.destroy_process_group()

    def _check_servers(self, users: Mapping[str, object], stages: Sequence[str], context: Context) -> None:
        """Check that the servers answer which stages will ask; those of a finished stage may be gone."""
        unfinished = {"queries", "teachers"} & set(stages) - context.manifest.stages.keys()
        for name, user in users.items():
            if name.partition(".")[0] in unfinished and isinstance(
                endpoint := getattr(user, "endpoint", None), Endpoint
            ):
                endpoint.check()

    def _run_stage(self, stage: Stage, context: Context) -> None:
        inputs = [context.folder / name for name in stage.reads]
        if missing := [path for path in inputs if not path.exists()]:
            raise ValueError(f"Stage {stage.name} reads {missing[0]}, which does not exist: run the stages before it.")
        fingerprint = fingerprint_of(self.settings, inputs, stage.depends_on(context))
        counts = context.manifest.finished(stage.name, fingerprint)
        # No process may write before all have looked at the files.
        if stage.runs_on_all_processes:
            self.process.wait_for_everyone()
        if counts is not None:
            summary = {"already done": "", **counts}
        else:
            start = time.perf_counter()
            summary = stage.run(context)
            if self.process.is_main_process:
                written = [path for pattern in stage.writes for path in sorted(context.folder.glob(pattern))]
                seconds, settings = time.perf_counter() - start, self.settings.model_dump(mode="json")
                context.manifest.record(stage.name, fingerprint, written, summary, seconds, settings)
        if self.process.is_main_process:
            number = STAGE_NAMES.index(stage.name) + 1
            self.echo(f"{number}/{len(STAGES)} {stage.name}: {summarize(summary) or 'done'}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the run's folder, in the main process."""
        if not self.process.is_main_process:
            yield
            return
        folder = Path(self.settings.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"Another querit adapt is running in {folder}: wait for it, or end it.") from None
        try:
            yield
        finally:
            lock.release()


def check(settings: AdaptSettings, stages: Sequence[str] = STAGE_NAMES) -> dict[str, object]:
    """Check everything that can be checked before a run, which may take hours; nothing is loaded or written.

    Args:
        settings: Settings of the run.
        stages: Names of the stages that are run, whose models have to be there.

    Returns:
        Generators and rerankers as teachers by section, such as `teachers.server`; none of them is loaded yet.

    Raises:
        ValueError: if a setting is invalid.
        FileNotFoundError: if a file or folder does not exist.
        ModuleNotFoundError: if a package is not installed.
    """
    for name in (*settings.candidates.first_stages, *settings.teachers):
        check_package(name)
    for name in settings.local_models(("queries", "candidates", "teachers", "train")):
        check_local_path(name)
    check_index(settings.candidates.index)
    if settings.queries.examples is not None:
        read_examples(settings.queries.examples)
    settings.queries.limits()
    settings.candidates.bands()
    check_styles(settings.queries.styles, settings.queries.per_document)
    users = _check_options(settings)
    folder = settings.output_dir
    settings_from_mapping(settings.training(folder / TRAIN_ROWS, folder / "train"), "the section train")
    for source in settings.evaluation:
        Source.parse(source).check()
    sections = {section for stage in STAGES if stage.name in stages for section in stage.sections}
    for name in settings.local_models(sections):
        if not is_first_stage(name):
            check_available(name)
    return users


def _check_options(settings: AdaptSettings) -> dict[str, object]:
    """Construct generators and teachers, which loads no model yet; first stages as teachers need the documents."""
    generators = make_generators(settings.queries.generators, ExtractiveGenerator([]))
    known = settings.candidates.first_stages
    rerankers = {
        name: teacher
        for name, teacher in settings.teachers.items()
        if teacher_type(name, teacher, known) != FIRST_STAGE
    }
    teachers = make_teachers(rerankers, settings.candidates, {}, {}, Path())
    users: dict[str, object] = {f"queries.{name}": generator for name, generator in generators.items()}
    return users | {f"teachers.{name}": teacher for name, teacher in teachers.items()}
