"""Queries taken from the documents themselves: no language model is needed, and so they are never far away."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from ..retrieval.bm25 import tokenize
from .corpus import Document
from .prompts import Request

# Ends of sentences in Latin, Arabic, Indic and East Asian scripts.
_SENTENCE = re.compile(r"(?<=[.!?؟।])\s+|(?<=[。！？])")
_WORDS = re.compile(r"\S+")
_KEYWORDS = 5
# Words of a span, which is a part of a sentence.
_SPAN = 12
_MIN_CHARS = 12
# Tokens without which a document says nothing.
_LEAST_LEFT = 5
# Thai, Lao, Burmese, Khmer, Japanese and Chinese: a word may follow another without a space.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
# Not within a word.
_START, _END = rf"(?<![^\W{_UNSPACED}])", rf"(?![^\W{_UNSPACED}])"


class ExtractiveGenerator:
    """Queries that are a part of the document, or made of its words.

    - `title`: the title; documents without one give their first sentence.
    - `question`: the first sentence, which tends to say what a document is about.
    - `claim`: a sentence drawn at random (inverse cloze).
    - `keywords`: the words that set the document off from the others, by tf-idf, in the order of the text.

    Args:
        documents: The collection, which says how rare words are.
        seed: Of the draws, which depend on the document and on nothing else.
    """

    batch_size = 4096

    def __init__(self, documents: Sequence[Document], seed: int = 0):
        frequencies: Counter[str] = Counter()
        for document in documents:
            frequencies.update(set(tokenize(_whole(document))))
        self._frequencies, self._count, self._seed = frequencies, len(documents), seed
        digest = hashlib.sha256("\n".join(sorted(_whole(each) for each in documents)).encode("utf-8", "surrogatepass"))
        self.identity = ["extractive", digest.hexdigest(), seed]
        self._makers: Mapping[str, Callable[[Document], str]] = {
            "title": lambda document: document["title"] or sentences(document["text"])[0],
            "question": lambda document: sentences(document["text"])[0],
            "claim": self._drawn,
            "keywords": self._keywords,
        }

    def generate(self, requests: Sequence[Request]) -> list[str]:
        """A query for each request."""
        return [self._makers[request.style](request.document) for request in requests]

    def _drawn(self, document: Document) -> str:
        rng = random.Random(f"{self._seed}/claim/{document['_id']}")
        found = sentences(document["text"])
        # The first one is taken by another style.
        words = _WORDS.findall(rng.choice(found[1:] or found))
        start = rng.randrange(max(1, len(words) - _SPAN + 1))
        return " ".join(words[start : start + _SPAN])

    def _keywords(self, document: Document) -> str:
        tokens = tokenize(_whole(document))
        counts = Counter(token for token in tokens if len(token) > 1 and not token.isdigit())
        weight = {
            token: (1 + math.log(count)) * math.log((1 + self._count) / (1 + self._frequencies[token]))
            for token, count in counts.items()
        }
        best = sorted(weight, key=lambda token: (-weight[token], token))[:_KEYWORDS]
        return " ".join(token for token in dict.fromkeys(tokens) if token in best)


def sentences(text: str) -> list[str]:
    """Sentences of a text; what is too short to be one belongs to the next.

    Example:
        ```python
        >>> sentences("Dr. Faust sold his soul. Goethe wrote it down.")
        ['Dr. Faust sold his soul.', 'Goethe wrote it down.']
        ```
    """
    ends = [match.end() for match in _SENTENCE.finditer(text)]
    found: list[str] = []
    start = 0
    for end in [*ends, len(text)]:
        # As it stands in the text, whatever is between its parts.
        part = text[start:end].strip()
        if len(part) >= _MIN_CHARS or (part and end == len(text)):
            found.append(part)
            start = end
    return found or [""]


def without_copy(document: Document, query: str) -> Document | None:
    """The document less the query, where title and text first have it word for word; None, if hardly anything is left.

    A reader that is to learn what answers a query must not find it by its wording (the inverse cloze task: Lee et al.,
    arXiv 1906.00300, section 4).

    Example:
        ```python
        >>> without_copy({"title": "Faust", "text": "Goethe wrote it in two parts. The devil wins."}, "The devil wins.")
        {'title': 'Faust', 'text': 'Goethe wrote it in two parts.'}
        ```
    """
    if not query.strip():
        return document
    copied = re.compile(rf"\s*{_START}{re.escape(query.strip())}{_END}\s*")
    fields = [name for name in ("title", "text") if copied.search(document[name])]
    left = {**document, **{name: copied.sub(" ", document[name], count=1).strip() for name in fields}}
    return left if not fields or len(tokenize(_whole(left))) >= _LEAST_LEFT else None


def _whole(document: Document) -> str:
    return f"{document['title']} {document['text']}"
