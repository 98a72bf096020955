"""Where collections come from: folders in the BEIR layout, and the catalogue of the package ir_datasets."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

from ..files import sha256
from ..retrieval.collection import Collection, Source
from ..retrieval.texts import IR_DATASETS_PREFIX


class CollectionSource(Protocol):
    """One split of a collection, not read yet."""

    @property
    def name(self) -> str:
        """Name in tables and files, such as `scifact:test`."""

    def check(self) -> None:
        """Check that the collection is there, without reading it."""

    def load(self) -> Collection:
        """Read the collection; queries are those with a judgement."""

    def identity(self) -> Any:
        """JSON values that change with the collection."""


@dataclass(frozen=True)
class BeirFolder:
    """A split of a folder in the BEIR layout.

    Args:
        source: Folder and split.
    """

    source: Source

    @property
    def name(self) -> str:
        """Name of the folder and the split."""
        return f"{self.source.name}:{self.source.split}"

    def check(self) -> None:
        """Check that the files are there; see `Source.check`."""
        self.source.check()

    def load(self) -> Collection:
        """Read the split; see `Collection.load`."""
        return self.source.load()

    def identity(self) -> Any:
        """SHA-256 of each file, by its path in the folder."""
        return {str(path.relative_to(self.source.folder)): sha256(path) for path in self.source.files()}


@dataclass(frozen=True)
class IrDataset:
    """A dataset of `ir_datasets`, which downloads what it needs.

    Args:
        id: Its id, such as `beir/scifact/test` or `msmarco-passage/trec-dl-2019/judged`.
    """

    id: str

    @property
    def name(self) -> str:
        """The id."""
        return self.id

    def check(self) -> None:
        """Check that there is such a dataset, with documents, queries and judgements.

        Raises:
            ModuleNotFoundError: if the package is not installed.
            ValueError: if there is no such dataset, or a part of it is missing.
        """
        self._open()

    def load(self) -> Collection:
        """Read the dataset; title and text are those of its `default_text`. Scored documents are its candidates."""
        dataset = self._open()
        qrels: dict[str, dict[str, int]] = {}
        for judgement in dataset.qrels_iter():
            qrels.setdefault(judgement.query_id, {})[judgement.doc_id] = int(judgement.relevance)
        documents = {
            document.doc_id: {"title": "", "text": document.default_text()} for document in dataset.docs_iter()
        }
        queries = {query.query_id: query.default_text() for query in dataset.queries_iter() if query.query_id in qrels}
        candidates: dict[str, list[str]] = {}
        if dataset.has_scoreddocs():
            for scored in dataset.scoreddocs_iter():
                if scored.query_id in queries and scored.doc_id in documents:
                    candidates.setdefault(scored.query_id, []).append(scored.doc_id)
        qrels = {query: grades for query, grades in qrels.items() if query in queries}
        return Collection(self.name, documents, queries, qrels, candidates)

    def identity(self) -> Any:
        """The id: what it stands for does not change."""
        return self.id

    def _open(self) -> Any:
        if find_spec("ir_datasets") is None:
            raise ModuleNotFoundError(f"{self.id} needs ir_datasets: pip install 'modeling-querit[ir-datasets]'.")
        import ir_datasets

        try:
            dataset = ir_datasets.load(self.id)
        except KeyError:
            raise ValueError(f"ir_datasets has no dataset {self.id!r}: see https://ir-datasets.com.") from None
        parts = {
            "documents": dataset.has_docs(),
            "queries": dataset.has_queries(),
            "relevance judgements": dataset.has_qrels(),
        }
        if missing := [part for part, is_there in parts.items() if not is_there]:
            raise ValueError(f"{self.id} has no {missing[0]}: name a subset that has them, such as {self.id}/test.")
        return dataset


def find_collection(text: str) -> BeirFolder | IrDataset:
    """Parse `FOLDER:SPLIT`, `FOLDER`, which means its split `test`, or `ir_datasets:ID`.

    Example:
        ```python
        >>> find_collection("ir_datasets:beir/scifact/test").name
        'beir/scifact/test'
        ```
    """
    if text.startswith(IR_DATASETS_PREFIX):
        return IrDataset(text.removeprefix(IR_DATASETS_PREFIX))
    return BeirFolder(Source.parse(text))
