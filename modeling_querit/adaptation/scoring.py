"""Stage 4: score every candidate by every teacher, cached as scores come, and make training rows of the scores."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict
from urllib.parse import quote

from ..cache import SCORES, DiskCache
from .candidates import CandidateRow
from .corpus import CorpusDocument
from .extractive import without_copy
from .teachers import Teacher, TeacherPair, pair_key


class ScoredRow(TypedDict):
    """A line of `data/train.jsonl`: a training row with the scores of all teachers.

    Args:
        query: Text of the query.
        documents: `{"title", "text"}` of each candidate, as the student reads it.
        scores: Teacher -> a score for each document.
        source: Id of the query.
        positive: Index of the document that the query was written for; None if it has no scores.
    """

    query: str
    documents: list[dict[str, str]]
    scores: dict[str, list[float]]
    source: str
    positive: int | None


def score_with_teachers(
    teachers: Mapping[str, Teacher],
    pairs: Sequence[TeacherPair],
    folder: Path,
    *,
    process: int = 0,
    processes: int = 1,
    advance: Callable[[int], None] = lambda count: None,
) -> Counter[str]:
    """Score pairs that are not in the cache; each batch is written to the cache before the next.

    Args:
        teachers: Teachers by name.
        pairs: Pairs, grouped by query, and the same in every process.
        folder: Folder of the caches, one for each teacher.
        process, processes: Index of this process and number of processes, which take batches in turn.
        advance: Function called with the number of pairs that a batch has dealt with.

    Returns:
        Teacher -> number of pairs that this process got no finite score for.

    Raises:
        ValueError: if a teacher returns more or fewer scores than it got pairs.
    """
    failed: Counter[str] = Counter()
    for name, teacher in teachers.items():
        cache = score_cache(folder, name)
        if hasattr(teacher, "endpoint") and any(pair_key(teacher, pair) in cache for pair in pairs):
            teacher.endpoint.mark_as_working()
        for start in range(process * teacher.batch_size, len(pairs), processes * teacher.batch_size):
            batch = pairs[start : start + teacher.batch_size]
            missing = {key: pair for pair in batch if (key := pair_key(teacher, pair)) not in cache}
            if missing:
                scores = teacher.score(list(missing.values()))
                if len(scores) != len(missing):
                    raise ValueError(f"Teacher {name!r} returned {len(scores)} scores for {len(missing)} pairs.")
                finite = {
                    key: score
                    for key, score in zip(missing, scores, strict=True)
                    if score is not None and math.isfinite(score)
                }
                failed[name] += len(missing) - len(finite)
                cache.add(finite)
            advance(len(batch))
    return failed


def score_cache(folder: Path, name: str) -> DiskCache[float]:
    """Cache of a teacher's scores; the teacher may be named after a path."""
    return DiskCache(folder / quote(name, safe="").replace(".", "%2E"), SCORES)


def make_rows(
    candidates: Iterable[CandidateRow],
    queries: Mapping[str, str],
    documents: Mapping[str, CorpusDocument],
    teachers: Mapping[str, Teacher],
    folder: Path,
    dropped: Counter[str],
    masked: float = 0.0,
    seed: int = 0,
) -> Iterator[ScoredRow]:
    """Make training rows of candidates that every teacher has scored.

    Teachers read whole documents; from the student, the passage that a query was copied from may be masked.

    Args:
        candidates: Candidates of each query.
        queries: Texts of queries by id.
        documents: Documents by id.
        teachers: Teachers by name.
        folder: Folder of the caches that `score_with_teachers` has filled.
        dropped: Counter of the documents without a score of every teacher, and of the queries left with fewer than two.
        masked: Share of the queries whose verbatim copy is removed from their source, in [0, 1].
        seed: Seed of the draw, which depends on the seed and the query's id alone.
    """
    caches = {name: score_cache(folder, name) for name in teachers}
    for candidate in candidates:
        query = queries[candidate["query"]]
        scored: list[tuple[CorpusDocument, list[float]]] = []
        for document in (documents[name] for name in candidate["documents"]):
            keys = {name: pair_key(teacher, (query, document)) for name, teacher in teachers.items()}
            if all(key in caches[name] for name, key in keys.items()):
                scored.append((document, [caches[name][key] for name, key in keys.items()]))
            else:
                dropped["document without score"] += 1
        if len(scored) < 2:
            dropped["query with fewer than two documents"] += 1
            continue
        is_masked = random.Random(f"{seed}/masked/{candidate['query']}").random() < masked
        ids = [document["_id"] for document, _ in scored]
        shown = [
            (is_masked and document["_id"] == candidate["source"] and without_copy(document, query)) or document
            for document, _ in scored
        ]
        yield {
            "query": query,
            "documents": [{"title": document["title"], "text": document["text"]} for document in shown],
            "scores": {name: [scores[column] for _, scores in scored] for column, name in enumerate(teachers)},
            "source": candidate["query"],
            "positive": ids.index(candidate["source"]) if candidate["source"] in ids else None,
        }


def pairs_of(
    candidates: Iterable[CandidateRow], queries: Mapping[str, str], documents: Mapping[str, CorpusDocument]
) -> list[TeacherPair]:
    """Pair every query with its candidates."""
    return [
        (queries[candidate["query"]], documents[name]) for candidate in candidates for name in candidate["documents"]
    ]
