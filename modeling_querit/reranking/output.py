"""The output of a bulk reranking: a TREC run, or the rows with scores, merged from the shards of all processes."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..files import json_line
from ..retrieval.fusion import weighted_sum
from ..retrieval.runs import run_lines
from .shards import Shards
from .tasks import Ranked, Tasks

_TAG = "querit"
# Scores -> whether a document is shown.
Keep = Callable[[Sequence[float]], list[bool]]
# Scores of the first stage and of the reranker -> the scores to rank by.
Fuse = Callable[[Sequence[float], Sequence[float]], list[float]]


def fuse_by(weight: float | None, normalization: str) -> Fuse | None:
    """Return the fusion with this weight of the first stage; None without a weight."""
    if weight is None:
        return None
    return lambda first_stage, reranker: weighted_sum(first_stage, reranker, weight, normalization)


def write_output(
    path: Path, tasks: Tasks, shards: Shards, fuse: Fuse | None, keep: Keep | None, is_gzipped: bool = False
) -> None:
    """Write the output, query by query.

    Args:
        path: File to write.
        tasks: The queries with their candidates.
        shards: The scores of all blocks.
        fuse: Function from first-stage and reranker scores to final scores; None ranks by the reranker's.
        keep: Function from reranker scores to a keep mask; None keeps all.
        is_gzipped: Whether the file is compressed.
    """
    with _open(path, is_gzipped) as file:
        for block in range(tasks.num_blocks):
            scores = iter(shards.scores(block))
            for ranked in tasks.ranked(block):
                file.write(_format(ranked, [next(scores) for _ in range(ranked.pairs)], fuse, keep))


@contextmanager
def _open(path: Path, is_gzipped: bool) -> Iterator[BinaryIO]:
    with path.open("wb") as file:
        if not is_gzipped:
            yield file
        else:
            # Without name and time the same content gives the same bytes.
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as compressed:
                yield compressed  # type: ignore[misc]


def _format(ranked: Ranked, scores: list[float], fuse: Fuse | None, keep: Keep | None) -> bytes:
    shown = keep(scores) if keep else [True] * len(scores)
    if fuse and scores:
        scores = fuse((ranked.scores or [])[: len(scores)], scores)
    if ranked.row is None:
        hits = list(itertools.compress(zip(ranked.documents, scores, strict=True), shown))
        # sorted() is stable: documents of equal score keep the order of the first stage.
        return run_lines(str(ranked.query), sorted(hits, key=lambda hit: -hit[1]), _TAG).encode()
    values = [score if is_shown else None for score, is_shown in zip(scores, shown, strict=True)]
    values += [None] * (len(ranked.row["documents"]) - len(values))
    # JSON knows lone surrogates as escape sequences, UTF-8 does not know them at all.
    return json_line(ranked.row | {"scores": values}).encode("utf-8", "backslashreplace")


def keep_probable(probability_of: Callable[[float], float], minimum: float) -> Keep:
    """Show documents whose probability of relevance is at least `minimum`.

    Args:
        probability_of: Probability of relevance of a document with this score.
        minimum: Probability in [0, 1].
    """
    return lambda scores: [probability >= minimum for probability in map(probability_of, scores)]
