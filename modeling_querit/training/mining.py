"""Training rows from judged collections: each query with a positive and hard negatives found by BM25."""

from __future__ import annotations

import random

from ..retrieval.bm25 import BM25
from ..retrieval.collection import Collection
from .data import Row


def mine_rows(
    collection: Collection,
    *,
    negatives: int = 3,
    hard: int = 2,
    easy_first: float = 0.0,
    depth: int = 30,
    limit: int | None = None,
    max_chars: int | None = None,
    seed: int = 0,
) -> list[Row]:
    """One row a query: a document judged relevant, and `negatives` documents not judged relevant.

    `hard` of the negatives come from BM25's first `depth`, or, where the collection lists judged candidates, from
    those judged irrelevant; the others are any document of the collection.

    Args:
        collection: The collection; its queries need a judgement above 0 to give a row.
        negatives: Negatives a row, at least 1.
        hard: How many of them are hard ones.
        easy_first: Share of the rows, the first ones, that have no hard negatives: a start for an untrained model.
        depth: How far down BM25's list hard negatives are drawn from.
        limit: At most so many queries, drawn at random; all by default.
        max_chars: Leave out positives that are longer: the answer may lie beyond what the model is shown.
        seed: Of every draw.

    Returns:
        Rows of `query`, `documents` (the positive first), `labels` and `source`, `"COLLECTION/QUERY_ID"`.
    """
    if negatives < 1 or hard < 0:
        raise ValueError(f"negatives is {negatives} and hard is {hard}: a row needs a negative to learn from.")
    rng = random.Random(f"{seed}/{collection.name}")
    positives = _positives(collection, max_chars)
    queries = rng.sample(sorted(positives), len(positives))[:limit]
    pools = _pools(collection, queries, depth)
    everything = sorted(collection.documents)
    rows: list[Row] = []
    for number, query_id in enumerate(queries):
        relevant = {document for document, grade in collection.qrels[query_id].items() if grade > 0}
        misses = [document for document in pools[query_id] if document not in relevant]
        wanted = 0 if number < easy_first * len(queries) else min(hard, negatives)
        chosen = rng.sample(misses, min(wanted, len(misses)))
        others = [document for document in everything if document not in relevant and document not in chosen]
        chosen += rng.sample(others, min(negatives - len(chosen), len(others)))
        if chosen:
            documents = [rng.choice(positives[query_id]), *chosen]
            rows.append(
                {
                    "query": collection.queries[query_id],
                    "documents": [collection.documents[document] for document in documents],
                    "labels": [1] + [0] * len(chosen),
                    "source": f"{collection.name}/{query_id}",
                }
            )
    return rows


def _positives(collection: Collection, max_chars: int | None) -> dict[str, list[str]]:
    """Of each query the documents with its highest grade, if that is above 0."""
    positives = {}
    for query_id, grades in collection.qrels.items():
        best = max(grades.values())
        documents = [
            document
            for document, grade in grades.items()
            if grade == best > 0 and (max_chars is None or len(collection.documents[document]["text"]) <= max_chars)
        ]
        if documents:
            positives[query_id] = documents
    return positives


def _pools(collection: Collection, queries: list[str], depth: int) -> dict[str, list[str]]:
    """Where the hard negatives of each query come from: its judged candidates, otherwise BM25's best."""
    unlisted = [query_id for query_id in queries if query_id not in collection.candidates]
    found = BM25(collection.documents).search([collection.queries[query_id] for query_id in unlisted], depth)
    return {query_id: collection.candidates[query_id] for query_id in queries if query_id in collection.candidates} | {
        query_id: [document for document, _ in hits] for query_id, hits in zip(unlisted, found, strict=True)
    }
