"""Stage 1: documents read, cleaned, told by language, without near-duplicates, and a sample that covers them."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import random
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ..retrieval.bm25 import tokenize

logger = logging.getLogger(__name__)

Document = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)

UNKNOWN_LANGUAGE = "und"
# Letters by which a language is told; fewer than the lower number say nothing.
_LETTERS_TO_TELL = 20
_CHARS_TO_TELL = 2000
# Probability a language has to have; short texts in English are taken for any of a hundred others.
_SURE = 0.5
# Of a text: the share of control characters from which on it is no text.
_JUNK = 0.02
# Thai, Lao, Japanese, Chinese, Korean.
_DENSE = re.compile("[\u0e00-\u0eff\u3040-\u9fff\uac00-\ud7af]")
# Near-duplicates: tokens of a shingle, and hash functions.
_SHINGLE, _PERMUTATIONS = 3, 64
# Documents of a cluster on average, clusters at most, and dimensions they are found in.
_CLUSTER_SIZE, _MAX_CLUSTERS, _DIMENSIONS = 100, 100, 64


def read_documents(sources: Sequence[str], dropped: Counter[str]) -> Iterator[Document]:
    """Documents of folders in the BEIR layout, `.jsonl` files (also `.gz`) or datasets on the Hub, `NAME:SPLIT`.

    Judgements, where a folder has some, are not looked at.

    Args:
        sources: Where they are. An id that two of them have counts as given twice.
        dropped: Counts, by reason, what is no document: lines that are not UTF-8 or no JSON, objects without text,
            empty texts, and such that are no text but binary data.

    Yields:
        `{"_id", "title", "text"}`; ids that are not given are `#` and a number, and a space in them is `%20`.

    Raises:
        FileNotFoundError: if there is no such source.
    """
    seen: set[str] = set()
    rows = (row for source in sources for row in _rows_of(source))
    for number, row in enumerate(rows):
        if isinstance(row, str):
            dropped[row] += 1
            continue
        document, reason = _clean(row, number)
        if reason is None and document["_id"] in seen:
            reason = "id given twice"
        if reason is not None:
            dropped[reason] += 1
            continue
        seen.add(document["_id"])
        yield document


def _rows_of(source: str) -> Iterator[Any]:
    """Parsed rows, or, as a string, why there is none."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = [path / name for name in ("corpus.jsonl", "corpus.jsonl.gz") if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"{path} has no corpus.jsonl or corpus.jsonl.gz: a folder is in the BEIR layout.")
        path = found[0]
    if path.exists():
        yield from _lines(path)
    elif source.endswith((".jsonl", ".jsonl.gz", ".json")) or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no {source}.")
    else:
        from datasets import load_dataset

        name, _, split = source.partition(":")
        yield from load_dataset(name, split=split or "train", streaming=True)


def _lines(path: Path) -> Iterator[Any]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for line in _whole(lines, path):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
                yield "no text" if isinstance(row, str) else row
            except UnicodeDecodeError:
                yield "not UTF-8"
            except (ValueError, RecursionError):
                yield "no JSON"


