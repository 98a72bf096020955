"""Rows of human queries with negatives of BM25, and the validation lists: `python -m recipes.default_model.human_rows`.

They need no teacher, so that training can begin at once. A row names its documents by id: the texts are in the source.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path

from . import sources
from .package import BM25

# Documents of a row beside the relevant one: from BM25's first ten, from the next forty, and from anywhere.
TOP, MIDDLE, RANDOM = 4, 2, 1
ROWS_PER_SOURCE = 3000
# The validation lists: sources that are never trained on, and queries on held-back documents of others.
VALIDATION = (
    *sources.HELD_BACK,
    "nq_qed_clapnq",
    "gnome_help",
    "tldr_commands",
    "acl_titles",
    "epqa",
    "drcd",
)
VALIDATION_QUERIES, VALIDATION_DOCUMENTS = 10, 10


def relevant_of(source: sources.Source, query: str) -> dict[str, float]:
    """Documents judged relevant and their labels in (0, 1]."""
    grades = {document: grade for document, grade in source.qrels[query].items() if grade > 0}
    return {document: grade / max(grades.values()) for document, grade in grades.items()}


def ranked_by_bm25(source: sources.Source, index: BM25, query: str, depth: int) -> list[str]:
    """Candidates of a query, best first, without translations of the page that answers it."""
    if query in source.candidates:
        return source.candidates[query]
    text, positives = source.queries[query], list(source.qrels[query])
    native = f"{query.removesuffix('_x')}_0"
    if source.name == "gnome_help" and query.endswith("_x"):
        # An English title of a page in another language: candidates come by the title in that language.
        page = source.documents[positives[0]]
        text = source.queries.get(native) or " ".join(page["text"].split()[:12])
    pages = {sources.page_of(source.name, each) for each in positives}
    found = [each for each, _ in index.search([text], depth)[0]]
    return [each for each in found if each in source.qrels[query] or sources.page_of(source.name, each) not in pages]


def rows_of(source: sources.Source, index: BM25, seed: int = 0) -> list[dict]:
    """Training rows of a source: documents by id, and their labels."""
    rows = []
    everything = sorted(source.documents)
    queries = sorted(source.queries, key=lambda each: sources.fraction("rows", each))
    for query in queries:
        relevant = relevant_of(source, query)
        if any(sources.is_held_back(source.name, each) for each in relevant):
            continue
        rng = random.Random(f"{seed}/{source.name}/{query}")
        ranked = [each for each in ranked_by_bm25(source, index, query, 50) if each not in source.qrels[query]]
        positives = rng.sample(sorted(relevant), min(2 if query in source.candidates else 1, len(relevant)))
        if query in source.candidates:
            judged = [each for each, grade in source.qrels[query].items() if grade == 0]
            ranked = list(dict.fromkeys([*judged, *ranked]))
        top = ranked[:10]
        chosen = rng.sample(top, min(TOP, len(top)))
        chosen += rng.sample(ranked[10:], min(MIDDLE, len(ranked[10:])))
        taken = {*source.qrels[query], *ranked}
        pages = {sources.page_of(source.name, each) for each in relevant}
        while len(chosen) < TOP + MIDDLE + RANDOM:
            other = rng.choice(everything)
            if other not in taken and sources.page_of(source.name, other) not in pages:
                taken.add(other)
                chosen.append(other)
        rows.append(
            {
                "query": source.queries[query],
                "documents": [*positives, *chosen],
                "labels": [*(round(relevant[each], 3) for each in positives), *(0.0 for _ in chosen)],
                "language": sources.language_of(source, positives[0]),
                "kind": "cross_lingual" if source.name == "gnome_help" and query.endswith("_x") else "human",
            }
        )
        if len(rows) == ROWS_PER_SOURCE:
            break
    return rows


def validation_of(source: sources.Source, index: BM25) -> list[dict]:
    """Lists to rerank, in BM25's order; the relevant document is in each."""
    lists = []
    for query in sorted(source.queries, key=lambda each: sources.fraction("validation", each)):
        relevant = relevant_of(source, query)
        if not all(sources.is_held_back(source.name, each) for each in relevant):
            continue
        ranked = ranked_by_bm25(source, index, query, VALIDATION_DOCUMENTS)
        if query in source.candidates:
            scores = index.scores(source.queries[query], ranked)
            ranked = [each for _, each in sorted(zip(scores, ranked, strict=True), reverse=True)][:VALIDATION_DOCUMENTS]
        if not relevant.keys() & set(ranked) or len(ranked) < 5:
            continue
        lists.append(
            {
                "source": source.name,
                "query": source.queries[query],
                "documents": ranked,
                "grades": [source.qrels[query].get(each, 0) for each in ranked],
            }
        )
        if len(lists) == VALIDATION_QUERIES:
            break
    return lists


def write_lines(path: Path, rows: list[dict]) -> None:
    """JSON lines, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".aside")
    aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(aside, path)


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
        needed = name in VALIDATION and not settings.validation.exists()
        if not needed and (path.exists() or name in sources.HELD_BACK):
            continue
        source = sources.load(settings.data, "general", name)
        index = BM25(source.documents)
        if needed:
            found = validation_of(source, index)
            lists += found
            print(f"{name}: {len(found)} validation lists", flush=True)
        if name not in sources.HELD_BACK and not path.exists():
            rows = rows_of(source, index)
            write_lines(path, rows)
            print(f"{name}: {len(rows)} rows", flush=True)
    if lists:
        write_lines(settings.validation, lists)


if __name__ == "__main__":
    main()
