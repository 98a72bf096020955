"""What `querit evaluate` is asked for: on the command line, or in a file."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.loading import check_available
from ..checkpoints.mini import MINI_NAME
from ..settings_files import read_settings
from .evaluate import BEST_ORDER, FIRST_STAGE, RANDOM
from .first_stages import BM25_NAME, check_first_stage
from .mteb_tasks import Benchmark, find_tasks, sources_of
from .sources import CollectionSource, find_collection

_TEXTS, _LISTS, _NUMBERS = (
    ("first_stage", "instruction", "dtype", "device", "output"),
    ("models", "collections", "tasks", "task_types", "languages"),
    ("depth", "limit", "max_length", "seed"),
)

# File of the judgements, beside those of the systems.
QRELS_NAME = "qrels"
_TAKEN = (RANDOM, FIRST_STAGE, BEST_ORDER, QRELS_NAME)
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of one evaluation.

    Args:
        models: "mini", folders or repositories.
        collections: `FOLDER:SPLIT` or `ir_datasets:ID`.
        tasks: Names of mteb tasks.
        benchmarks: Benchmarks of mteb.
        task_types: Types of tasks to take from benchmarks that name none themselves.
        languages: Languages to restrict mteb tasks to.
        first_stage: `bm25`, `candidates`, an encoder, or a TREC run; see `find_candidates`.
        depth: Candidates per query.
        limit: Number of queries of each collection, drawn at random; all by default.
        max_length: Maximum number of tokens in a pair; by default the model's.
        instruction: The task in one sentence, in place of the model's default.
        dtype: Data type to compute in; that of the checkpoint by default.
        int8: Whether linear layers compute in int8.
        device: Device to compute on; by default a GPU if there is one.
        seed: Seed of the draw of queries, the intervals and the p-values.
        output: Folder of the results.

    Raises:
        ValueError: if a setting is missing or not possible.
    """

    models: tuple[str, ...] = ()
    collections: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    benchmarks: tuple[Benchmark, ...] = ()
    task_types: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    first_stage: str = BM25_NAME
    depth: int = 100
    limit: int | None = None
    max_length: int | None = None
    instruction: str | None = None
    dtype: str = "auto"
    int8: bool = False
    device: str | None = None
    seed: int = 0
    output: Path = Path("evaluation")

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("Name at least one model, such as mini.")
        if not (self.collections or self.tasks or self.benchmarks):
            raise ValueError("Name what to evaluate on: a collection (FOLDER:SPLIT), an mteb task or a benchmark.")
        for name in ("depth", "limit", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it is at least 1.")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}: choose from {', '.join(_DTYPES)}.")
        if self.output.exists() and not self.output.is_dir():
            raise FileExistsError(f"{self.output} is a file: name a folder for the results.")

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Mapping[str, Any]) -> EvaluationSettings:
        """Read settings from YAML or JSON.

        Args:
            path: File of settings: the names above, with lists where several are allowed; a benchmark is a name, or
                `{name: ..., task_types: [...]}`.
            overrides: Settings that take the place of the file's.

        Raises:
            OSError: if there is no such file.
            ValueError: if a setting is unknown or of another type; the message names the file and the setting.
        """
        values = read_settings(path)
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"{path}: there is no setting {unknown[0]!r}: choose from {', '.join(known)}.")
        try:
            return cls.parse({**values, **overrides})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> EvaluationSettings:
        """Make settings of plain values, as JSON has them; None is a setting that is not given.

        Raises:
            ValueError: if a value is of another type.
        """
        given = {name: value for name, value in values.items() if value is not None}
        for names, kind, expected in (
            (_TEXTS, str | Path, "a text"),
            (_NUMBERS, int, "a whole number"),
            (("int8",), bool, "true or false"),
        ):
            for name in names:
                value = given.get(name)
                if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
                    raise ValueError(f"{name} is {value!r}: it is {expected}.")
        for name in (*_LISTS, "benchmarks"):
            if name in given:
                given[name] = _list_of(given[name], name)
        if "benchmarks" in given:
            given["benchmarks"] = tuple(map(_benchmark, given["benchmarks"]))
        if "output" in given:
            given["output"] = Path(given["output"])
        return cls(**given)

    def find_tasks(self) -> list[Any]:
        """Find the tasks of mteb; see `mteb_tasks.find_tasks`."""
        if not (self.tasks or self.benchmarks):
            return []
        chosen = [
            benchmark if benchmark.task_types else dataclasses.replace(benchmark, task_types=self.task_types)
            for benchmark in self.benchmarks
        ]
        return find_tasks(self.tasks, chosen, self.languages)

    def sources(self, tasks: Sequence[Any]) -> list[CollectionSource]:
        """List all collections.

        Args:
            tasks: The tasks that `find_tasks` has found.

        Raises:
            ValueError: if two collections have the same name, or names whose files would be the same.
        """
        sources: list[CollectionSource] = [find_collection(text) for text in self.collections]
        sources += [source for task in tasks for source in sources_of(task)]
        names = [source.name for source in sources]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"Two collections are called {twice[0]}: evaluate on them one after the other.")
        if same := _of_one_file(names):
            raise ValueError(f"Collections {' and '.join(same)} would share files: evaluate on one after the other.")
        return sources

    def check(self, sources: Sequence[CollectionSource]) -> None:
        """Check that models, collections and first stage can be had, before anything is loaded.

        Raises:
            OSError, ValueError, ModuleNotFoundError: what is missing.
        """
        for source in sources:
            source.check()
        check_first_stage(self.first_stage)
        for model in self.models:
            check_available(model)

    def model_names(self) -> dict[str, str]:
        """Name of each model in tables and files -> where it is: the last parts of a path that tell it from others.

        Raises:
            ValueError: if a model is named twice, or has the name or the files of another system.
        """
        places = [Path(model).resolve() if _is_folder(model) else Path(model) for model in self.models]
        if len(set(places)) < len(places):
            raise ValueError(f"A model is named twice: {', '.join(self.models)}.")
        for count in range(1, max(len(place.parts) for place in places) + 1):
            names = [
                "/".join(place.parts[-count:]) if _is_folder(model) else model
                for model, place in zip(self.models, places, strict=True)
            ]
            if len(set(names)) == len(names):
                break
        if taken := [name for name in names if file_name(name) in _TAKEN]:
            raise ValueError(f"A model cannot be called {taken[0]!r}, as other results are: rename its folder.")
        if same := _of_one_file(names):
            raise ValueError(f"Models {' and '.join(same)} would share files: evaluate them one after the other.")
        return dict(zip(names, self.models, strict=True))


def file_name(name: str) -> str:
    """Name of a file for any name: other characters than letters, digits, points and dashes become underscores."""
    return re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "_"


def _of_one_file(names: Sequence[str]) -> list[str]:
    """Return names that would have the same file; none if all files differ."""
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(file_name(name), []).append(name)
    return next((same for same in by_file.values() if len(same) > 1), [])


def _is_folder(model: str) -> bool:
    return model != MINI_NAME and Path(model).is_dir()


def _list_of(value: Any, name: str) -> tuple[Any, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    allowed = str | dict | Benchmark if name == "benchmarks" else str
    if wrong := [item for item in values if not isinstance(item, allowed)]:
        raise ValueError(f"{name} holds {wrong[0]!r}: it is a list of names.")
    return tuple(values)


def _benchmark(value: str | Mapping[str, Any] | Benchmark) -> Benchmark:
    if isinstance(value, Benchmark):
        return value
    if isinstance(value, str):
        return Benchmark(value)
    if value.keys() - {"name", "task_types"} or not isinstance(value.get("name"), str):
        raise ValueError(f"benchmarks holds {dict(value)!r}: a benchmark has a name and perhaps task_types.")
    return Benchmark(value["name"], _list_of(value.get("task_types") or [], "task_types"))
