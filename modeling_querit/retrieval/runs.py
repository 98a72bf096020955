"""TREC run files, and reciprocal rank fusion."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..files import atomic_write, decode_line, read_lines

# Query id -> (document id, score), best first.
Run = dict[str, list[tuple[str, float]]]
_SUFFIXES = (".trec", ".run")


def is_run(name: str) -> bool:
    """Whether a file name is that of a TREC run: `.trec` or `.run`."""
    return name.endswith(_SUFFIXES)


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a TREC run, lines of `query Q0 document rank score tag`.

    Args:
        path: Path of the file.

    Returns:
        The documents of each query by score, best first; equal scores keep the order of the lines.

    Raises:
        ValueError: if a line has another form, or a query has a document twice; the message names file and line.
    """
    run: dict[str, dict[str, float]] = defaultdict(dict)
    for place, line in read_lines(path):
        query, document, score = parse_run_line(line, place)
        if document in run[query]:
            raise ValueError(f"{place}: query {query} has document {document} twice.")
        run[query][document] = score
    return {query: sorted(hits.items(), key=lambda hit: -hit[1]) for query, hits in run.items()}


class Hit(NamedTuple):
    """One line of a TREC run: a document that was found for a query, with its score."""

    query: str
    document: str
    score: float


def parse_run_line(line: bytes, place: str) -> Hit:
    """Parse a line of a TREC run, `query Q0 document rank score tag`.

    Args:
        line: The line, in UTF-8.
        place: File and line number, for the error message.

    Raises:
        ValueError: if the line has another form, or its score is not a finite number.
    """
    fields = decode_line(line, place).split()
    try:
        # The tag may be missing. As in trec_eval, there may be no more columns: an id would have a space.
        query, _, document, _, score, _ = fields if len(fields) > 5 else [*fields, ""]
        value = float(score)
    except ValueError:
        raise ValueError(f"{place}: not 'query Q0 document rank score tag'.") from None
    if not math.isfinite(value):
        raise ValueError(f"{place}: the score is {score}, not a finite number.")
    return Hit(query, document, value)


def run_lines(query: str, hits: Sequence[tuple[str, float]], tag: str) -> str:
    """Write the lines of a TREC run for one query.

    Args:
        query: Query id, without white space.
        hits: (document id, score), best first.
        tag: Name of the system, the last column.
    """
    ranked = enumerate(hits, start=1)
    return "".join(f"{query} Q0 {document} {rank} {float(score)!r} {tag}\n" for rank, (document, score) in ranked)


def write_run(
    run: Mapping[str, Sequence[tuple[str, float]]], path: str | os.PathLike[str], tag: str = "querit"
) -> None:
    """Write a TREC run, atomically.

    Args:
        run: Query id -> (document id, score), best first.
        path: Path of the file.
        tag: Name of the system, the last column.

    Raises:
        ValueError: if an id is empty or has white space, which the format cannot hold.
    """
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for query, hits in run.items():
            for identifier in (query, *(document for document, _ in hits)):
                check_id(identifier, path)
            file.write(run_lines(query, hits, tag))


def check_id(identifier: str, place: str | os.PathLike[str]) -> None:
    """Check that TREC's formats can hold the id of a query or document.

    Args:
        identifier: The id.
        place: File or collection, for the error message.

    Raises:
        ValueError: if it is empty or has white space.
    """
    if identifier.split() != [identifier]:
        raise ValueError(f"{place}: id {identifier!r} is empty or has white space, which TREC runs cannot hold.")


def fuse(
    rankings: Sequence[Sequence[tuple[str, float]]], k: int | None = None, constant: int = 60
) -> list[tuple[str, float]]:
    """Fuse rankings by reciprocal rank: the score of a document is the sum of `1 / (constant + rank)`.

    Source: Cormack, Clarke and Buettcher, SIGIR 2009.

    Args:
        rankings: Rankings of (document id, score), best first; only the order counts. A single one is kept as it is.
        k: Number of documents to return; all by default.
        constant: Constant of the formula: the larger, the less the first ranks stand out.

    Example:
        ```python
        >>> fuse([[("a", 9.0), ("b", 8.0)], [("b", 0.7)]])
        [('b', 0.0325...), ('a', 0.0163...)]
        ```
    """
    if len(rankings) == 1:
        return list(rankings[0])[:k]
    shares: dict[str, list[float]] = defaultdict(list)
    for ranking in rankings:
        for rank, (document, _) in enumerate(ranking, start=1):
            shares[document].append(1 / (constant + rank))
    # fsum, as the sum of three or more floats depends on their order.
    fused = {document: math.fsum(reciprocals) for document, reciprocals in shares.items()}
    # Equal scores are ordered by id, so that the order of the rankings does not matter.
    return sorted(fused.items(), key=lambda hit: (-hit[1], hit[0]))[:k]
