"""Stage 1: read documents, clean them, detect languages, drop near-duplicates, and draw a sample for queries."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..files import read_jsonl
from ..pair_encoding_querit import document_text
from ..retrieval.bm25 import tokenize
from ..retrieval.collection import Source

if TYPE_CHECKING:
    from datasketch import MinHash
    from py3langid.langid import LanguageIdentifier

# A document of a collection: `_id`, `title`, `text`, and, once stage 1 has detected it, `language`.
CorpusDocument = dict[str, str]
# JSON values that decide what a model, an index or a generator returns; its cached results are stored under them.
CacheIdentity = Sequence[Any]
Key = TypeVar("Key", bound=Hashable)

UNKNOWN_LANGUAGE = "und"
# Characters of a text that language detection and clustering read.
_HEAD_CHARS = 2000
# Letters below which detection does not try.
_MIN_DETECTION_LETTERS = 20
# Probability below which a language counts as unknown: short English texts look like any of a hundred others.
_MIN_PROBABILITY = 0.5
# Thai, Lao, Japanese, Chinese, Korean: scripts with few characters a word.
_DENSE_SCRIPTS = re.compile("[\u0e00-\u0eff\u3040-\u9fff\uac00-\ud7af]")
# Share of control characters above which a text counts as binary data.
_MAX_CONTROL_SHARE = 0.02
_SHINGLE_TOKENS, _MINHASH_PERMUTATIONS = 3, 64
_MEAN_CLUSTER_SIZE, _MAX_CLUSTERS, _SVD_DIMENSIONS = 100, 100, 64


def read_corpus(sources: Sequence[str], dropped: Counter[str]) -> Iterator[CorpusDocument]:
    """Read documents of folders in the BEIR layout, `.jsonl` files (also `.gz`), or Hub datasets (`NAME:SPLIT`).

    Relevance judgements, where a folder has them, are not read.

    Args:
        sources: Folders, files and datasets. An id that occurs in two of them is a duplicate.
        dropped: Counter of the rows that are not documents, by reason: not UTF-8, not JSON, no text, title is not a
            string, empty, binary, duplicate id.

    Yields:
        `{"_id", "title", "text"}`. A document without an id gets `#` and its row number; spaces in ids become `%20`.

    Raises:
        FileNotFoundError: if a source does not exist.
        ValueError: if a `.gz` file is damaged.
    """
    # Rows of all sources are numbered together, so that ids made from the numbers do not collide.
    numbers = itertools.count()

    def drop_line(error: ValueError, line: bytes) -> None:
        dropped["not JSON" if _is_utf8(line) else "not UTF-8"] += 1
        next(numbers)

    seen: set[str] = set()
    for row in (row for source in sources for row in _rows(source, drop_line)):
        document, reason = _clean(row, next(numbers))
        if reason is None and document["_id"] in seen:
            reason = "duplicate id"
        if reason is not None:
            dropped[reason] += 1
            continue
        seen.add(document["_id"])
        yield document


def source_files(source: str) -> list[Path]:
    """List the files that `read_corpus` reads for a source; none for a dataset on the Hub.

    Args:
        source: Folder in the BEIR layout, file, or dataset (`NAME:SPLIT`). If a dataset is a local folder, all of
            its files count.
    """
    path, dataset = Path(source).expanduser(), Source.parse(source, "train").folder
    if path.is_dir() and (corpus_files := sorted(path.glob("corpus.jsonl*"))):
        return corpus_files
    if dataset.is_dir():
        return sorted(file for file in dataset.rglob("*") if file.is_file())
    return [path] if path.is_file() else []


def _rows(source: str, on_error: Callable[[ValueError, bytes], None]) -> Iterator[Any]:
    """Yield parsed rows; `on_error` gets the lines that are not JSON in UTF-8."""
    path = Path(source).expanduser()
    if path.is_dir():
        candidates = [path / name for name in ("corpus.jsonl", "corpus.jsonl.gz") if (path / name).exists()]
        if not candidates:
            raise FileNotFoundError(f"{path} has no corpus.jsonl or corpus.jsonl.gz: a folder is in the BEIR layout.")
        path = candidates[0]
    if path.exists():
        for _, row in read_jsonl(path, on_error):
            yield row
    elif source.endswith((".jsonl", ".jsonl.gz", ".json")) or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"No such file or folder: {source}.")
    else:
        from datasets import load_dataset

        dataset = Source.parse(source, "train")
        yield from load_dataset(str(dataset.folder), split=dataset.split, streaming=True)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _clean(row: Any, number: int) -> tuple[CorpusDocument, str | None]:
    """Clean a row: return a document, and the reason to drop it, if there is one."""
    if not isinstance(row, Mapping) or not isinstance(row.get("text"), str):
        return {}, "no text"
    title = row.get("title") or ""
    if not isinstance(title, str):
        return {}, "title is not a string"
    # The fields of a TREC run are separated by white space.
    ids = (tidy(str(row[name])).replace(" ", "%20") for name in ("_id", "id", "docid") if row.get(name) is not None)
    document = {"_id": next(filter(None, ids), f"#{number}"), "title": tidy(title), "text": tidy(row["text"])}
    if not any(map(str.isalnum, document["text"])):
        return document, "empty"
    text = row["text"]
    bad = sum(unicodedata.category(char) in ("Cc", "Cs", "Co", "Cn") and not char.isspace() for char in text)
    bad += text.count("\N{REPLACEMENT CHARACTER}")
    return document, "binary" if bad > _MAX_CONTROL_SHARE * len(text) else None


def tidy(text: str) -> str:
    """Remove control characters and lone surrogates, and collapse white space."""
    chars = (char if char.isspace() or unicodedata.category(char) not in ("Cc", "Cs") else " " for char in text)
    return " ".join("".join(chars).split())


def truncate(document: CorpusDocument, max_chars: int) -> CorpusDocument:
    """Truncate the text of a document to `max_chars` characters, at the end of a word where the script has spaces."""
    text = document["text"]
    if len(text) <= max_chars:
        return document
    head = text[: max_chars + 1] if text[max_chars].isspace() else text[:max_chars]
    # A space only in the first half means a script without spaces, in which any place will do.
    return document | {"text": head[: head.rfind(" ")] if " " in head[max_chars // 2 :] else head}


def truncate_all(documents: Iterable[CorpusDocument], max_chars: int, counts: Counter[str]) -> Iterator[CorpusDocument]:
    """Truncate documents to `max_chars` characters of text; `counts["truncated"]` counts the longer ones."""
    for document in documents:
        counts["truncated"] += len(document["text"]) > max_chars
        yield truncate(document, max_chars)


def detect_language(text: str) -> str:
    """Detect a text's language, as ISO 639-1 code, by py3langid; `und` if it is too short or the result too uncertain.

    Example:
        ```python
        >>> detect_language("Wie entferne ich ein Paket samt seiner Konfiguration?")
        'de'
        ```
    """
    head = text[:_HEAD_CHARS]
    letters = sum(map(str.isalpha, head))
    # A character of these scripts carries as much information as several letters of an alphabet.
    if letters + 3 * len(_DENSE_SCRIPTS.findall(head)) < _MIN_DETECTION_LETTERS:
        return UNKNOWN_LANGUAGE
    return _language_identifier().classify(head)[0]


@cache
def _language_identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=_MIN_PROBABILITY)


def add_languages(
    documents: Iterable[CorpusDocument], languages: Sequence[str], dropped: Counter[str]
) -> Iterator[CorpusDocument]:
    """Add `language` to documents, and drop those in a language that is not among `languages`, unless that is empty."""
    for document in documents:
        language = detect_language(document["text"])
        if languages and language not in languages:
            dropped["language"] += 1
        else:
            yield document | {"language": language}


def drop_near_duplicates(
    documents: Iterable[CorpusDocument], dropped: Counter[str], similarity: float = 0.9
) -> Iterator[CorpusDocument]:
    """Drop near-duplicates of earlier documents, by MinHash over shingles of three tokens (`datasketch`).

    Args:
        documents: Documents in order; the first of several near-duplicates stays.
        dropped: Counter of the others, as `duplicate` (same tokens) or `near-duplicate`.
        similarity: Estimated Jaccard similarity of two documents' shingles from which on they are near-duplicates, in
            (0, 1].
    """
    from datasketch import MinHash, MinHashLSH

    # The index only proposes candidates, so recall matters more than precision. It has no bands for thresholds near 1.
    index = MinHashLSH(threshold=min(similarity, 0.99), num_perm=_MINHASH_PERMUTATIONS, weights=(0.05, 0.95))
    sketches: dict[str, MinHash] = {}
    digests: set[bytes] = set()
    for document in documents:
        tokens = tokenize(document_text(document))
        digest = hashlib.sha256(" ".join(tokens).encode()).digest()
        if digest in digests:
            dropped["duplicate"] += 1
            continue
        sketch = MinHash(num_perm=_MINHASH_PERMUTATIONS)
        starts = range(max(1, len(tokens) - _SHINGLE_TOKENS + 1))
        sketch.update_batch({" ".join(tokens[start : start + _SHINGLE_TOKENS]).encode() for start in starts})
        if any(sketch.jaccard(sketches[other]) >= similarity for other in index.query(sketch)):
            dropped["near-duplicate"] += 1
            continue
        digests.add(digest)
        index.insert(document["_id"], sketch)
        sketches[document["_id"]] = sketch
        yield document


def sample(documents: Sequence[CorpusDocument], size: int, seed: int) -> list[CorpusDocument]:
    """Draw a sample stratified by language and by cluster, in the order of `documents`.

    Clusters come from k-means on TF-IDF vectors of tokens, reduced by SVD (scikit-learn).

    Args:
        documents: Documents with a `language`.
        size: Number of documents to draw; all, if there are no more.
        seed: Seed of clusters and draws.
    """
    if size >= len(documents):
        return list(documents)
    strata: dict[tuple[str, int], list[int]] = defaultdict(list)
    for index, cluster in enumerate(_clusters(documents, seed)):
        strata[documents[index]["language"], cluster].append(index)
    rng = random.Random(f"{seed}/sample")
    counts = allocate({stratum: len(indices) for stratum, indices in sorted(strata.items())}, size)
    chosen = [index for stratum, count in counts.items() for index in rng.sample(strata[stratum], count)]
    return [documents[index] for index in sorted(chosen)]


def allocate(sizes: Mapping[Key, int], total: int) -> dict[Key, int]:
    """Allocate `total` draws to strata in proportion to their sizes; each gets at least one, if there are enough.

    Args:
        sizes: Stratum -> number of members.
        total: Number of draws; all members, if there are no more.

    Example:
        ```python
        >>> allocate({"en": 90, "de": 9, "fi": 1}, 10)
        {'en': 8, 'de': 1, 'fi': 1}
        ```
    """
    members = sum(sizes.values())
    total = min(total, members)
    least = 1 if total >= len(sizes) else 0
    exact = {key: total * size / members for key, size in sizes.items()}
    counts = {key: min(sizes[key], max(least, int(share))) for key, share in exact.items()}
    while (missing := total - sum(counts.values())) != 0:
        step = 1 if missing > 0 else -1
        movable = [key for key in counts if (counts[key] < sizes[key] if step > 0 else counts[key] > least)]
        furthest = max(movable, key=lambda key: step * (exact[key] - counts[key]))
        counts[furthest] += step
    return counts


def _clusters(documents: Sequence[CorpusDocument], seed: int) -> list[int]:
    """Return the cluster of each document."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    count = min(_MAX_CLUSTERS, len(documents) // _MEAN_CLUSTER_SIZE)
    if count < 2:
        return [0] * len(documents)
    vectorizer = TfidfVectorizer(analyzer=_head_tokens, max_features=50_000, sublinear_tf=True)
    vectors = vectorizer.fit_transform(map(document_text, documents))
    if vectors.shape[1] > _SVD_DIMENSIONS:
        vectors = TruncatedSVD(_SVD_DIMENSIONS, random_state=seed).fit_transform(vectors)
    return MiniBatchKMeans(count, random_state=seed, n_init=3).fit_predict(vectors).tolist()


def _head_tokens(text: str) -> list[str]:
    return tokenize(text[:_HEAD_CHARS])
