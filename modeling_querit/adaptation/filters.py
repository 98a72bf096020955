"""Filters for generated queries: length, language, copying, duplicates, and the round trip through the first stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from ..pair_encoding_querit import document_text
from ..retrieval.bm25 import tokenize
from ..retrieval.sampling import Retriever
from .corpus import UNKNOWN_LANGUAGE, CorpusDocument, detect_language
from .extractive import without_copy

# Queries searched at once.
_BATCH_SIZE = 256
# Tokens below which a query's detected language is not trusted.
_MIN_LANGUAGE_TOKENS = 6


@dataclass(frozen=True)
class Query:
    """A generated query.

    Args:
        id: Id of the query.
        text: The query.
        document: Id of the document that it was written for.
        style: Style that was asked for, one of `prompts.STYLES`.
        language: ISO 639-1 code of the language that was asked for.
        generator: Name of the generator that wrote it.
    """

    id: str
    text: str
    document: str
    style: str
    language: str
    generator: str


@dataclass(frozen=True)
class QueryLimits:
    """Limits that a generated query has to keep.

    Args:
        min_tokens, max_tokens: Range of its length, in words; in pairs of characters for scripts without spaces.
        max_copied: Largest share of the query that may be one verbatim piece of the document, in (0, 1]: above it, the
            document is found by wording alone.
        may_copy: Names of generators whose queries are pieces of documents by design.
        same_language: Whether the query has to be in the language that was asked for.
        round_trip: Rank by which the first stage has to find the query's document; 0 for no round trip.

    Raises:
        ValueError: if a limit is out of its range.
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


def filter_queries(
    queries: Iterable[Query],
    documents: Mapping[str, CorpusDocument],
    limits: QueryLimits,
    first_stage: Retriever | None,
) -> Iterator[tuple[Query, str | None]]:
    """Check queries, and give for each the reason to drop it, or None.

    Args:
        queries: Queries in order; the first of several with the same tokens stays.
        documents: Documents by id.
        limits: Limits that queries have to keep.
        first_stage: First stage for the round trip; None for no round trip.

    Yields:
        (query, reason): `short`, `long`, `language`, `copied`, `whole document` (hardly anything of the document is
        left without the query), `duplicate`, `round-trip`, or None.
    """
    seen: set[tuple[str, ...]] = set()
    queries = iter(queries)
    while batch := list(islice(queries, _BATCH_SIZE)):
        reasons = [_violated_limit(query, documents[query.document], limits) for query in batch]
        within_limits = [query for query, reason in zip(batch, reasons, strict=True) if reason is None]
        lost = _failed_round_trips(within_limits, first_stage, limits.round_trip)
        for query, reason in zip(batch, reasons, strict=True):
            tokens = tuple(tokenize(query.text))
            if query.id in lost:
                reason = "round-trip"
            elif reason is None and tokens in seen:
                reason = "duplicate"
            if reason is None:
                seen.add(tokens)
            yield query, reason


def _failed_round_trips(queries: Sequence[Query], first_stage: Retriever | None, depth: int) -> set[str]:
    """Return the ids of the queries whose document is not among the first stage's best `depth`."""
    if first_stage is None or not depth or not queries:
        return set()
    rankings = first_stage.search([query.text for query in queries], depth)
    return {
        query.id
        for query, hits in zip(queries, rankings, strict=True)
        if query.document not in {document for document, _ in hits}
    }


def _violated_limit(query: Query, document: CorpusDocument, limits: QueryLimits) -> str | None:
    tokens = tokenize(query.text)
    if len(tokens) < limits.min_tokens:
        return "short"
    if len(tokens) > limits.max_tokens:
        return "long"
    if limits.same_language and not _is_in_language(query.text, query.language):
        return "language"
    if query.generator not in limits.may_copy and copied_share(tokens, document) > limits.max_copied:
        return "copied"
    return "whole document" if without_copy(document, query.text) is None else None


def _is_in_language(text: str, language: str) -> bool:
    detected = detect_language(text)
    # Detection errs on a few words: only a certain mismatch counts.
    return (
        UNKNOWN_LANGUAGE in (detected, language) or detected == language or len(tokenize(text)) < _MIN_LANGUAGE_TOKENS
    )


def copied_share(tokens: Sequence[str], document: CorpusDocument) -> float:
    """Return the share of a query's tokens in the longest span that the document contains verbatim, in [0, 1].

    Example:
        ```python
        >>> copied_share(["red", "fox", "eats"], {"title": "", "text": "The red fox sleeps."})
        0.666...
        ```
    """
    positions: dict[str, list[int]] = {}
    for position, token in enumerate(tokenize(document_text(document))):
        positions.setdefault(token, []).append(position)
    longest = 0
    # Position in the document -> length of the common piece that ends there and at the query's current token.
    lengths: dict[int, int] = {}
    for token in tokens:
        lengths = {position: lengths.get(position - 1, 0) + 1 for position in positions.get(token, ())}
        longest = max(longest, *lengths.values(), 0)
    return longest / len(tokens) if tokens else 0.0
