"""The work of a bulk reranking on disk: queries with the texts of their candidates, in blocks; constant in memory."""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from ..files import parse_json, read_lines
from ..pair_encoding_querit import Document, Pair, replace_surrogates
from ..rejects import Rejects
from ..retrieval.collection import checked_document
from ..retrieval.runs import Hit, parse_run_line
from ..retrieval.texts import Text, Texts

# A block is scored in one go, so that its scores depend on nothing but its pairs: it ends with the query that brings it
# to this number of pairs.
PAIRS_PER_BLOCK = 256
# Memory for the index of ids while they are looked up, in KiB.
_CACHE_KIB = 64 * 1024
_QUERY, _DOCUMENT = 0, 1
# Sums and squares of scores are finite below it.
_LARGEST_SCORE = 1e100
_SCHEMA = """
-- Queries and documents of a run: only those that it names.
CREATE TABLE texts (id INTEGER PRIMARY KEY, kind INTEGER, name TEXT, place TEXT, text TEXT, UNIQUE (kind, name));
-- One query with its candidates, as JSON: of a run {"query", "documents", "scores"}, with numbers of texts; or a row,
-- whose query is a string.
CREATE TABLE tasks (id INTEGER PRIMARY KEY, pairs INTEGER, content TEXT);
CREATE TABLE blocks (id INTEGER PRIMARY KEY, first_task INTEGER, last_task INTEGER);
"""


class Ranked(NamedTuple):
    """Candidates of one query, for the output.

    Args:
        query: Query id; None for a row.
        documents: Document ids; none for a row.
        scores: Scores of the first stage; of a row, None if it has none.
        row: The row as it was read; None for a run.
        pairs: Number of candidates.
    """

    query: str | None
    documents: list[str]
    scores: list[float] | None
    row: dict[str, Any] | None
    pairs: int


