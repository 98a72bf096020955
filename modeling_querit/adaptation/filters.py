"""Which of the written queries are kept, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..retrieval.bm25 import tokenize
from ..training.mining import Retriever
from .corpus import UNKNOWN_LANGUAGE, Document, language_of
from .extractive import without_copy

# Queries looked up at once.
_LOOKED_UP = 256


@dataclass(frozen=True)
class Query:
    """A written query.

    Args:
        id: Its own.
        text: The query.
        document: Id of the document it was written for.
        style, language, generator: As which, in which language, and by what.
    """

    id: str
    text: str
    document: str
    style: str
    language: str
    generator: str


@dataclass(frozen=True)
class Limits:
    """What a query has to be like.

    Args:
        min_tokens, max_tokens: Words; pairs of characters where a script has no spaces.
        max_copied: Share of the query that may be one uninterrupted piece of the document: above it, a query is found
            by its wording.
        may_copy: Generators whose queries are pieces of documents by design.
        same_language: Whether a query has to be in the language that was asked for.
        round_trip: The document that a query was written for has to be among the first so many; 0: it need not.
    """

    min_tokens: int = 2
    max_tokens: int = 48
    max_copied: float = 0.8
    may_copy: tuple[str, ...] = ()
    same_language: bool = True
    round_trip: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}: 0 < min <= max.")
        if not 0 < self.max_copied <= 1:
            raise ValueError(f"max_copied is {self.max_copied}: it has to be in (0, 1].")


def judged(
    queries: Iterable[Query], documents: Mapping[str, Document], limits: Limits, first_stage: Retriever | None
) -> Iterator[tuple[Query, str | None]]:
    """Each query with the reason to drop it, or None.

    Reasons: `short`, `long`, `language`, `copied`, `whole` (all that its document says), `duplicate`, `round-trip`.

    Args:
        queries: In order; of two that say the same the first stays.
        documents: By id.
        limits: What queries have to be like.
        first_stage: For the round trip.
    """
    seen: set[tuple[str, ...]] = set()
    alone = ((query, _fault(query, documents[query.document], limits)) for query in queries)
    for some in _chunks(alone):
        kept = [query for query, reason in some if reason is None]
        lost = _lost(kept, first_stage, limits.round_trip) if first_stage and limits.round_trip and kept else set()
        for query, reason in some:
            tokens = tuple(tokenize(query.text))
            if query.id in lost:
                reason = "round-trip"
            elif reason is None and tokens in seen:
                reason = "duplicate"
            if reason is None:
                seen.add(tokens)
            yield query, reason


def _lost(queries: Sequence[Query], first_stage: Retriever, depth: int) -> set[str]:
    """Ids of queries whose document is not found."""
    found = first_stage.search([query.text for query in queries], depth)
    return {
        query.id
        for query, hits in zip(queries, found, strict=True)
        if query.document not in {document for document, _ in hits}
    }


def _fault(query: Query, document: Document, limits: Limits) -> str | None:
    tokens = tokenize(query.text)
    if len(tokens) < limits.min_tokens:
        return "short"
    if len(tokens) > limits.max_tokens:
        return "long"
    if limits.same_language and not _is_in(query.text, query.language):
        return "language"
    if query.generator not in limits.may_copy and copied_share(tokens, document) > limits.max_copied:
        return "copied"
    return "whole" if without_copy(document, query.text) is None else None


def _is_in(text: str, language: str) -> bool:
    found = language_of(text)
    # A few words are hard to tell: only what is surely something else counts.
    return UNKNOWN_LANGUAGE in (found, language) or found == language or len(tokenize(text)) < 6


def copied_share(tokens: Sequence[str], document: Document) -> float:
    """Share of a query's tokens in its longest piece that the document has word for word, in [0, 1].

    Example:
        ```python
        >>> copied_share(["red", "fox", "eats"], {"title": "", "text": "The red fox sleeps."})
        0.666...
        ```
    """
    words = tokenize(f"{document['title']} {document['text']}")
    places: dict[str, list[int]] = {}
    for place, word in enumerate(words):
        places.setdefault(word, []).append(place)
    longest = 0
    # Ends of common pieces in the document, with their lengths.
    ends: dict[int, int] = {}
    for token in tokens:
        ends = {place: ends.get(place - 1, 0) + 1 for place in places.get(token, ())}
        longest = max(longest, *ends.values(), 0)
    return longest / len(tokens) if tokens else 0.0


def _chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == _LOOKED_UP:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
