"""The sources of training data: folders in the BEIR layout with a `meta.json`."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Their licences forbid what we do with them, or are not stated.
UNUSABLE = {"korquad", "tquad"}
# Splits that public benchmarks measure on.
LEFT_OUT_SPLITS = {"jaquad": {"dev"}}
# Never trained on: validation sees how a model does on a kind of text or a language that it has not seen.
HELD_BACK = ("pubmedqa", "covid_faq_gov", "heq", "kazqad", "lohelp_vi", "swequad_mc")
# Of the other sources, this share of the documents, with all their queries.
HELD_BACK_SHARE = 0.05
# Documents used of a source, those with judgements first.
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

# How much more, or less, often than by its size a source is drawn: questions on Wikipedia are many, alike and easy.
EMPHASIS = dict.fromkeys(
    ("arcd", "piaf", "pquad", "norquad", "cmrc2018", "drcd", "jaquad", "iapp_wiki_qa", "idk_mrc", "faquad"), 0.6
) | dict.fromkeys(
    ("covidqa_deepset", "evidence_inference", "acl_titles", "nq_qed_clapnq", "gnome_help", "boolq", "integreat"), 1.5
)


@dataclass(frozen=True)
class Source:
    """One source, cut to its cap.

    Args:
        name: The folder's name.
        meta: What `meta.json` says.
        documents: Document id -> `{"title", "text"}`.
        queries: Query id -> text; of `corpora` none.
        qrels: Query id -> document id -> grade.
        candidates: Query id -> document ids, where the source has lists of them.
    """

    name: str
    meta: dict
    documents: dict[str, dict[str, str]]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    candidates: dict[str, list[str]]


def names(data: Path, kind: str) -> list[str]:
    """Names of the usable sources of `general` or `corpora`: what counts most first, then what has the least text."""
    folders = [path.parent for path in (data / kind).glob("*/meta.json") if path.parent.name not in UNUSABLE]
    sizes = {each.name: (each / "corpus.jsonl.gz").stat().st_size for each in folders}
    return sorted(sizes, key=lambda name: (name in HELD_BACK, -EMPHASIS.get(name, 1.0), sizes[name], name))


def load(data: Path, kind: str, name: str) -> Source:
    """Read a source of `general` or `corpora`; no other folder is ever read."""
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
    qrels = {query: {each: grade for each, grade in qrels[query].items() if each in documents} for query in queries}
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
    """What documents in several languages are a translation of; other documents stand for themselves."""
    if not source.startswith(("gnome_help", "lohelp")):
        return f"{source}/{document}"
    parts = document.split("_", 2 if document.startswith(("pt_BR_", "zh_CN_", "zh_TW_", "zh_HK_")) else 1)
    return f"{source[:5]}/{parts[-1]}"


def language_of(source: Source, document: str) -> str:
    """The language of a document or query where its id tells, else the source's first."""
    languages = source.meta.get("languages") or ["?"]
    told = [each for each in languages if document.startswith((f"{each}_", f"{source.name}-{each}-"))]
    if source.name == "tldr_commands":
        # Only of queries.
        told = [each for each in languages if document.rstrip("0123456789") in (each, each.replace("_", ""))]
    return max(told, key=len, default=languages[0])


def is_held_back(source: str, document: str) -> bool:
    """Whether a document, and so every query on it or its translations, is for validation only."""
    return source in HELD_BACK or fraction(page_of(source, document)) < HELD_BACK_SHARE


def fraction(*parts: str) -> float:
    """A number in [0, 1) that depends on nothing but some strings."""
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _first(documents: dict, cap: int, in_order: bool = False) -> dict:
    """So many of the documents; always the same ones, and with a larger cap those and more."""
    if len(documents) <= cap:
        return documents
    chosen = list(documents) if in_order else sorted(documents, key=lambda each: fraction("cap", each))
    return {each: documents[each] for each in chosen[:cap]}


def _judged_first(documents: dict, qrels: dict, candidates: dict) -> dict:
    """With candidate lists, whole lists of queries in an order drawn once; otherwise as they are."""
    if not candidates:
        return documents
    order: dict[str, None] = {}
    for query in sorted(candidates, key=lambda each: fraction("cap", each)):
        order.update(dict.fromkeys([*qrels[query], *candidates[query]]))
    return {each: documents[each] for each in [*order, *(each for each in documents if each not in order)]}


def _rows(folder: Path, name: str) -> Iterator[dict]:
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _tsv(path: Path) -> Iterator[list[str]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = line.split("\t")
        if row[0] not in ("query-id", "query_id", "qid"):
            yield row
