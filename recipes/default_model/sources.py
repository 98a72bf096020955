"""The sources of training data: folders in the BEIR layout with a `meta.json`."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Excluded: their licences forbid this use, or are not stated.
UNUSABLE = {"korquad", "tquad"}
# Evaluation splits of public benchmarks.
LEFT_OUT_SPLITS = {"jaquad": {"dev"}}
# Held-out sources, never trained on: they validate generalization to unseen domains and languages.
HELD_OUT = ("pubmedqa", "covid_faq_gov", "heq", "kazqad", "lohelp_vi", "swequad_mc")
# Fraction of the other sources' documents that is held out, with all queries on them.
HELD_OUT_SHARE = 0.05
# Documents used per source, those with relevance judgements first.
CAP = 1500
CAPS = {
    "gnome_help": 6600,
    "tldr_commands": 7200,
    "lohelp_more": 4000,
    "nq_qed_clapnq": 3600,
    "epqa": 4000,
    "evidence_inference": 2000,
    "acl_titles": 2000,
    "covidqa_deepset": 2400,
    "tatqa": 2000,
    "boolq": 2000,
    "integreat": 2000,
}

# Sampling weights relative to size: questions on Wikipedia are numerous, similar and easy.
EMPHASIS = dict.fromkeys(
    ("arcd", "piaf", "pquad", "norquad", "cmrc2018", "drcd", "jaquad", "iapp_wiki_qa", "idk_mrc", "faquad"), 0.6
) | dict.fromkeys(
    ("covidqa_deepset", "evidence_inference", "acl_titles", "nq_qed_clapnq", "gnome_help", "boolq", "integreat"), 1.5
)


@dataclass(frozen=True)
class Source:
    """A source, truncated to its cap.

    Args:
        name: Name of the folder.
        meta: Content of `meta.json`.
        documents: Document id -> `{"title", "text"}`.
        queries: Query id -> text; empty for `corpora`.
        qrels: Query id -> document id -> grade.
        candidates: Query id -> document ids, where the source lists them.
    """

    name: str
    meta: dict
    documents: dict[str, dict[str, str]]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    candidates: dict[str, list[str]]


def names(data: Path, kind: str) -> list[str]:
    """Names of the usable sources of `general` or `corpora`: by descending sampling weight, then by ascending size."""
    folders = [path.parent for path in (data / kind).glob("*/meta.json") if path.parent.name not in UNUSABLE]
    sizes = {folder.name: (folder / "corpus.jsonl.gz").stat().st_size for folder in folders}
    return sorted(sizes, key=lambda name: (name in HELD_OUT, -EMPHASIS.get(name, 1.0), sizes[name], name))


def load(data: Path, kind: str, name: str) -> Source:
    """Read a source of `general` or `corpora`; other folders are refused."""
    if kind not in ("general", "corpora"):
        raise ValueError(f"{kind} is no folder of training data.")
    folder = data / kind / name
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    documents = {row["_id"]: {"title": row.get("title") or "", "text": row["text"]} for row in _rows(folder, "corpus")}
    if kind == "corpora":
        return Source(name, meta, _first(documents, CAPS.get(name, CAP)), {}, {}, {})
    qrels: dict[str, dict[str, int]] = {}
    candidates: dict[str, list[str]] = {}
    for path in sorted((folder / "qrels").glob("*.tsv")):
        if path.stem in LEFT_OUT_SPLITS.get(name, ()):
            continue
        for query, document, grade in _tsv(path):
            if document in documents:
                qrels.setdefault(query, {})[document] = int(grade)
    for path in sorted((folder / "candidates").glob("*.tsv")):
        for query, document, *_ in _tsv(path):
            if document in documents and query in qrels:
                candidates.setdefault(query, []).append(document)
    queries = {row["_id"]: row["text"] for row in _rows(folder, "queries") if row["_id"] in qrels}
    documents = _first(_judged_first(documents, qrels, candidates), CAPS.get(name, CAP), in_order=bool(candidates))
    qrels = {
        query: {document: grade for document, grade in qrels[query].items() if document in documents}
        for query in queries
    }
    queries = {query: text for query, text in queries.items() if any(grade > 0 for grade in qrels[query].values())}
    if candidates:
        queries = {query: text for query, text in queries.items() if set(candidates.get(query, ())) <= set(documents)}
    return Source(
        name,
        meta,
        documents,
        queries,
        {query: qrels[query] for query in queries},
        {query: candidates[query] for query in queries if query in candidates},
    )


def page_of(source: str, document: str) -> str:
    """Key that a document shares with its translations; unique for documents without translations."""
    if not source.startswith(("gnome_help", "lohelp")):
        return f"{source}/{document}"
    parts = document.split("_", 2 if document.startswith(("pt_BR_", "zh_CN_", "zh_TW_", "zh_HK_")) else 1)
    return f"{source[:5]}/{parts[-1]}"


def language_of(source: Source, document: str) -> str:
    """The language in the id of a document or query, or else the source's first language."""
    languages = source.meta.get("languages") or ["?"]
    matches = [
        language for language in languages if document.startswith((f"{language}_", f"{source.name}-{language}-"))
    ]
    if source.name == "tldr_commands":
        # Its queries alone have a language in their ids.
        matches = [
            language for language in languages if document.rstrip("0123456789") in (language, language.replace("_", ""))
        ]
    return max(matches, key=len, default=languages[0])


def is_held_out(source: str, document: str) -> bool:
    """Whether a document is held out for validation, with all queries on it and on its translations."""
    return source in HELD_OUT or fraction(page_of(source, document)) < HELD_OUT_SHARE


def fraction(*parts: str) -> float:
    """Hash of strings as a number in [0, 1)."""
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _first(documents: dict, cap: int, in_order: bool = False) -> dict:
    """A fixed random sample of `cap` documents; a larger cap gives a superset."""
    if len(documents) <= cap:
        return documents
    sampled = list(documents) if in_order else sorted(documents, key=lambda document: fraction("cap", document))
    return {document: documents[document] for document in sampled[:cap]}


def _judged_first(documents: dict, qrels: dict, candidates: dict) -> dict:
    """Sort documents by candidate list, in a fixed random order of queries; without candidate lists, change nothing."""
    if not candidates:
        return documents
    order: dict[str, None] = {}
    for query in sorted(candidates, key=lambda query: fraction("cap", query)):
        order.update(dict.fromkeys([*qrels[query], *candidates[query]]))
    return {
        document: documents[document]
        for document in [*order, *(document for document in documents if document not in order)]
    }


def _rows(folder: Path, name: str) -> Iterator[dict]:
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _tsv(path: Path) -> Iterator[list[str]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = line.split("\t")
        if row[0] not in ("query-id", "query_id", "qid"):
            yield row
