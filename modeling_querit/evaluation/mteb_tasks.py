"""Tasks and benchmarks of mteb: read as collections, and measured by mteb once their documents are ranked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from typing import Any

from ..retrieval.collection import Collection
from ..retrieval.runs import Run
from .mteb_model import model_meta

# A task is a collection for each subset (mostly a language) and split.
_DEFAULT_SUBSET = "default"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of mteb, or a part of it.

    Args:
        name: Name, such as `BEIR` or `MTEB(Multilingual, v2)`.
        task_types: Types of tasks, such as `Reranking`; all retrieval and reranking tasks by default.
    """

    name: str
    task_types: tuple[str, ...] = ()


def find_tasks(tasks: Sequence[str], benchmarks: Sequence[Benchmark], languages: Sequence[str] = ()) -> list[Any]:
    """Find tasks by name and by benchmark.

    Args:
        tasks: Names of tasks.
        benchmarks: Benchmarks, of which the tasks of other kinds are left out.
        languages: Languages to restrict tasks to, as mteb writes them (`deu`, `eng-Latn`); all by default.

    Raises:
        ModuleNotFoundError: if mteb is not installed.
        ValueError: if there is no such task or benchmark, a task ranks nothing, or no task is left.
    """
    if find_spec("mteb") is None:
        raise ModuleNotFoundError("Tasks need mteb: pip install 'modeling-querit[mteb]'.")
    import mteb

    try:
        selected = [mteb.get_task(name, languages=list(languages) or None) for name in tasks]
        for task in selected:
            if not _ranks(task):
                raise ValueError(f"{task.metadata.name} is a task of type {task.metadata.type}: name one that ranks.")
        for benchmark in benchmarks:
            types = benchmark.task_types
            of_benchmark = [
                task
                for task in mteb.get_benchmark(benchmark.name).tasks
                if _ranks(task) and (not types or task.metadata.type in types)
            ]
            if not of_benchmark:
                raise ValueError(f"{benchmark.name} has no ranking task of type {' or '.join(types) or 'Retrieval'}.")
            selected += [task.filter_languages(list(languages)) if languages else task for task in of_benchmark]
    except KeyError as error:
        raise ValueError(f"mteb: {str(error.args[0]).removeprefix('KeyError: ')}") from None
    unique = {task.metadata.name: task for task in selected if _has_subsets(task)}
    if not unique:
        raise ValueError(f"No task is in {', '.join(languages)}: name languages as mteb does, such as deu.")
    return list(unique.values())


def _ranks(task: Any) -> bool:
    """Whether a task ranks texts."""
    from mteb.abstasks import AbsTaskRetrieval

    is_text = list(task.metadata.modalities) == ["text"]
    return is_text and all(isinstance(leaf, AbsTaskRetrieval) for leaf in leaf_tasks(task))


def _has_subsets(task: Any) -> bool:
    return any(leaf.hf_subsets for leaf in leaf_tasks(task))


def leaf_tasks(task: Any) -> list[Any]:
    """List the tasks with data of their own: a task itself, or the parts of an aggregate such as CQADupstack."""
    return list(getattr(task, "tasks", None) or [task])


def sources_of(task: Any) -> Iterator[MtebSplit]:
    """Yield the collections of a task."""
    for leaf in leaf_tasks(task):
        for subset in leaf.hf_subsets:
            for split in leaf.eval_splits:
                yield MtebSplit(leaf, subset, split)


@dataclass(frozen=True)
class MtebSplit:
    """One subset and split of a task.

    Args:
        task: The task, an `AbsTaskRetrieval`.
        subset: Name of the subset.
        split: Name of the split.
    """

    task: Any
    subset: str
    split: str

    @property
    def key(self) -> tuple[str, str, str]:
        """Task, subset and split."""
        return self.task.metadata.name, self.subset, self.split

    @property
    def name(self) -> str:
        """Task, and subset and split where there are several."""
        parts = [self.task.metadata.name]
        parts += [self.subset] if self.subset != _DEFAULT_SUBSET else []
        parts += [self.split] if len(self.task.eval_splits) > 1 else []
        return ":".join(parts)

    def check(self) -> None:
        """Nothing is checked: mteb knows the task, and downloads it when it is read."""

    def identity(self) -> Any:
        """The dataset's repository and revision."""
        dataset = self.task.metadata.dataset
        return [dataset["path"], dataset["revision"], *self.key]

    def load(self) -> Collection:
        """Download and read the subset; texts are those that mteb gives to a cross-encoder.

        Raises:
            OSError: if the dataset cannot be had.
        """
        self.task.load_data()
        self.task.convert_v1_dataset_format_to_v2(num_proc=None)
        data = self.task.dataset[self.subset][self.split]
        corpus = data["corpus"]
        titles = corpus["title"] if "title" in corpus.column_names else repeat(None)
        # Joined by a space, as mteb does, where they are read.
        documents = {
            str(name): {"title": title or "", "text": text}
            for name, title, text in zip(corpus["id"], titles, corpus["text"], strict=False)
        }
        qrels = {
            query: {document: int(grade) for document, grade in grades.items()}
            for query, grades in data["relevant_docs"].items()
            if grades
        }
        queries = {query: text for query, text in self._queries(data["queries"]) if query in qrels}
        candidates = {
            query: [document for document in listed if document in documents]
            for query, listed in (data["top_ranked"] or {}).items()
            if query in queries
        }
        qrels = {query: grades for query, grades in qrels.items() if query in queries}
        return Collection(self.name, documents, queries, qrels, candidates)

    def _queries(self, dataset: Any) -> Iterator[tuple[str, str]]:
        """Yield ids and texts, as mteb's own evaluation joins instructions and turns of conversations."""
        from mteb._create_dataloaders import create_dataloader
        from mteb.types import PromptType

        batches = create_dataloader(
            dataset, task_metadata=self.task.metadata, prompt_type=PromptType.query, batch_size=512
        )
        texts = (text for batch in batches for text in batch["text"])
        yield from zip(map(str, dataset["id"]), texts, strict=True)


class RankedModel:
    """A model of mteb whose rankings are there already.

    Args:
        meta: Description of the model that made them.
        runs: Task, subset and split -> its run.
    """

    def __init__(self, meta: Any, runs: Mapping[tuple[str, str, str], Run]):
        self.mteb_model_meta = meta
        self._runs = runs

    def index(self, corpus: Any, **_: Any) -> None:
        """Nothing is indexed."""

    def search(self, queries: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, **_: Any) -> Any:
        """Return query id -> document id -> score."""
        run = self._runs[task_metadata.name, hf_subset, hf_split]
        return {query: dict(run.get(query, ())) for query in map(str, queries["id"])}


def measure_tasks(
    name: str, tasks: Sequence[Any], runs: Mapping[tuple[str, str, str], Run], folder: Path
) -> dict[str, float]:
    """Let mteb measure runs, and write its own files of results.

    Args:
        name: The model that made the runs: "mini", a folder or a repository.
        tasks: Tasks.
        runs: Task, subset and split -> run.
        folder: Folder of an `mteb.ResultCache`; results are in `results/MODEL/REVISION/TASK.json`.

    Returns:
        Task -> main score, in [0, 1], the mean over its subsets.
    """
    import mteb

    cache = mteb.ResultCache(folder)
    model = RankedModel(model_meta(name), runs)
    scores = {}
    for task in tasks:
        results = mteb.evaluate(
            model, task, cache=cache, overwrite_strategy="always", show_progress_bar=False, co2_tracker=False
        )
        scores[task.metadata.name] = float(results.task_results[0].get_score())
    return scores
