"""Rows from judged collections: each query with a positive, and negatives from bands of a first stage's ranking."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ..retrieval.bm25 import BM25
from ..retrieval.collection import Collection
from .rows import Row

Item = TypeVar("Item")


class Retriever(Protocol):
    """What finds candidates: `BM25`, `DenseIndex`, or anything of that form."""

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """For each query its `k` best (document id, score), best first."""


@dataclass(frozen=True)
class Bands:
    """How many documents of a query are drawn from where in its ranking.

    Args:
        top: From the first `top_depth`.
        middle: From those behind, down to `depth`.
        random: From everything else.
        top_depth, depth: Where the bands end.
    """

    top: int = 2
    middle: int = 0
    random: int = 1
    top_depth: int = 30
    depth: int = 100

    def __post_init__(self) -> None:
        if min(self.top, self.middle, self.random) < 0 or self.size < 1:
            raise ValueError(f"{self} draws no document: ask for at least one.")
        if not 0 < self.top_depth <= self.depth:
            raise ValueError(f"top_depth is {self.top_depth} and depth {self.depth}: 0 < top_depth <= depth.")

    @property
    def size(self) -> int:
        """Documents in all."""
        return self.top + self.middle + self.random

    def draw(self, ranked: Sequence[Item], others: Sequence[Item], rng: random.Random) -> list[Item]:
        """Documents from each band; where one has too few, the next makes up for it.

        Args:
            ranked: The ranking, best first.
            others: Documents that are not in it; those beyond `depth` count among them.
            rng: Of the draw.
        """
        bands = (
            (self.top, ranked[: self.top_depth]),
            (self.middle, ranked[self.top_depth : self.depth]),
            (self.random, [*ranked[self.depth :], *others]),
        )
        chosen: list[Item] = []
        wanted = 0
        for count, band in bands:
            wanted += count
            chosen += rng.sample(band, min(wanted - len(chosen), len(band)))
        return chosen


def mine_rows(
    collection: Collection,
    *,
    bands: Bands | None = None,
    retriever: Retriever | None = None,
    guard: Any = None,
    guard_margin: float = 0.0,
    easy_first: float = 0.0,
    limit: int | None = None,
    max_chars: int | None = None,
    seed: int = 0,
) -> list[Row]:
    """One row a query: a document judged relevant, and documents not judged relevant, drawn from `bands`.

    The ranking is the retriever's, or, where the collection lists judged candidates, those judged irrelevant.

    Args:
        collection: The collection; its queries need a judgement above 0 to give a row.
        bands: How many negatives from where; 2 of the first 30 and one of the rest by default.
        retriever: BM25 over the collection by default.
        guard: A teacher with `predict(pairs) -> scores`, a reranker or CrossEncoder: a negative that it scores above
            the positive less `guard_margin` may well be relevant, and is left out.
        guard_margin: On the teacher's scale.
        easy_first: Share of the rows, the first ones, whose negatives are all drawn at random: a start for an untrained
            model.
        limit: At most so many queries, drawn at random; all by default.
        max_chars: Leave out positives that are longer: the answer may lie beyond what the model is shown.
        seed: Of every draw.

    Returns:
        Rows of `query`, `documents` (the positive first), `labels` and `source`, `"COLLECTION/QUERY_ID"`.
    """
    bands = bands or Bands()
    rng = random.Random(f"{seed}/{collection.name}")
    positives = _positives(collection, max_chars)
    queries = rng.sample(sorted(positives), len(positives))[:limit]
    rankings = _rankings(collection, queries, bands.depth, retriever)
    everything = sorted(collection.documents)
    easy = Bands(top=0, random=bands.size)
    rows: list[Row] = []
    for number, query_id in enumerate(queries):
        relevant = {document for document, grade in collection.qrels[query_id].items() if grade > 0}
        ranked = [document for document in rankings[query_id] if document not in relevant]
        taken = relevant.union(ranked)
        positive = rng.choice(positives[query_id])
        if guard is not None:
            ranked = _guarded(collection, query_id, positive, ranked, guard, guard_margin)
        others = [document for document in everything if document not in taken]
        if number < easy_first * len(queries):
            chosen = easy.draw([], others or ranked, rng)
        else:
            chosen = bands.draw(ranked, others, rng)
        if chosen:
            documents = [collection.documents[document] for document in (positive, *chosen)]
            rows.append(
                {
                    "query": collection.queries[query_id],
                    "documents": documents,
                    "labels": [1] + [0] * len(chosen),
                    "source": f"{collection.name}/{query_id}",
                }
            )
    return rows


def _guarded(
    collection: Collection, query_id: str, positive: str, ranked: list[str], guard: Any, margin: float
) -> list[str]:
    """The documents that the teacher scores below the positive, by more than the margin."""
    query = collection.queries[query_id]
    pairs = [(query, _text_of(collection.documents[document])) for document in (positive, *ranked)]
    best, *scores = (float(score) for score in guard.predict(pairs))
    return [document for document, score in zip(ranked, scores, strict=True) if score < best - margin]


def _text_of(document: Mapping[str, str]) -> str:
    # As one string: not every teacher knows titles.
    return f"{document.get('title') or ''} {document['text']}".strip()


def _positives(collection: Collection, max_chars: int | None) -> dict[str, list[str]]:
    """Of each query the documents with its highest grade, if that is above 0."""
    positives = {}
    for query_id, grades in collection.qrels.items():
        best = max(grades.values())
        documents = [
            document
            for document, grade in grades.items()
            if grade == best > 0
            and document in collection.documents
            and (max_chars is None or len(collection.documents[document]["text"]) <= max_chars)
        ]
        if documents:
            positives[query_id] = documents
    return positives


def _rankings(
    collection: Collection, queries: list[str], depth: int, retriever: Retriever | None
) -> dict[str, list[str]]:
    """Where the negatives of each query come from: its judged candidates, otherwise what the retriever finds."""
    unlisted = [query_id for query_id in queries if query_id not in collection.candidates]
    found: list[list[tuple[str, float]]] = []
    if unlisted:
        retriever = retriever or BM25(collection.documents)
        found = retriever.search([collection.queries[query_id] for query_id in unlisted], depth)
    return {query_id: collection.candidates[query_id] for query_id in queries if query_id in collection.candidates} | {
        query_id: [document for document, _ in hits] for query_id, hits in zip(unlisted, found, strict=True)
    }


def judged_rows(
    collection: Collection, retriever: Retriever | None = None, depth: int = 20, limit: int | None = None, seed: int = 0
) -> list[Row]:
    """Rows to validate on: each query with its judged candidates, otherwise a first stage's best, labels as judged.

    Args:
        collection: The collection; its queries need a judgement above 0 to give a row.
        retriever: BM25 over the collection by default.
        depth: Documents a query, where the collection lists no candidates.
        limit: At most so many queries, drawn at random; all by default.
        seed: Of the draw.
    """
    answerable = sorted(query for query, grades in collection.qrels.items() if max(grades.values()) > 0)
    queries = random.Random(f"{seed}/{collection.name}").sample(answerable, len(answerable))[:limit]
    rankings = _rankings(collection, queries, depth, retriever)
    return [
        {
            "query": collection.queries[query],
            "documents": [collection.documents[document] for document in rankings[query]],
            "labels": [collection.qrels[query].get(document, 0) for document in rankings[query]],
            "source": f"{collection.name}/{query}",
        }
        for query in queries
        if rankings[query]
    ]
