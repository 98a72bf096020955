"""Training rows from judged collections: each query with a positive and hard negatives found by BM25."""

from __future__ import annotations

import random

from ..retrieval.bm25 import BM25
from ..retrieval.collection import Collection
from .data import Row


def mine_rows(
    collection: Collection,
    *,
    negatives: int = 4,
    depth: int = 30,
    limit: int | None = None,
    max_chars: int | None = None,
    seed: int = 0,
) -> list[Row]:
    """One row a query: a document judged relevant, and `negatives` documents not judged relevant.

    Negatives come from BM25's first `depth`, all but one, which is any document of the collection, so that easy
    ones are seen as well. Where the collection lists judged candidates, negatives are those judged irrelevant.

    Args:
        collection: The collection; its queries need a judgement above 0 to give a row.
        negatives: Negatives a row, at least 1.
        depth: How far down BM25's list hard negatives are drawn from.
        limit: At most so many queries, drawn at random; all by default.
        max_chars: Leave out queries whose positive is longer: its answer may lie beyond what the model is shown.
        seed: Of every draw.
    """
    rng = random.Random(f"{seed}/{collection.name}")
    queries = sorted(collection.queries)
    rng.shuffle(queries)
    retriever = BM25(collection.documents)
    everything = sorted(collection.documents)
    rows: list[Row] = []
    for query_id in queries:
        if len(rows) == limit:
            break
        grades = collection.qrels[query_id]
        best = max(grades.values())
        positives = [document for document, grade in grades.items() if grade == best > 0]
        if max_chars is not None:
            positives = [one for one in positives if len(collection.documents[one]["text"]) <= max_chars]
        if not positives:
            continue
        pool = collection.candidates.get(query_id) or [
            document for document, _ in retriever.search([collection.queries[query_id]], depth)[0]
        ]
        hard = [document for document in pool if grades.get(document, 0) <= 0]
        chosen = rng.sample(hard, min(negatives - 1, len(hard)))
        easy = [document for document in everything if grades.get(document, 0) <= 0 and document not in chosen]
        chosen += rng.sample(easy, min(negatives - len(chosen), len(easy)))
        if not chosen:
            continue
        documents = [rng.choice(positives), *chosen]
        rows.append(
            {
                "query": collection.queries[query_id],
                "documents": [collection.documents[document] for document in documents],
                "labels": [1] + [0] * len(chosen),
                "source": f"{collection.name}/{query_id}",
            }
        )
    return rows
