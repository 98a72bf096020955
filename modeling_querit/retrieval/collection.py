"""Collections in the BEIR layout: `corpus.jsonl`, `queries.jsonl`, `qrels/SPLIT.tsv`, optionally `candidates/`."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

Qrels = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Collection:
    """Documents, queries and judgements of one split.

    Args:
        name: The folder's name.
        documents: Document id -> `{"title", "text"}`.
        queries: Query id -> text; only those that have a judgement.
        qrels: Query id -> document id -> grade (0: judged and not relevant).
        candidates: Query id -> document ids that were judged for it, where the collection lists them.
    """

    name: str
    documents: dict[str, dict[str, str]]
    queries: dict[str, str]
    qrels: Qrels
    candidates: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | os.PathLike, split: str) -> Collection:
        """Read a folder in the BEIR layout; the JSONL files may be gzipped.

        Raises:
            FileNotFoundError: if a file of the layout is missing.
            ValueError: if a line cannot be read; the message names file and line.
        """
        folder = Path(folder)
        qrels: Qrels = {}
        path = folder / "qrels" / f"{split}.tsv"
        for number, row in enumerate(_tsv(path), start=1):
            try:
                qrels.setdefault(row[0], {})[row[1]] = int(row[2])
            except (IndexError, ValueError):
                raise ValueError(f"{path}, row {number}: a row is query, document and a whole number.") from None
        documents = {
            str(row["_id"]): {"title": row.get("title") or "", "text": row["text"]}
            for row in _jsonl(folder / "corpus.jsonl", ("_id", "text"))
        }
        queries = {
            name: row["text"]
            for row in _jsonl(folder / "queries.jsonl", ("_id", "text"))
            if (name := str(row["_id"])) in qrels
        }
        candidates: dict[str, list[str]] = {}
        path = folder / "candidates" / f"{split}.tsv"
        if path.exists():
            for row in _tsv(path):
                if row[0] in queries and row[1] in documents:
                    candidates.setdefault(row[0], []).append(row[1])
        # Judgements outlive what they are about; a relevant document that is gone still counts as not found.
        qrels = {query: grades for query, grades in qrels.items() if query in queries}
        return cls(folder.name, documents, queries, qrels, candidates)

    @staticmethod
    def splits(folder: str | os.PathLike) -> list[str]:
        """Names of the splits that have judgements."""
        return sorted(path.stem for path in (Path(folder) / "qrels").glob("*.tsv"))


def check_judgements(folder: str | os.PathLike, split: str) -> None:
    """Whether a split has all files that a measurement needs, without a look into them.

    Raises:
        FileNotFoundError: if one is missing.
    """
    for name in (f"qrels/{split}.tsv", "queries.jsonl", "corpus.jsonl"):
        _open(Path(folder) / name).close()


def _open(path: Path) -> TextIO:
    zipped = path.with_name(path.name + ".gz")
    if path.exists():
        return path.open(encoding="utf-8")
    if zipped.exists():
        return gzip.open(zipped, "rt", encoding="utf-8")
    raise FileNotFoundError(f"{path} is missing: a collection has corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv.")


def _jsonl(path: Path, keys: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    with _open(path) as lines:
        for number, line in _numbered(path, lines):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: {error}.") from None
            missing = [key for key in keys if not isinstance(row, dict) or key not in row]
            if missing:
                raise ValueError(f"{path}, line {number}: no {missing[0]!r}.")
            for key in ("text", "title"):
                if not isinstance(row.get(key) or "", str) or (key == "text" and row[key] is None):
                    raise ValueError(f"{path}, line {number}: the {key} is {row[key]!r}, not a string.")
            yield row


def _numbered(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            yield number, line
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, after line {number}: {error}; save it as UTF-8.") from None


def _tsv(path: Path) -> Iterator[list[str]]:
    with _open(path) as lines:
        for number, line in _numbered(path, lines):
            row = line.rstrip("\n").split("\t")
            if number == 1 and row[0] in ("query-id", "query_id", "qid"):
                continue
            if len(row) < 2:
                raise ValueError(f"{path}, line {number}: expected columns separated by tabs, found {line.strip()!r}.")
            yield row
