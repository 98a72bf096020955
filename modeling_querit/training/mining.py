"""Rows from collections with relevance judgements: negatives for training, candidate lists for validation."""

from __future__ import annotations

import random

from ..evaluation.evaluate import Reranker
from ..evaluation.first_stages import answerable_queries, first_stage_candidates
from ..pair_encoding_querit import document_text
from ..retrieval.bm25 import BM25
from ..retrieval.collection import Collection
from ..retrieval.sampling import Bands, Retriever
from .data import Row


def mine_rows(
    collection: Collection,
    *,
    bands: Bands | None = None,
    retriever: Retriever | None = None,
    false_negative_filter: Reranker | None = None,
    false_negative_margin: float = 0.0,
    easy_first: float = 0.0,
    limit: int | None = None,
    max_positive_chars: int | None = None,
    seed: int = 0,
) -> list[Row]:
    """Mine one row per query: a document judged relevant, and negatives drawn from bands of the query's ranking.

    The ranking is the collection's candidate list of the query, where there is one, and the retriever's otherwise.
    Documents judged relevant are never negatives.

    Args:
        collection: Collection to mine; queries without a relevant document give no row.
        bands: Numbers of negatives to draw from parts of a ranking; by default 2 of the first 30 and 1 of the rest.
        retriever: First stage; BM25 over the collection by default.
        false_negative_filter: Reranker whose scores decide which negatives are kept; by default all are.
        false_negative_margin: Distance below the positive's score that a negative's score must exceed to be kept.
        easy_first: Share of the rows, the first ones, whose negatives are all random: a start for an untrained model.
        limit: Maximum number of queries, drawn at random; all by default.
        max_positive_chars: Maximum number of characters of a positive; longer ones are discarded, since the answer may
            lie beyond the model's limit.
        seed: Seed of all draws.

    Returns:
        Rows of `query`, `documents` (the positive first), `labels` and `source`, `"COLLECTION/QUERY_ID"`.
    """
    bands = bands or Bands()
    easy_bands = Bands(top=0, random=bands.size)
    rng = random.Random(f"{seed}/{collection.name}")
    positives = _best_documents(collection, max_positive_chars)
    queries = rng.sample(sorted(positives), len(positives))[:limit]
    rankings = _rankings(collection, queries, bands.depth, retriever)
    all_documents = sorted(collection.documents)
    rows: list[Row] = []
    for number, query in enumerate(queries):
        relevant = {document for document, grade in collection.qrels[query].items() if grade > 0}
        ranked = [document for document in rankings[query] if document not in relevant]
        excluded = relevant.union(ranked)
        positive = rng.choice(positives[query])
        if false_negative_filter is not None:
            ranked = _below_positive(collection, query, positive, ranked, false_negative_filter, false_negative_margin)
        unranked = [document for document in all_documents if document not in excluded]
        if number < easy_first * len(queries):
            negatives = easy_bands.draw([], unranked or ranked, rng)
        else:
            negatives = bands.draw(ranked, unranked, rng)
        if negatives:
            labels = dict.fromkeys([positive, *negatives], 0) | {positive: 1}
            rows.append(_make_row(collection, query, labels))
    return rows


def validation_rows(
    collection: Collection, retriever: Retriever | None = None, depth: int = 20, limit: int | None = None, seed: int = 0
) -> list[Row]:
    """Return validation rows: each query with the candidates that an evaluation would rank, grades as labels.

    Args:
        collection: Collection to validate on; queries without a relevant document give no row.
        retriever: First stage; BM25 over the collection by default.
        depth: Documents ranked for a query, where the collection has no candidate list of it.
        limit: Maximum number of queries, drawn at random; all by default.
        seed: Seed of the draw.

    Raises:
        ValueError: if no query has a relevant document.
    """
    answerable = answerable_queries(collection)
    queries = random.Random(f"{seed}/{collection.name}").sample(answerable, len(answerable))[:limit]
    candidates = first_stage_candidates(collection, retriever or BM25(collection.documents), queries, depth)
    return [
        _make_row(collection, query, {name: collection.qrels[query].get(name, 0) for name in candidates[query]})
        for query in queries
        if candidates[query]
    ]


def _make_row(collection: Collection, query: str, labels: dict[str, int]) -> Row:
    """Make a row of one query; `labels` by document id, in the order of the row."""
    return {
        "query": collection.queries[query],
        "documents": [dict(collection.documents[name]) for name in labels],
        "labels": list(labels.values()),
        "source": f"{collection.name}/{query}",
    }


def _below_positive(
    collection: Collection, query: str, positive: str, ranked: list[str], scorer: Reranker, margin: float
) -> list[str]:
    """Return the documents of a ranking that a model scores below the positive by more than the margin."""
    # As text: the model need not know titles.
    texts = [document_text(dict(collection.documents[name])) for name in (positive, *ranked)]
    scores = scorer.predict([(collection.queries[query], text) for text in texts])
    best, *others = (float(score) for score in scores)
    return [name for name, score in zip(ranked, others, strict=True) if score < best - margin]


def _best_documents(collection: Collection, max_chars: int | None) -> dict[str, list[str]]:
    """Return for each query its documents with the highest grade above 0, as far as the collection has them."""
    best_documents = {}
    for query, grades in collection.qrels.items():
        highest = max(grades.values())
        names = [name for name, grade in grades.items() if grade == highest > 0 and name in collection.documents]
        if max_chars is not None:
            names = [name for name in names if len(collection.documents[name]["text"]) <= max_chars]
        if names:
            best_documents[query] = names
    return best_documents


def _rankings(
    collection: Collection, queries: list[str], depth: int, retriever: Retriever | None
) -> dict[str, list[str]]:
    """Return per query the documents to draw negatives from: its candidate list, or else the first stage's ranking."""
    rankings = {query: collection.candidates[query] for query in queries if query in collection.candidates}
    unlisted = [query for query in queries if query not in rankings]
    if unlisted:
        retriever = retriever or BM25(collection.documents)
        results = retriever.search([collection.queries[query] for query in unlisted], depth)
        for query, hits in zip(unlisted, results, strict=True):
            rankings[query] = [name for name, _ in hits]
    return rankings
