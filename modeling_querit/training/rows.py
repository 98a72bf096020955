"""Rows of one query with its documents and their labels or teachers' scores as they have to be."""

from __future__ import annotations

import json
from numbers import Real
from typing import Any

Row = dict[str, Any]
_MAX = 3.4e38


def check_row(row: Any, where: str) -> None:
    """Raise a ValueError that says what is wrong with a row, and where it stands."""
    missing = [key for key in ("query", "documents") if not isinstance(row, dict) or row.get(key) is None]
    if not missing and row.get("labels") is None and not has_scores(row):
        missing = ["labels"]
    if missing:
        raise ValueError(f"{where}: no {missing[0]!r}; a row has query, documents, and labels or scores.")
    if not isinstance(row["query"], str):
        raise ValueError(f"{where}: the query is {row['query']!r}, not a string.")
    if not isinstance(row.get("instruction"), str | None):
        raise ValueError(f"{where}: the instruction is {row['instruction']!r}, not a string.")
    _check_text(row["query"], f"{where}: the query")
    others = {key: value for key, value in row.items() if key not in ("query", "documents")}
    _check_text(json.dumps(others, ensure_ascii=False, default=str), f"{where}: a field")
    documents = row["documents"]
    if not isinstance(documents, list) or not documents:
        raise ValueError(f"{where}: documents is a list, of at least one.")
    for document in documents:
        if not isinstance(document.get("text") if isinstance(document, dict) else document, str):
            raise ValueError(f"{where}: a document is a string or has a 'text', not {document!r}.")
        if isinstance(document, dict) and not isinstance(document.get("title"), str | None):
            raise ValueError(f"{where}: the title is {document['title']!r}, not a string.")
        _check_text(
            document if isinstance(document, str) else f"{document.get('title')} {document['text']}",
            f"{where}: a document",
        )
    if row.get("labels") is not None:
        _check_numbers(row["labels"], len(documents), f"{where}: labels", "label")
    scores = row.get("scores")
    if not isinstance(scores, dict | None):
        raise ValueError(f"{where}: scores is {scores!r}, not {{teacher: [a number a document]}}.")
    for teacher, values in (scores or {}).items():
        # A table has a column for every teacher, empty where one was not asked.
        if values is not None:
            known = [value for value in values if value is not None] if isinstance(values, list) else values
            _check_numbers(values, len(documents), f"{where}: scores of {teacher!r}", "score", known)


def has_scores(row: Row) -> bool:
    """Whether a teacher scored the documents of a row."""
    scores = row.get("scores")
    # What is no mapping is told below.
    return any(each is not None for each in scores.values()) if isinstance(scores, dict) else scores is not None


def _check_text(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: half of a character at place {error.start}; it cannot be written as UTF-8."
        ) from None


def _check_numbers(values: Any, count: int, where: str, kind: str, known: Any = None) -> None:
    if not isinstance(values, list):
        raise ValueError(f"{where} are {values!r}, not a list.")
    if len(values) != count:
        raise ValueError(f"{where}: {count} documents and {len(values)} {kind}s; give one {kind} a document.")
    for value in values if known is None else known:
        if isinstance(value, bool) or not isinstance(value, Real) or not _is_finite(value):
            raise ValueError(f"{where}: {kind} {repr(value)[:50]} is not a finite number.")


def _is_finite(value: Real) -> bool:
    try:
        # As float32, in which a run has them.
        return abs(value) <= _MAX
    except OverflowError:
        return False
