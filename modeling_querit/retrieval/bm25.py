"""BM25 as a first stage for any language, by `bm25s`."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

import bm25s
import regex

from ..pair_encoding_querit import Document, document_text

# Ranges of scripts written without spaces between words, for use in a character class of a regular expression.
UNSPACED_SCRIPTS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# The \w of `regex`, unlike that of `re`, matches the vowel signs of Indic scripts.
TOKEN = regex.compile(rf"[{UNSPACED_SCRIPTS}]+|(?:(?![{UNSPACED_SCRIPTS}])[\w\p{{No}}])+")
_IS_UNSPACED = regex.compile(rf"[{UNSPACED_SCRIPTS}]")


def tokenize(text: str) -> list[str]:
    """Split a text into lower-case words, or overlapping pairs of characters where the script has no spaces.

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
    """BM25 index over documents, in memory.

    Args:
        documents: Document id -> text, or `{"title", "text"}`.

    Raises:
        ValueError: if there are no documents.

    Example:
        ```python
        >>> BM25({"a": {"title": "", "text": "red fox"}, "b": {"title": "", "text": "sea"}}).search(["fox"], k=1)
        [[('a', 0.24...)]]
        ```
    """

    def __init__(self, documents: Mapping[str, Document]):
        if not documents:
            raise ValueError("There are no documents to index.")
        self.ids = list(documents)
        self._rows = {document: row for row, document in enumerate(self.ids)}
        self._index = bm25s.BM25(method="lucene")
        tokens = [tokenize(document_text(document)) for document in documents.values()]
        # bm25s needs at least one token; no query has the token "".
        self._index.index(tokens if any(tokens) else [[""] for _ in tokens], show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """Return for each query its `k` best (document id, score), best first."""
        return [self._search(query, min(k, len(self.ids))) for query in queries]

    def scores(self, query: str, documents: Sequence[str]) -> list[float]:
        """Return the scores of a query and documents, by document id."""
        tokens = self._indexed_tokens(query)
        if not tokens:
            return [0.0] * len(documents)
        scores = self._index.get_scores(tokens)  # (documents of the index,)
        return [float(scores[self._rows[document]]) for document in documents]

    def _search(self, query: str, k: int) -> list[tuple[str, float]]:
        tokens = self._indexed_tokens(query)
        if not tokens:
            return [(document, 0.0) for document in self.ids[:k]]
        rows, scores = self._index.retrieve([tokens], k=k, show_progress=False)  # (1, k) each
        return [(self.ids[row], float(score)) for row, score in zip(rows[0], scores[0], strict=True)]

    def _indexed_tokens(self, query: str) -> list[str]:
        return [token for token in tokenize(query) if token in self._index.vocab_dict]