class Tasks:
    """Reader of the file that `stage_run` or `stage_rows` wrote; any number of processes may read it.

    Args:
        path: Path of the file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        # Immutable: without locks, which file systems of several machines may lack.
        self._database = sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True)
        self.num_blocks, self.num_queries, self.num_pairs = self._database.execute(
            "SELECT (SELECT count(*) FROM blocks), count(*), coalesce(sum(pairs), 0) FROM tasks"
        ).fetchone()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def pairs(self, block: int) -> list[Pair]:
        """Return the (query, document) pairs of a block, in order."""
        return [pair for content, pairs in self._contents(block) for pair in self._pairs_of(content)[:pairs]]

    def ranked(self, block: int) -> Iterator[Ranked]:
        """Yield the candidates of the queries of a block, in order, without texts."""
        for content, pairs in self._contents(block):
            if isinstance(content["query"], int):
                names = [self._text(document, "name") for document in content["documents"]]
                yield Ranked(self._text(content["query"], "name"), names, content["scores"], None, pairs)
            else:
                yield Ranked(None, [], content.get("scores"), content, pairs)

    def _pairs_of(self, content: dict[str, Any]) -> list[Pair]:
        query, documents = content["query"], content["documents"]
        if isinstance(query, int):
            query = self._text(query, "text")
            documents = [self._text(document, "text") for document in documents]
        return [(query, document) for document in documents]

    def _contents(self, block: int) -> Iterator[tuple[dict[str, Any], int]]:
        tasks = self._database.execute(
            "SELECT content, pairs FROM tasks, blocks "
            "WHERE blocks.id = ? AND tasks.id BETWEEN first_task AND last_task ORDER BY tasks.id",
            (block,),
        )
        return ((json.loads(content), pairs) for content, pairs in tasks)

    def _text(self, identifier: int, column: str) -> str:
        return self._database.execute(f"SELECT {column} FROM texts WHERE id = ?", (identifier,)).fetchone()[0]


def stage_run(
    path: Path,
    run: str | os.PathLike[str],
    queries: Texts,
    documents: Texts,
    depth: int | None = None,
    rejects: Rejects | None = None,
) -> None:
    """Write a TREC run with the texts that it names to a file for `Tasks`.

    Args:
        path: File to write.
        run: The run, sorted by query.
        queries: The queries of the collection.
        documents: Its documents.
        depth: Number of documents to take for a query, by score; all by default.
        rejects: Collector of broken lines, and of lines with a query or document without text; without it they raise.

    Raises:
        ValueError: if a line is broken, a query or document has no text, or nothing is left to rerank; the message
            names file and line.
    """
    with _new_database(path) as database:
        for hits in _queries_of(run, rejects):
            _add_hits(database, hits, depth, rejects)
        _fill(database, _QUERY, queries, rejects)
        _fill(database, _DOCUMENT, documents, rejects)
        _drop_without_text(database, queries.name, documents.name, rejects)
        _finish(database, str(run))


def stage_rows(
    path: Path,
    rows: str | os.PathLike[str],
    needs_scores: bool = False,
    depth: int | None = None,
    rejects: Rejects | None = None,
) -> None:
    """Write JSONL rows of `{"query", "documents"}` to a file for `Tasks`; arguments as in `stage_run` otherwise.

    Args:
        path: File to write.
        rows: The rows.
        needs_scores: Whether rows must have `scores` of the first stage, one number per document.
        depth: Maximum number of documents of a row to score, the first ones; all by default.
        rejects: Collector of broken rows; without it they raise.

    Raises:
        ValueError: if a row is broken, or there is none.
    """
    with _new_database(path) as database:
        for location, line in read_lines(rows):
            try:
                row = _checked_row(parse_json(line, location), location, needs_scores)
            except ValueError as error:
                _refuse(error, line.decode(errors="replace"), rejects)
            else:
                _add_task(database, row, min(len(row["documents"]), depth or len(row["documents"])))
        _finish(database, str(rows))


@contextmanager
def _new_database(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            # The file is of use only once it is complete: nothing needs to survive a kill.
            for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE_KIB}"):
                database.execute(f"PRAGMA {pragma}")
            database.executescript(_SCHEMA)
            database.execute("BEGIN")
            yield database
            database.execute("COMMIT")
    except sqlite3.OperationalError as error:
        raise OSError(
            f"{path.parent} could not be written ({error}): free some space and run the same command again."
        ) from error


def _refuse(error: ValueError, row: Any, rejects: Rejects | None) -> None:
    if rejects is None:
        raise error from None
    rejects.add(error, row)


def _queries_of(run: str | os.PathLike[str], rejects: Rejects | None) -> Iterator[list[tuple[str, Hit]]]:
    """Yield the lines of each query, with their locations."""
    for _, hits in itertools.groupby(_hits(run, rejects), key=lambda located: located[1].query):
        yield list(hits)


def _hits(run: str | os.PathLike[str], rejects: Rejects | None) -> Iterator[tuple[str, Hit]]:
    for location, line in read_lines(run):
        try:
            hit = parse_run_line(line, location)
        except ValueError as error:
            _refuse(error, line.decode(errors="replace"), rejects)
        else:
            yield location, hit


def _add_hits(
    database: sqlite3.Connection, hits: Sequence[tuple[str, Hit]], depth: int | None, rejects: Rejects | None
) -> None:
    """Add the best documents of one query."""
    location, (query, _, _) = hits[0]
    if _text_id(database, _QUERY, query) is not None:
        message = f"{location}: query {query} was there before: sort the run by query, as sort -s -k1,1 does."
        for _, hit in hits:
            _refuse(ValueError(message), " ".join(map(str, hit)), rejects)
        return
    by_document: dict[str, tuple[str, Hit]] = {}
    for location, hit in hits:
        if hit.document in by_document:
            message = f"{location}: query {query} has document {hit.document} twice."
            _refuse(ValueError(message), " ".join(map(str, hit)), rejects)
        else:
            by_document[hit.document] = location, hit
    best = sorted(by_document.values(), key=lambda located: -located[1].score)[:depth]
    content = {
        "query": _add_text(database, _QUERY, query, hits[0][0]),
        "documents": [
            _text_id(database, _DOCUMENT, hit.document) or _add_text(database, _DOCUMENT, hit.document, location)
            for location, hit in best
        ],
        "scores": [hit.score for _, hit in best],
    }
    _add_task(database, content, len(best))


def _text_id(database: sqlite3.Connection, kind: int, name: str) -> int | None:
    """Number of a query or document, from 1; None if it is new."""
    known = database.execute("SELECT id FROM texts WHERE kind = ? AND name = ?", (kind, name)).fetchone()
    return known[0] if known else None


def _add_text(database: sqlite3.Connection, kind: int, name: str, place: str) -> int | None:
    """Add a query or document that the run names, and return its number."""
    return database.execute("INSERT INTO texts (kind, name, place) VALUES (?, ?, ?)", (kind, name, place)).lastrowid


def _add_task(database: sqlite3.Connection, content: dict[str, Any], pairs: int) -> None:
    # ASCII: SQLite cannot store lone surrogates.
    database.execute("INSERT INTO tasks (pairs, content) VALUES (?, ?)", (pairs, json.dumps(content)))


def _fill(database: sqlite3.Connection, kind: int, texts: Texts, rejects: Rejects | None) -> None:
    """Store the texts that the run names.

    Raises:
        ValueError: if there are none at all, or one is there twice.
    """
    is_empty = True
    for text in texts.read(rejects.add if rejects else None):
        is_empty = False
        try:
            _store(database, kind, text)
        except ValueError as error:
            _refuse(error, text.id, rejects)
    if is_empty:
        raise ValueError(f"{texts.name} is empty: there is nothing to look up the ids of the run in.")


def _store(database: sqlite3.Connection, kind: int, text: Text) -> None:
    name = text.id.encode("utf-8", "replace").decode()
    key = (kind, name)
    # As models are given it: SQLite cannot store lone surrogates.
    content = replace_surrogates(text.text)
    stored = database.execute("UPDATE texts SET text = ? WHERE kind = ? AND name = ? AND text IS NULL", (content, *key))
    if not stored.rowcount and database.execute("SELECT 1 FROM texts WHERE kind = ? AND name = ?", key).fetchone():
        raise ValueError(f"{text.location}: the id {name} was there before.")


def _drop_without_text(database: sqlite3.Connection, queries: str, documents: str, rejects: Rejects | None) -> None:
    """Refuse ids without a text, or set the lines with them aside; an empty document is one, an empty query is not."""
    database.execute("UPDATE texts SET text = NULL WHERE kind = ? AND trim(text, ?) = ''", (_QUERY, " \t\r\n"))
    sources = {_QUERY: ("query", queries), _DOCUMENT: ("document", documents)}

    def error_of(text: tuple[int, str, str]) -> ValueError:
        kind, name, place = text
        return ValueError(f"{place}: {sources[kind][0]} {name} has no text in {sources[kind][1]}.")

    missing = "SELECT kind, name, place FROM texts WHERE text IS NULL"
    first = database.execute(f"{missing} ORDER BY id LIMIT 1").fetchone()
    if first is None:
        return
    if rejects is None:
        raise error_of(first)
    for task, content in _all_tasks(database):
        texts = [content["query"], *content["documents"]]
        without_text = [database.execute(f"{missing} AND id = ?", (text,)).fetchone() for text in texts]
        kept = []
        for index, text in enumerate(without_text[1:]):
            if missing_text := without_text[0] or text:
                rejects.add(error_of(missing_text), {"score": content["scores"][index]})
            else:
                kept.append(index)
        for key in ("documents", "scores"):
            content[key] = [content[key][index] for index in kept]
        database.execute("UPDATE tasks SET content = ?, pairs = ? WHERE id = ?", (json.dumps(content), len(kept), task))
    database.execute("DELETE FROM tasks WHERE pairs = 0")


def _all_tasks(database: sqlite3.Connection) -> Iterator[tuple[int, dict[str, Any]]]:
    (last,) = database.execute("SELECT coalesce(max(id), 0) FROM tasks").fetchone()
    for task in range(1, last + 1):
        (content,) = database.execute("SELECT content FROM tasks WHERE id = ?", (task,)).fetchone()
        yield task, json.loads(content)


def _finish(database: sqlite3.Connection, source: str) -> None:
    """Divide the tasks into blocks.

    Raises:
        ValueError: if there are none.
    """
    blocks = _blocks(database.execute("SELECT id, pairs FROM tasks ORDER BY id"))
    # Read as they are written: the two tables have nothing to do with each other.
    database.executemany("INSERT INTO blocks VALUES (?, ?, ?)", blocks)
    (count,) = database.execute("SELECT count(*) FROM blocks").fetchone()
    if not count:
        raise ValueError(f"{source} has nothing to rerank: no line of it can be used.")


def _blocks(tasks: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Yield number, first and last task of each block."""
    number, first, last, size = 0, None, None, 0
    for task, pairs in tasks:
        first, last, size = task if first is None else first, task, size + pairs
        if size >= PAIRS_PER_BLOCK:
            yield number, first, last
            number, first, size = number + 1, None, 0
    if first is not None and last is not None:
        yield number, first, last


def _checked_row(row: Any, location: str, needs_scores: bool) -> dict[str, Any]:
    if not isinstance(row, dict) or not isinstance(row.get("query"), str) or not isinstance(row.get("documents"), list):
        raise ValueError(f"{location}: a row has a 'query', a string, and 'documents', a list.")
    if not row["query"].strip():
        raise ValueError(f"{location}: the query has no text.")
    for document in row["documents"]:
        checked_document(document, location)
    if needs_scores and not _are_scores(row.get("scores"), row["documents"]):
        raise ValueError(f"{location}: to fuse, a row needs 'scores' of the first stage, one number per document.")
    return row


def _are_scores(scores: Any, documents: Sequence[Document]) -> bool:
    return isinstance(scores, list) and len(scores) == len(documents) and all(map(_is_score, scores))


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST_SCORE
