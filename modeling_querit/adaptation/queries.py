"""Stage 2: request queries for a sample of documents, and have generators write them, cached as they come."""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from ..cache import DiskCache, key_of
from .corpus import CorpusDocument
from .filters import Query
from .generators import Generator
from .prompts import STYLES, QueryRequest

logger = logging.getLogger(__name__)

# Real queries shown with a request.
_EXAMPLES_PER_REQUEST = 4


def make_requests(
    documents: Sequence[CorpusDocument],
    styles: Mapping[str, float],
    per_document: int,
    languages: Sequence[str] = (),
    examples: Sequence[str] = (),
    seed: int = 0,
) -> list[QueryRequest]:
    """Draw what queries to write: `per_document` different styles for each document, by weight.

    Args:
        documents: Documents with a `language`.
        styles: Style -> weight, above 0.
        per_document: Number of queries for each document, at most the number of styles.
        languages: Languages of the queries, drawn evenly; by default the language of the document.
        examples: Real queries of the target collection, without labels; four are shown with each request.
        seed: Seed of the draws; a draw depends on the seed and the document's id alone.

    Raises:
        ValueError: if styles, weights or `per_document` are invalid.
    """
    check_styles(styles, per_document)
    requests = []
    for document in documents:
        rng = random.Random(f"{seed}/{document['_id']}")
        language = rng.choice(sorted(languages)) if languages else document["language"]
        for style in _draw_styles(styles, per_document, rng):
            shown = tuple(rng.sample(list(examples), min(_EXAMPLES_PER_REQUEST, len(examples))))
            requests.append(QueryRequest(document, style, language, shown))
    return requests


def check_styles(styles: Mapping[str, float], per_document: int) -> None:
    """Check that `per_document` different styles can be drawn.

    Raises:
        ValueError: if a style is unknown, a weight is not above 0, or there are fewer styles.
    """
    unknown = [style for style in styles if style not in STYLES]
    if unknown:
        raise ValueError(f"style {unknown[0]!r} is unknown: choose from {', '.join(STYLES)}.")
    for style, weight in styles.items():
        if not weight > 0:
            raise ValueError(f"the weight of style {style!r} is {weight}: it has to be above 0.")
    if not 0 < per_document <= len(styles):
        raise ValueError(
            f"per_document is {per_document}, with {len(styles)} styles: a document has at most one query per style."
        )


def _draw_styles(weights: Mapping[str, float], count: int, rng: random.Random) -> list[str]:
    """Draw styles by weight, without replacement (Efraimidis and Spirakis, 2006)."""
    return sorted(sorted(weights), key=lambda style: rng.expovariate(weights[style]))[:count]


def write_queries(
    requests: Sequence[QueryRequest],
    generators: Mapping[str, Generator],
    cache: DiskCache[str],
    dropped: Counter[str],
    fallback: tuple[str, Generator] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[Query]:
    """Write a query for each request, unless it is in the cache.

    Args:
        requests: Requests, dealt out to the generators in turn.
        generators: Generators by name.
        cache: Cache of texts, under the generator's identity and the request.
        dropped: Counter of the requests without a query, as `not written`.
        fallback: Name and generator for the requests that the others did not answer.
        advance: Function called with the number of requests that a batch has dealt with.
    """
    unanswered: list[QueryRequest] = []
    for index, (name, generator) in enumerate(generators.items()):
        share = requests[index :: len(generators)]
        if hasattr(generator, "endpoint") and any(_cache_key(generator, request) in cache for request in share):
            generator.endpoint.mark_as_working()
        for start in range(0, len(share), generator.batch_size):
            batch = share[start : start + generator.batch_size]
            keys = [_cache_key(generator, request) for request in batch]
            missing = {key: request for key, request in zip(keys, batch, strict=True) if key not in cache}
            if missing:
                texts = generator.generate(list(missing.values()))
                cache.add({key: text for key, text in zip(missing, texts, strict=True) if text is not None})
            for key, request in zip(keys, batch, strict=True):
                if text := cache.get(key):
                    yield _make_query(text, request, name)
                else:
                    unanswered.append(request)
            advance(len(batch))
    if not unanswered:
        return
    if fallback is None:
        dropped["not written"] += len(unanswered)
    else:
        logger.warning(
            "%s did not answer %d of %d requests; %s writes these.",
            ", ".join(generators),
            len(unanswered),
            len(requests),
            fallback[0],
        )
        yield from write_queries(unanswered, dict([fallback]), cache, dropped)


def _cache_key(generator: Generator, request: QueryRequest) -> bytes:
    document = request.document
    parts = (document["_id"], document["title"], document["text"], request.style, request.language, request.examples)
    return key_of(generator.identity, *parts)


def _make_query(text: str, request: QueryRequest, generator: str) -> Query:
    document = request.document["_id"]
    digest = hashlib.sha256("\n".join([document, request.style, generator, text]).encode("utf-8", "surrogatepass"))
    return Query(f"q{digest.hexdigest()[:16]}", text, document, request.style, request.language, generator)
