"""Queries extracted from the documents themselves, without a language model."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from ..pair_encoding_querit import document_text
from ..retrieval.bm25 import UNSPACED_SCRIPTS, tokenize
from .corpus import CacheIdentity, CorpusDocument
from .prompts import QueryRequest

# Ends of sentences in Latin, Arabic, Indic and East Asian scripts.
_SENTENCE_END = re.compile(r"(?<=[.!?؟।])\s+|(?<=[。！？])")
_WORD = re.compile(r"\S+")
_MIN_SENTENCE_CHARS = 12
_KEYWORDS = 5
# Words of a claim, which is a span of a sentence.
_CLAIM_WORDS = 12
# Tokens below which the rest of a document is too little to judge relevance by.
_MIN_TOKENS_LEFT = 5
# Word boundaries: unlike \b, between any two characters of scripts without spaces.
_WORD_START, _WORD_END = rf"(?<![^\W{UNSPACED_SCRIPTS}])", rf"(?![^\W{UNSPACED_SCRIPTS}])"


class ExtractiveGenerator:
    """A generator whose queries are pieces of the document, or words of it.

    - `title`: the title; of documents without one, the first sentence.
    - `question`: the first sentence, which tends to say what a document is about.
    - `claim`: a random sentence (inverse cloze task).
    - `keywords`: the words with the highest tf-idf, in the order of the text.

    Args:
        documents: The collection, for document frequencies.
        seed: Seed of the draws; a draw depends on the seed and the document's id alone.
    """

    batch_size = 4096

    def __init__(self, documents: Sequence[CorpusDocument], seed: int = 0):
        texts = [document_text(document) for document in documents]
        self._document_frequencies: Counter[str] = Counter()
        for text in texts:
            self._document_frequencies.update(set(tokenize(text)))
        self._document_count, self._seed = len(documents), seed
        digest = hashlib.sha256("\n".join(sorted(texts)).encode("utf-8"))
        self.identity: CacheIdentity = ["extractive", digest.hexdigest(), seed]
        self._extractors: Mapping[str, Callable[[CorpusDocument], str]] = {
            "title": lambda document: document["title"] or sentences(document["text"])[0],
            "question": lambda document: sentences(document["text"])[0],
            "claim": self._claim,
            "keywords": self._keywords,
        }

    def generate(self, requests: Sequence[QueryRequest]) -> list[str]:
        """Extract a query for each request."""
        return [self._extractors[request.style](request.document) for request in requests]

    def _claim(self, document: CorpusDocument) -> str:
        rng = random.Random(f"{self._seed}/claim/{document['_id']}")
        all_sentences = sentences(document["text"])
        # The first sentence is the question.
        words = _WORD.findall(rng.choice(all_sentences[1:] or all_sentences))
        start = rng.randrange(max(1, len(words) - _CLAIM_WORDS + 1))
        return " ".join(words[start : start + _CLAIM_WORDS])

    def _keywords(self, document: CorpusDocument) -> str:
        tokens = tokenize(document_text(document))
        counts = Counter(token for token in tokens if len(token) > 1 and not token.isdigit())
        tf_idf = {
            token: (1 + math.log(count))
            * math.log((1 + self._document_count) / (1 + self._document_frequencies[token]))
            for token, count in counts.items()
        }
        best = sorted(tf_idf, key=lambda token: (-tf_idf[token], token))[:_KEYWORDS]
        return " ".join(token for token in dict.fromkeys(tokens) if token in best)


def sentences(text: str) -> list[str]:
    """Split a text into sentences; a piece that is too short for one is joined to the next.

    Example:
        ```python
        >>> sentences("Dr. Faust sold his soul. Goethe wrote it down.")
        ['Dr. Faust sold his soul.', 'Goethe wrote it down.']
        ```
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    pieces: list[str] = []
    start = 0
    for end in [*ends, len(text)]:
        # A slice of the text, so that each sentence occurs in it word for word.
        piece = text[start:end].strip()
        if len(piece) >= _MIN_SENTENCE_CHARS or (piece and end == len(text)):
            pieces.append(piece)
            start = end
    return pieces or [""]


def without_copy(document: CorpusDocument, query: str) -> CorpusDocument | None:
    """Remove the first verbatim copy of a query from title and text; None if hardly anything is left.

    A reranker that learns what answers a query must not recognize it by its wording (the inverse cloze task: Lee et
    al., arXiv 1906.00300, section 4).

    Example:
        ```python
        >>> without_copy({"title": "Faust", "text": "Goethe wrote it in two parts. The devil wins."}, "The devil wins.")
        {'title': 'Faust', 'text': 'Goethe wrote it in two parts.'}
        ```
    """
    if not query.strip():
        return document
    copy = re.compile(rf"\s*{_WORD_START}{re.escape(query.strip())}{_WORD_END}\s*")
    fields = [name for name in ("title", "text") if copy.search(document[name])]
    rest = {**document, **{name: copy.sub(" ", document[name], count=1).strip() for name in fields}}
    return rest if not fields or len(tokenize(document_text(rest))) >= _MIN_TOKENS_LEFT else None
