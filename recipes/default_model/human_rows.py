"""Rows of human queries with BM25 negatives, and the validation lists: `python -m recipes.default_model.human_rows`.

They need no teacher, so training can start at once. A row refers to its documents by id; the texts are in the source.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path

from . import sources
from .package import BM25

# Negatives of a row: from BM25's top 10, from the next 40, and at random.
TOP, MIDDLE, RANDOM = 4, 2, 1
ROWS_PER_SOURCE = 3000
# Sources of the validation lists: those never trained on, and others, of which only held-out documents count.
VALIDATION = (
    *sources.HELD_OUT,
    "nq_qed_clapnq",
    "gnome_help",
    "tldr_commands",
    "acl_titles",
    "epqa",
    "drcd",
)
VALIDATION_QUERIES, VALIDATION_DOCUMENTS = 10, 10


def relevant_of(source: sources.Source, query: str) -> dict[str, float]:
    """Relevant documents -> labels in (0, 1]: the grades over the query's highest."""
    grades = {document: grade for document, grade in source.qrels[query].items() if grade > 0}
    return {document: grade / max(grades.values()) for document, grade in grades.items()}


def ranked_by_bm25(source: sources.Source, index: BM25, query: str, depth: int) -> list[str]:
    """Candidates of a query, best first, without translations of the page that answers it."""
    if query in source.candidates:
        return source.candidates[query]
    text, positives = source.queries[query], list(source.qrels[query])
    native = f"{query.removesuffix('_x')}_0"
    if source.name == "gnome_help" and query.endswith("_x"):
        # An English title of a page in another language: retrieve by the title in that language.
        page = source.documents[positives[0]]
        text = source.queries.get(native) or " ".join(page["text"].split()[:12])
    pages = {sources.page_of(source.name, document) for document in positives}
    ranked = [document for document, _ in index.search([text], depth)[0]]
    return [
        document
        for document in ranked
        if document in source.qrels[query] or sources.page_of(source.name, document) not in pages
    ]


def rows_of(source: sources.Source, index: BM25, seed: int = 0) -> list[dict]:
    """Training rows of a source: documents by id, and their labels."""
    rows = []
    all_documents = sorted(source.documents)
    queries = sorted(source.queries, key=lambda query: sources.fraction("rows", query))
    for query in queries:
        relevant = relevant_of(source, query)
        if any(sources.is_held_out(source.name, document) for document in relevant):
            continue
        rng = random.Random(f"{seed}/{source.name}/{query}")
        ranked = [
            document for document in ranked_by_bm25(source, index, query, 50) if document not in source.qrels[query]
        ]
        positives = rng.sample(sorted(relevant), min(2 if query in source.candidates else 1, len(relevant)))
        if query in source.candidates:
            judged = [document for document, grade in source.qrels[query].items() if grade == 0]
            ranked = list(dict.fromkeys([*judged, *ranked]))
        top = ranked[:10]
        chosen = rng.sample(top, min(TOP, len(top)))
        chosen += rng.sample(ranked[10:], min(MIDDLE, len(ranked[10:])))
        excluded = {*source.qrels[query], *ranked}
        pages = {sources.page_of(source.name, document) for document in relevant}
        while len(chosen) < TOP + MIDDLE + RANDOM:
            candidate = rng.choice(all_documents)
            if candidate not in excluded and sources.page_of(source.name, candidate) not in pages:
                excluded.add(candidate)
                chosen.append(candidate)
        rows.append(
            {
                "query": source.queries[query],
                "documents": [*positives, *chosen],
                "labels": [*(round(relevant[document], 3) for document in positives), *(0.0 for _ in chosen)],
                "language": sources.language_of(source, positives[0]),
                "kind": "cross_lingual" if source.name == "gnome_help" and query.endswith("_x") else "human",
            }
        )
        if len(rows) == ROWS_PER_SOURCE:
            break
    return rows


def validation_of(source: sources.Source, index: BM25) -> list[dict]:
    """Validation lists in BM25's order, with at least one relevant document."""
    lists = []
    for query in sorted(source.queries, key=lambda query: sources.fraction("validation", query)):
        relevant = relevant_of(source, query)
        if not all(sources.is_held_out(source.name, document) for document in relevant):
            continue
        ranked = ranked_by_bm25(source, index, query, VALIDATION_DOCUMENTS)
        if query in source.candidates:
            scores = index.scores(source.queries[query], ranked)
            by_score = sorted(zip(scores, ranked, strict=True), reverse=True)
            ranked = [document for _, document in by_score[:VALIDATION_DOCUMENTS]]
        if not relevant.keys() & set(ranked) or len(ranked) < 5:
            continue
        lists.append(
            {
                "source": source.name,
                "query": source.queries[query],
                "documents": ranked,
                "grades": [source.qrels[query].get(document, 0) for document in ranked],
            }
        )
        if len(lists) == VALIDATION_QUERIES:
            break
    return lists


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write JSON Lines atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    """Write the rows of all sources of `general`, and the validation lists."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/default_model/rows/human"))
    parser.add_argument("--validation", type=Path, default=Path("runs/default_model/validation.jsonl"))
    settings = parser.parse_args()
    lists = []
    for name in sources.names(settings.data, "general"):
        path = settings.out / f"{name}.jsonl"
        wants_lists = name in VALIDATION and not settings.validation.exists()
        if not wants_lists and (path.exists() or name in sources.HELD_OUT):
            continue
        source = sources.load(settings.data, "general", name)
        index = BM25(source.documents)
        if wants_lists:
            source_lists = validation_of(source, index)
            lists += source_lists
            print(f"{name}: {len(source_lists)} validation lists", flush=True)
        if name not in sources.HELD_OUT and not path.exists():
            rows = rows_of(source, index)
            write_lines(path, rows)
            print(f"{name}: {len(rows)} rows", flush=True)
    if lists:
        write_lines(settings.validation, lists)


if __name__ == "__main__":
    main()
