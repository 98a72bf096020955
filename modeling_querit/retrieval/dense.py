"""First-stage retrieval by embeddings: any sentence-transformers-style encoder, exact search in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class DenseIndex:
    """Embeddings of documents, searched like `BM25`.

    Args:
        documents: Document id -> `{"title", "text"}`.
        encoder: A `SentenceTransformer`, or whatever has its `encode_query` and `encode_document` (or `encode`).
        batch_size: Texts encoded at once.

    Example:
        ```python
        >>> index = DenseIndex(collection.documents, SentenceTransformer("Qwen/Qwen3-Embedding-0.6B"))
        >>> index.search(["who wrote Faust"], k=10)
        ```
    """

    def __init__(self, documents: Mapping[str, Mapping[str, str]], encoder: Any, batch_size: int = 32):
        if not documents:
            raise ValueError("There are no documents to index.")
        self.ids = list(documents)
        self._encoder, self._batch_size = encoder, batch_size
        texts = [f"{each.get('title') or ''} {each['text']}".strip() for each in documents.values()]
        self._embeddings = self._encode("encode_document", texts)

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """For each query its `k` best (document id, cosine), best first."""
        from sentence_transformers.util import semantic_search

        if not queries:
            return []
        found = semantic_search(self._encode("encode_query", list(queries)), self._embeddings, top_k=k)
        return [[(self.ids[hit["corpus_id"]], hit["score"]) for hit in hits] for hits in found]

    def _encode(self, method: str, texts: list[str]) -> Any:
        encode = getattr(self._encoder, method, None) or self._encoder.encode
        return encode(texts, batch_size=self._batch_size, convert_to_tensor=True)
