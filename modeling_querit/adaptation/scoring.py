"""Stage 4: every teacher's score of every candidate, none asked for twice, and the rows that come of them."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow

from ..training.rows import Row
from .corpus import Document
from .extractive import without_copy
from .shards import Shards
from .teachers import Pair, Teacher, pair_key


def score_pairs(
    teachers: Mapping[str, Teacher],
    pairs: Sequence[Pair],
    folder: Path,
    *,
    process: int = 0,
    processes: int = 1,
    advance: Callable[[int], None] = lambda count: None,
) -> Counter[str]:
    """Have each teacher score the pairs that it has not scored yet; whole batches are written down as they come.

    Args:
        teachers: By name, which is that of their folder.
        pairs: Those of a query one after the other, the same ones in every process.
        folder: Where scores are kept from run to run.
        process, processes: Each of several processes has every so many-th batch.
        advance: Told how many pairs are done.

    Returns:
        By teacher, how many pairs got no score, or none that is a finite number.

    Raises:
        ValueError: if a teacher returns more or fewer scores than it was asked for.
    """
    set_aside: Counter[str] = Counter()
    for name, teacher in teachers.items():
        kept = kept_scores(folder, name)
        if hasattr(teacher, "endpoint") and any(pair_key(teacher, pair) in kept for pair in pairs):
            teacher.endpoint.known_to_answer()
        for start in range(process * teacher.batch_size, len(pairs), processes * teacher.batch_size):
            batch = pairs[start : start + teacher.batch_size]
            asked = {key: pair for pair in batch if (key := pair_key(teacher, pair)) not in kept}
            if asked:
                scores = teacher.score(list(asked.values()))
                if len(scores) != len(asked):
                    raise ValueError(f"Teacher {name!r} was asked for {len(asked)} scores and gave {len(scores)}.")
                known = {key: score for key, score in zip(asked, scores, strict=True) if _is_number(score)}
                set_aside[name] += len(asked) - len(known)
                kept.add(known)
            advance(len(batch))
    return set_aside


def kept_scores(folder: Path, name: str) -> Shards:
    """Those of a teacher, which may be named after a path."""
    return Shards(folder / quote(name, safe="").replace(".", "%2E"), pyarrow.float64())


def _is_number(score: float | None) -> bool:
    return score is not None and math.isfinite(score)


def rows_of(
    candidates: Iterable[Mapping[str, Any]],
    queries: Mapping[str, str],
    documents: Mapping[str, Document],
    teachers: Mapping[str, Teacher],
    folder: Path,
    left_out: Counter[str],
    masked: float = 0.0,
    seed: int = 0,
) -> Iterator[Row]:
    """Rows to train on: a query, its candidates and, by teacher, their scores; `positive` is the source's place.

    Teachers have read whole documents. The student does not get to read the piece that a query was copied from.

    Args:
        candidates: `{"query": id, "source": id, "documents": [ids]}`.
        queries, documents: By id.
        teachers: By name.
        folder: Where `score_pairs` has put scores.
        left_out: Counts documents that a teacher has not scored, and queries that are left with fewer than two.
        masked: Share of queries whose source is without what they copied from it.
        seed: Of the draw, which depends on the query's id and nothing else.
    """
    kept = {name: kept_scores(folder, name) for name in teachers}
    for candidate in candidates:
        query = queries[candidate["query"]]
        found: list[tuple[Document, list[float]]] = []
        for document in (documents[each] for each in candidate["documents"]):
            keys = {name: pair_key(teacher, (query, document)) for name, teacher in teachers.items()}
            if all(key in kept[name] for name, key in keys.items()):
                found.append((document, [kept[name][key] for name, key in keys.items()]))
            else:
                left_out["document without score"] += 1
        if len(found) < 2:
            left_out["query with fewer than two documents"] += 1
            continue
        is_masked = random.Random(f"{seed}/masked/{candidate['query']}").random() < masked
        source = candidate["source"] if is_masked else None
        read = [(each["_id"] == source and without_copy(each, query)) or each for each, _ in found]
        yield {
            "query": query,
            "documents": [{"title": document["title"], "text": document["text"]} for document in read],
            "scores": {name: [scores[place] for _, scores in found] for place, name in enumerate(teachers)},
            "source": candidate["query"],
            "positive": next((n for n, (each, _) in enumerate(found) if each["_id"] == candidate["source"]), None),
        }


def pairs_of(
    candidates: Iterable[Mapping[str, Any]], queries: Mapping[str, str], documents: Mapping[str, Document]
) -> list[Pair]:
    """Every query with each of its candidates."""
    return [(queries[each["query"]], documents[document]) for each in candidates for document in each["documents"]]
