"""Collections in the BEIR layout, and documents of a file.

A collection is a folder of `corpus.jsonl`, `queries.jsonl`, `qrels/SPLIT.tsv` and, optionally, `candidates/SPLIT.tsv`;
each may be gzipped.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import decode_line, is_json_array, parse_lines, read_jsonl, read_lines

# Relevance judgements: query id -> document id -> grade (0: judged, but not relevant).
Qrels = Mapping[str, Mapping[str, int]]

_HEADERS = ("query-id", "query_id", "qid")
_JSONL = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
# More than anybody reranks; a stream without an end has more.
_MAX_DOCUMENTS = 1_000_000


@dataclass(frozen=True)
class Collection:
    """Documents, queries and relevance judgements of one split.

    Args:
        name: Name of the folder.
        documents: Document id -> `{"title", "text"}`.
        queries: Query id -> text, of the queries with a judgement.
        qrels: Query id -> document id -> grade (0: judged, but not relevant).
        candidates: Query id -> document ids to rank for it, where the collection lists them.
    """

    name: str
    documents: dict[str, dict[str, str]]
    queries: dict[str, str]
    qrels: Qrels
    candidates: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], split: str) -> Collection:
        """Read a folder in the BEIR layout.

        Args:
            folder: Path of the folder.
            split: Name of the split.

        Raises:
            FileNotFoundError: if a file of the layout is missing.
            ValueError: if a line cannot be read; the message names file and line.
        """
        folder = Path(folder)
        qrels: dict[str, dict[str, int]] = {}
        for location, columns in _read_tsv(folder / "qrels" / f"{split}.tsv"):
            try:
                query_id, document_id, number = columns
                grade = int(number)
            except ValueError:
                raise ValueError(f"{location}: a row is query id, document id and a whole number.") from None
            if qrels.setdefault(query_id, {}).setdefault(document_id, grade) != grade:
                raise ValueError(f"{location}: query {query_id} had another grade for document {document_id} before.")
        documents: dict[str, dict[str, str]] = {}
        for location, row in _read_texts(folder / "corpus.jsonl"):
            document = {"title": row.get("title") or "", "text": row["text"]}
            if documents.setdefault(str(row["_id"]), document) != document:
                raise ValueError(f"{location}: the id {row['_id']} had another text before.")
        queries = {
            query_id: row["text"]
            for _, row in _read_texts(folder / "queries.jsonl")
            if (query_id := str(row["_id"])) in qrels
        }
        candidates: dict[str, list[str]] = {}
        candidates_path = folder / "candidates" / f"{split}.tsv"
        if _plain_or_gzipped(candidates_path):
            for _, columns in _read_tsv(candidates_path):
                if columns[0] in queries and columns[1] in documents:
                    candidates.setdefault(columns[0], []).append(columns[1])
        # Judgements of queries that are gone are dropped; a relevant document that is gone still counts as not found.
        qrels = {query: grades for query, grades in qrels.items() if query in queries}
        return cls(folder.name, documents, queries, qrels, candidates)


@dataclass(frozen=True)
class Source:
    """One split of a collection on disk, written `FOLDER:SPLIT`.

    Args:
        folder: Folder in the BEIR layout.
        split: Name of the split.

    Example:
        ```python
        >>> Source.parse("data/scifact:test")
        Source(folder=PosixPath('data/scifact'), split='test')
        ```
    """

    folder: Path
    split: str

    @classmethod
    def parse(cls, text: str, default_split: str = "test") -> Source:
        """Parse `FOLDER:SPLIT`, or `FOLDER`, which means the default split; `~` is the home folder."""
        folder, _, split = text.partition(":")
        return cls(Path(folder).expanduser(), split or default_split)

    def __str__(self) -> str:
        return f"{self.folder}:{self.split}"

    @property
    def name(self) -> str:
        """Name of the folder, for tables and plots."""
        return self.folder.resolve().name

    def load(self) -> Collection:
        """Read the split; see `Collection.load`."""
        return Collection.load(self.folder, self.split)

    def check(self) -> None:
        """Check that the files of the split exist, without reading them.

        Raises:
            FileNotFoundError: if one is missing.
        """
        for name in (f"qrels/{self.split}.tsv", "queries.jsonl", "corpus.jsonl"):
            _existing(self.folder / name)

    def files(self) -> list[Path]:
        """List the existing files that the split is read from, sorted."""
        names = ("corpus.jsonl*", "queries.jsonl*", f"qrels/{self.split}.tsv*", f"candidates/{self.split}.tsv*")
        return sorted(path for name in names for path in self.folder.glob(name))


def read_documents(source: str, is_jsonl: bool | None = None) -> list[str | dict[str, Any]]:
    """Read the documents of a file or of standard input, one per line; blank lines are skipped.

    Args:
        source: Path of a file in UTF-8, which may be gzipped; `-` is standard input.
        is_jsonl: Whether a line is JSON, a string or an object with a `text` and perhaps a `title`, or else a plain
            text. By default it is JSON if the name ends in `.jsonl`, `.ndjson` or `.json`, or the first line looks like
            it, and a table (`.csv`, `.tsv`) is refused.

    Raises:
        ValueError: if there are no documents, more than a million, or a line cannot be read; the message names file and
            line.
        OSError: if the file cannot be read.
    """
    name = "standard input" if source == "-" else source
    if source == "-" and sys.stdin is None:
        raise ValueError("There is no standard input: name a file.")
    if is_jsonl is None and source.lower().endswith(_TABLES):
        raise ValueError(f"{name} is a table: write its texts one per line, or rank whole rows by --format text.")
    lines = read_lines(sys.stdin.buffer if source == "-" else source, name)
    first = next(lines, None)
    if first is None:
        raise ValueError(f"{name} is empty: give one document per line.")
    if is_jsonl is None:
        is_jsonl = source.endswith(_JSONL) or first[1].lstrip().startswith(b"{") or is_json_array(first[1])
    lines = itertools.chain([first], lines)
    documents: list[str | dict[str, Any]] = []
    for location, document in parse_lines(lines, name) if is_jsonl else lines:
        if len(documents) == _MAX_DOCUMENTS:
            raise ValueError(f"{name} has more than {_MAX_DOCUMENTS:,} documents: rerank the top of a first stage.")
        documents.append(
            decode_line(document, location) if isinstance(document, bytes) else checked_document(document, location)
        )
    return documents


def checked_document(document: Any, location: str) -> str | dict[str, Any]:
    """Return a document of a file if it is one; otherwise raise a ValueError that begins with its location."""
    if not isinstance(document.get("text") if isinstance(document, dict) else document, str):
        raise ValueError(f"{location}: a document is a string or an object with a 'text'.")
    if isinstance(document, dict) and not isinstance(document.get("title"), str | None):
        raise ValueError(f"{location}: the title is not a string.")
    return document


def _plain_or_gzipped(path: Path) -> Path | None:
    return next((existing for existing in (path, path.with_name(f"{path.name}.gz")) if existing.exists()), None)


def _existing(path: Path) -> Path:
    existing = _plain_or_gzipped(path)
    if existing is None:
        raise FileNotFoundError(f"{path} is missing: a collection has corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv.")
    return existing


def _read_texts(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the rows of a corpus or of queries, with their location: `_id`, `text` and perhaps a `title`."""
    for location, row in read_jsonl(_existing(path)):
        check_text(row, location)
        yield location, row


def check_text(row: Any, location: str) -> None:
    """Check a row of a corpus or of queries.

    Args:
        row: A value that should have `_id`, `text` and perhaps a `title`.
        location: File and line number, for the error message.

    Raises:
        ValueError: if it has not.
    """
    missing = [key for key in ("_id", "text") if not isinstance(row, dict) or key not in row]
    if missing:
        raise ValueError(f"{location}: no {missing[0]!r}.")
    for key in ("text", "title"):
        if not isinstance(row.get(key) or "", str) or (key == "text" and row[key] is None):
            raise ValueError(f"{location}: the {key} is {row[key]!r}, not a string.")


def _read_tsv(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Read the rows of a file of tab-separated columns, with their location, without the header."""
    for number, (location, line) in enumerate(read_lines(_existing(path))):
        row = decode_line(line, location).split("\t")
        if number == 0 and row[0] in _HEADERS:
            continue
        if len(row) < 2:
            raise ValueError(f"{location}: expected columns separated by tabs, found {row[0]!r}.")
        yield location, row
