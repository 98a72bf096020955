"""BM25 as a first stage in any language, on `bm25s`."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

import bm25s
import regex

# Scripts written without spaces between words: their runs are indexed as overlapping pairs of characters.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# Unlike that of `re`, its \w takes in the vowel signs of Indic scripts.
TOKEN = regex.compile(rf"[{_UNSPACED}]+|(?:(?![{_UNSPACED}])[\w\p{{No}}])+")
_IS_UNSPACED = regex.compile(rf"[{_UNSPACED}]")


def tokenize(text: str) -> list[str]:
    """Lower-case words; pairs of characters where the script has no spaces.

    Example:
        ```python
        >>> tokenize("The 2 cats, 東京都")
        ['the', '2', 'cats', '東京', '京都']
        ```
    """
    tokens: list[str] = []
    for run in TOKEN.findall(unicodedata.normalize("NFKC", text).lower()):
        if _IS_UNSPACED.match(run) and len(run) > 1:
            tokens.extend(run[i : i + 2] for i in range(len(run) - 1))
        else:
            tokens.append(run)
    return tokens


class BM25:
    """An index over documents, kept in memory.

    Args:
        documents: Document id -> `{"title", "text"}`.

    Example:
        ```python
        >>> BM25({"a": {"title": "", "text": "red fox"}, "b": {"title": "", "text": "sea"}}).search(["fox"], k=1)
        [[('a', 0.24...)]]
        ```
    """

    def __init__(self, documents: Mapping[str, Mapping[str, str]]):
        if not documents:
            raise ValueError("There are no documents to index.")
        self.ids = list(documents)
        self._places = {document: place for place, document in enumerate(self.ids)}
        texts = [f"{document.get('title') or ''} {document['text']}" for document in documents.values()]
        self._index = bm25s.BM25(method="lucene")
        tokens = [tokenize(text) for text in texts]
        # bm25s cannot index nothing at all; no query has the word "".
        self._index.index(tokens if any(tokens) else [[""] for _ in tokens], show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """For each query its `k` best (document id, score), best first."""
        return [self._search(query, min(k, len(self.ids))) for query in queries]

    def scores(self, query: str, documents: Sequence[str]) -> list[float]:
        """Scores of a query and documents, by id."""
        known = self._known(query)
        if not known:
            return [0.0] * len(documents)
        found = self._index.get_scores(known)
        return [float(found[self._places[document]]) for document in documents]

    def _search(self, query: str, k: int) -> list[tuple[str, float]]:
        known = self._known(query)
        if not known:
            return [(document, 0.0) for document in self.ids[:k]]
        found, scores = self._index.retrieve([known], k=k, show_progress=False)
        return [(self.ids[index], float(score)) for index, score in zip(found[0], scores[0], strict=True)]

    def _known(self, query: str) -> list[str]:
        return [token for token in tokenize(query) if token in self._index.vocab_dict]
