"""Stage 2: queries for a sample of documents, written, kept on disk as they come, and filtered."""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .corpus import Document
from .filters import Query
from .generators import Generator
from .prompts import STYLES, Request
from .shards import Shards, key_of

logger = logging.getLogger(__name__)

# Real queries shown with a request.
_EXAMPLES = 4


def requests_for(
    documents: Sequence[Document],
    styles: Mapping[str, float],
    per_document: int,
    languages: Sequence[str] = (),
    examples: Sequence[str] = (),
    seed: int = 0,
) -> list[Request]:
    """What is to be written: `per_document` queries of different styles for each document, drawn by weight.

    Args:
        documents: With a `language` each.
        styles: Weights of the styles.
        per_document: How many; no more than there are styles.
        languages: Languages of the queries, drawn evenly; by default that of the document.
        examples: Real queries of the target, without labels; a few are shown with each request.
        seed: Of the draws, which depend on the document's id and nothing else.
    """
    check_styles(styles, per_document)
    found = []
    for document in documents:
        rng = random.Random(f"{seed}/{document['_id']}")
        language = rng.choice(sorted(languages)) if languages else document["language"]
        for style in _drawn(styles, per_document, rng):
            shown = tuple(rng.sample(list(examples), min(_EXAMPLES, len(examples))))
            found.append(Request(document, style, language, shown))
    return found


def check_styles(styles: Mapping[str, float], per_document: int) -> None:
    """Whether so many styles can be drawn.

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
        raise ValueError(f"per_document is {per_document}, with {len(styles)} styles: a style is written once.")


def _drawn(weights: Mapping[str, float], count: int, rng: random.Random) -> list[str]:
    """Different styles, by weight (Efraimidis and Spirakis, 2006)."""
    return sorted(sorted(weights), key=lambda style: rng.expovariate(weights[style]))[:count]


def write_queries(
    requests: Sequence[Request],
    generators: Mapping[str, Generator],
    kept: Shards,
    dropped: Counter[str],
    fallback: tuple[str, Generator] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[Query]:
    """A query for each request, by one generator after the other; what was written before is not written again.

    Args:
        requests: What is to be written.
        generators: By name. Each request goes to one of them, by its place.
        kept: Where queries are kept from run to run.
        dropped: Counts requests whose answer was none.
        fallback: Name of a generator, and the generator, for requests that the others had no answer to.
        advance: Told how many requests are done.
    """
    unanswered: list[Request] = []
    for place, (name, generator) in enumerate(generators.items()):
        some = requests[place :: len(generators)]
        if hasattr(generator, "endpoint") and any(_key(generator, request) in kept for request in some):
            generator.endpoint.known_to_answer()
        for start in range(0, len(some), generator.batch_size):
            batch = some[start : start + generator.batch_size]
            keys = [_key(generator, request) for request in batch]
            asked = {key: request for key, request in zip(keys, batch, strict=True) if key not in kept}
            if asked:
                written = generator.generate(list(asked.values()))
                kept.add({key: text for key, text in zip(asked, written, strict=True) if text is not None})
            for key, request in zip(keys, batch, strict=True):
                if kept.get(key):
                    yield _query(kept[key], request, name)
                else:
                    unanswered.append(request)
            advance(len(batch))
    if unanswered and fallback is None:
        dropped["not written"] += len(unanswered)
    elif unanswered:
        names = ", ".join(generators)
        logger.warning(
            "%s had no answer to %d of %d requests: %s writes these.",
            names,
            len(unanswered),
            len(requests),
            fallback[0],
        )
        yield from write_queries(unanswered, dict([fallback]), kept, dropped)


def _key(generator: Generator, request: Request) -> bytes:
    document = request.document
    parts: list[Any] = [document["_id"], document["title"], document["text"], request.style, request.language]
    return key_of(generator.identity, *parts, request.examples)


def _query(text: str, request: Request, generator: str) -> Query:
    document = request.document["_id"]
    digest = hashlib.sha256("\n".join([document, request.style, generator, text]).encode("utf-8", "surrogatepass"))
    return Query(f"q{digest.hexdigest()[:16]}", text, document, request.style, request.language, generator)
