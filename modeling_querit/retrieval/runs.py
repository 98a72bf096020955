"""Rankings as files in TREC's run format, and several joined into one."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files import replacing

# Query id -> (document id, score), best first.
Run = dict[str, list[tuple[str, float]]]
_FILES = (".trec", ".run")


def is_run(name: str) -> bool:
    """Whether a name is that of a file in TREC's run format, `.trec` or `.run`."""
    return name.endswith(_FILES)


def read_run(path: str | os.PathLike) -> Run:
    """A file with lines `query Q0 document rank score tag`; documents by score, in the order of lines if that is equal.

    Raises:
        ValueError: if a line is none of these, or a query has a document twice; the message names file and line.
    """
    run: dict[str, dict[str, float]] = defaultdict(dict)
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.split()
        try:
            query, _, document, _, score = fields[:5]
            value = float(score)
        except ValueError:
            raise ValueError(f"{path}, line {number}: not 'query Q0 document rank score tag'.") from None
        if not math.isfinite(value):
            raise ValueError(f"{path}, line {number}: the score is {score}.")
        if document in run[query]:
            raise ValueError(f"{path}, line {number}: query {query} has document {document} twice.")
        run[query][document] = value
    return {query: sorted(hits.items(), key=lambda hit: -hit[1]) for query, hits in run.items()}


def write_run(run: Mapping[str, Sequence[tuple[str, float]]], path: str | os.PathLike, tag: str = "querit") -> None:
    """Write rankings in the same format."""
    with replacing(path) as aside, aside.open("w", encoding="utf-8") as lines:
        for query, hits in run.items():
            for name in (query, *(document for document, _ in hits)):
                if name.split() != [name]:
                    raise ValueError(
                        f"{path}: id {name!r} is empty or has white space, which the format has no way to write."
                    )
            for rank, (document, score) in enumerate(hits, start=1):
                lines.write(f"{query} Q0 {document} {rank} {float(score)!r} {tag}\n")


def fuse(
    rankings: Sequence[Sequence[tuple[str, float]]], k: int | None = None, constant: int = 60
) -> list[tuple[str, float]]:
    """One ranking from several, by reciprocal rank: a document's score is the sum of `1 / (constant + rank)`.

    Source: Cormack, Clarke and Buettcher, SIGIR 2009.

    Args:
        rankings: (document id, score), best first each; their scores do not count.
        k: How many to return; all by default.
        constant: How little the first ranks stand out.

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
    # Not sum: that of three and more depends on their order.
    fused = {document: math.fsum(each) for document, each in shares.items()}
    # By id where scores are equal, so that the order of rankings does not matter.
    return sorted(fused.items(), key=lambda hit: (-hit[1], hit[0]))[:k]