def _whole(lines: Iterable[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is cut off, or no gzip file: {error}") from None


def _clean(row: Any, number: int) -> tuple[Document, str | None]:
    """A document, and why it is none."""
    if not isinstance(row, Mapping) or not isinstance(row.get("text"), str):
        return {}, "no text"
    title = row.get("title") or ""
    if not isinstance(title, str):
        return {}, "title is no text"
    # Runs are files whose fields are divided by white space.
    given = (tidy(str(row[name])).replace(" ", "%20") for name in ("_id", "id", "docid") if row.get(name) is not None)
    document = {"_id": next(filter(None, given), f"#{number}"), "title": tidy(title), "text": tidy(row["text"])}
    if not any(map(str.isalnum, document["text"])):
        return document, "empty"
    raw = row["text"]
    junk = sum(unicodedata.category(char) in ("Cc", "Cs", "Co", "Cn") and not char.isspace() for char in raw)
    junk += raw.count("\N{REPLACEMENT CHARACTER}")
    return document, "binary" if junk > _JUNK * len(raw) else None


def tidy(text: str) -> str:
    """A text without control characters and lone surrogates, its white space single."""
    kept = (char if char.isspace() or unicodedata.category(char) not in ("Cc", "Cs") else " " for char in text)
    return " ".join("".join(kept).split())


def cut(document: Document, max_chars: int) -> Document:
    """The document with no more than its first `max_chars` characters of text, which end with a word."""
    text = document["text"]
    if len(text) <= max_chars:
        return document
    head = text[: max_chars + 1] if text[max_chars].isspace() else text[:max_chars]
    # Scripts without spaces are cut where they are.
    return document | {"text": head[: head.rfind(" ")] if " " in head[max_chars // 2 :] else head}


def cut_all(documents: Iterable[Document], max_chars: int, counts: Counter[str]) -> Iterator[Document]:
    """Documents with no more than `max_chars` characters of text; those that had more are counted as `cut`."""
    for document in documents:
        counts["cut"] += len(document["text"]) > max_chars
        yield cut(document, max_chars)


def language_of(text: str) -> str:
    """ISO 639-1 code of a text's language, by py3langid; `und` if it cannot be told, as of many a title.

    Example:
        ```python
        >>> language_of("Wie entferne ich ein Paket samt seiner Konfiguration?")
        'de'
        ```
    """
    head = text[:_CHARS_TO_TELL]
    letters = sum(map(str.isalpha, head))
    # One character of these scripts says as much as several of an alphabet.
    if letters + 3 * len(_DENSE.findall(head)) < _LETTERS_TO_TELL:
        return UNKNOWN_LANGUAGE
    return _identifier().classify(head)[0]


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=_SURE)


def with_languages(documents: Iterable[Document], wanted: Sequence[str], dropped: Counter[str]) -> Iterator[Document]:
    """Documents with a `language` each; those in other languages than `wanted`, if there are any, are dropped."""
    for document in documents:
        language = language_of(document["text"])
        if wanted and language not in wanted:
            dropped["language"] += 1
        else:
            yield document | {"language": language}


def drop_near_duplicates(
    documents: Iterable[Document], dropped: Counter[str], similarity: float = 0.9
) -> Iterator[Document]:
    """Documents that are unlike all before them: by MinHash over shingles of three tokens, with `datasketch`.

    Args:
        documents: In order; of two that are alike the first stays.
        dropped: Counts the others.
        similarity: Estimated Jaccard similarity of shingles from which on documents are alike, in (0, 1].
    """
    from datasketch import MinHash, MinHashLSH

    # It finds candidates only: better too many than too few. For thresholds closer to 1 it has no bands.
    index = MinHashLSH(threshold=min(similarity, 0.99), num_perm=_PERMUTATIONS, weights=(0.05, 0.95))
    sketches: dict[str, Any] = {}
    exact: set[bytes] = set()
    for document in documents:
        tokens = tokenize(f"{document['title']} {document['text']}")
        digest = hashlib.sha256(" ".join(tokens).encode()).digest()
        if digest in exact:
            dropped["duplicate"] += 1
            continue
        sketch = MinHash(num_perm=_PERMUTATIONS)
        starts = range(max(1, len(tokens) - _SHINGLE + 1))
        sketch.update_batch({" ".join(tokens[start : start + _SHINGLE]).encode() for start in starts})
        if any(sketch.jaccard(sketches[other]) >= similarity for other in index.query(sketch)):
            dropped["near-duplicate"] += 1
            continue
        exact.add(digest)
        index.insert(document["_id"], sketch)
        sketches[document["_id"]] = sketch
        yield document


def sample(documents: Sequence[Document], size: int, seed: int) -> list[Document]:
    """Documents that stand for all of them: its share from each language and each cluster.

    Clusters are found by k-means on TF-IDF vectors of tokens, reduced by SVD (scikit-learn).

    Args:
        documents: With a `language` each.
        size: How many; all, if there are no more.
        seed: Of clusters and draws.
    """
    if size >= len(documents):
        return list(documents)
    strata: dict[tuple[str, int], list[int]] = defaultdict(list)
    for place, cluster in enumerate(_clusters(documents, seed)):
        strata[documents[place]["language"], cluster].append(place)
    rng = random.Random(f"{seed}/sample")
    counts = shares({key: len(places) for key, places in sorted(strata.items())}, size)
    chosen = [place for key, count in counts.items() for place in rng.sample(strata[key], count)]
    return [documents[place] for place in sorted(chosen)]


def shares(sizes: Mapping[Key, int], total: int) -> dict[Key, int]:
    """How many of `total` each group gets, in proportion to its size, none nothing as long as there is enough for all.

    Example:
        ```python
        >>> shares({"en": 90, "de": 9, "fi": 1}, 10)
        {'en': 8, 'de': 1, 'fi': 1}
        ```
    """
    everything = sum(sizes.values())
    total = min(total, everything)
    least = 1 if total >= len(sizes) else 0
    exact = {key: total * size / everything for key, size in sizes.items()}
    counts = {key: min(sizes[key], max(least, int(share))) for key, share in exact.items()}
    while (missing := total - sum(counts.values())) != 0:
        step = 1 if missing > 0 else -1
        movable = [key for key in counts if (counts[key] < sizes[key] if step > 0 else counts[key] > least)]
        furthest = max(movable, key=lambda key: step * (exact[key] - counts[key]))
        counts[furthest] += step
    return counts


def _clusters(documents: Sequence[Document], seed: int) -> list[int]:
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    count = min(_MAX_CLUSTERS, len(documents) // _CLUSTER_SIZE)
    if count < 2:
        return [0] * len(documents)
    analyzer: Callable[[str], list[str]] = lambda text: tokenize(text[:_CHARS_TO_TELL])  # noqa: E731
    vectors = TfidfVectorizer(analyzer=analyzer, max_features=50_000, sublinear_tf=True).fit_transform(
        f"{each['title']} {each['text']}" for each in documents
    )
    if vectors.shape[1] > _DIMENSIONS:
        vectors = TruncatedSVD(_DIMENSIONS, random_state=seed).fit_transform(vectors)
    return MiniBatchKMeans(count, random_state=seed, n_init=3).fit_predict(vectors).tolist()
