"""Training rows with the ensemble's labels: `python -m recipes.default_model.rows`.

One file per source, for every source whose documents the strong encoder has embedded; queries without an embedding are
added by a later call. Human and written queries have ten documents: positives, hard negatives from the top and middle
of BM25's and the encoder's rankings, and random documents. Labels are in [0, 1]: `exp(10 * label)` is proportional to
a document's odds of relevance within its list; `relevance` is its probability of relevance by itself.
A manifest of counts, languages, licences and hashes is written too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np

from . import sources
from .embed import read_written
from .human_rows import relevant_of, write_lines
from .package import without_copy
from .teachers import HUMAN, ORIGIN, Ensemble, Judges, Query

SIZE = 10
# Documents from the top 10 and the next 40 of the encoder's and of BM25's ranking; the rest are random.
NEAR_TOP, NEAR_MIDDLE, WORDS_TOP, WORDS_MIDDLE = 3, 1, 2, 1
# Rank within which the encoder must retrieve the document of a written query (round-trip filter).
ROUND_TRIP = 20
# Nats between a label of 1 and a label of 0: their odds differ by a factor of e^10.
SPAN = 10.0


def rows_of(judges: Judges, ensemble: Ensemble, written: list[dict], seed: int = 0) -> tuple[list[dict], int]:
    """Rows of a source, and the number of written queries that were dropped."""
    source, rows, dropped = judges.source, [], 0
    all_documents = sorted(source.documents)
    queries: list[tuple[Query, dict[str, float], dict]] = []
    for name, text in source.queries.items():
        relevant = relevant_of(source, name)
        if not any(sources.is_held_out(source.name, document) for document in relevant):
            kind = "cross_lingual" if source.name == "gnome_help" and name.endswith("_x") else "human"
            queries.append((Query(name, text), relevant, {"style": kind}))
    for row in written:
        query = Query(row["_id"], row["text"], row.get("native", ""))
        queries.append((query, {row["document"]: 1.0}, row))
    for query, relevant, about in queries:
        if not judges.knows(query):
            continue
        rng = random.Random(f"{seed}/{source.name}/{query.name}")
        is_human = about["style"] in ("human", "cross_lingual")
        origin = next(iter(relevant))
        near = judges.nearest(query, 50)
        if not is_human and not _passes_round_trip(judges, query, origin, near, about["style"]):
            dropped += 1
            continue
        documents = _draw(judges, query, relevant, near, all_documents, rng)
        scores = judges.scores(query, documents)
        logits = ensemble.logits(scores)
        bonus = HUMAN if is_human else ORIGIN
        logits = logits + np.array([bonus * relevant.get(document, 0.0) for document in documents])
        row = {
            "query": query.text,
            "documents": documents,
            "labels": np.clip(1 + (logits - logits.max()) / SPAN, 0, 1).round(4).tolist(),
            "relevance": (1 / (1 + np.exp(-logits))).round(4).tolist(),
            "language": sources.language_of(source, origin),
            "kind": about["style"],
            "teachers": {name: np.round(values, 4).tolist() for name, values in scores.items()},
        }
        if not is_human:
            document = source.documents[origin]
            stripped = without_copy(document, query.text)
            if stripped is None:
                dropped += 1
                continue
            if about["style"] == "title":
                # All documents lose their titles, as a single missing title would reveal the positive.
                row["titles"] = False
            elif {name: stripped[name] for name in document} != document:
                row["edits"] = {origin: {"title": stripped["title"], "text": stripped["text"]}}
        rows.append(row)
    rng = random.Random(f"{seed}/{source.name}")
    rng.shuffle(rows)
    return rows, dropped


def _passes_round_trip(judges: Judges, query: Query, origin: str, near: list[str], style: str) -> bool:
    """Whether a written query retrieves its document: first of all candidates if a language model wrote it."""
    if style == "model":
        words = set(judges.by_words(query, 20))
        return next((document for document in near if document in words or document == origin), None) == origin
    return origin in near[:ROUND_TRIP]


def _draw(
    judges: Judges,
    query: Query,
    relevant: dict[str, float],
    near: list[str],
    all_documents: list[str],
    rng: random.Random,
) -> list[str]:
    """Draw ten documents: one or two relevant ones, hard negatives, and random documents."""
    source = judges.source
    pages = {sources.page_of(source.name, document) for document in relevant}
    judged = query.name in source.candidates
    chosen = rng.sample(sorted(relevant), min(2 if judged else 1, len(relevant)))

    def add(ranking: list[str], count: int) -> None:
        eligible = [
            document
            for document in ranking
            if document not in chosen and (document in relevant or sources.page_of(source.name, document) not in pages)
        ]
        chosen.extend(rng.sample(eligible, min(count, len(eligible), SIZE - len(chosen))))

    words = judges.by_words(query, 50)
    if judged:
        # The candidates of a judged list come first, as people graded them.
        add(words, SIZE - 2)
    else:
        add(near[:10], NEAR_TOP)
        add(words[:10], WORDS_TOP)
        add(near[10:], NEAR_MIDDLE)
        add(words[10:], WORDS_MIDDLE)
    for _ in range(50):
        if len(chosen) == SIZE:
            break
        add([rng.choice(all_documents)], 1)
    return chosen


def manifest_of(folder: Path, data: Path) -> dict:
    """Counts by source, language and kind, licences, and the files' hashes."""
    files, languages, kinds = {}, Counter(), Counter()
    for path in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        kind = "general" if (data / "general" / path.stem).exists() else "corpora"
        meta = json.loads((data / kind / path.stem / "meta.json").read_text(encoding="utf-8"))
        files[path.stem] = {
            "folder": kind,
            "queries": len(rows),
            "kinds": dict(Counter(row["kind"] for row in rows).most_common()),
            "licence": meta.get("licence"),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        languages.update(row["language"] for row in rows)
        kinds.update(row["kind"] for row in rows)
    return {
        "queries": sum(file["queries"] for file in files.values()),
        "sources": len(files),
        "languages": dict(languages.most_common()),
        "kinds": dict(kinds.most_common()),
        "files": files,
    }


def main() -> None:
    """Write the rows of all sources that are ready, and the manifest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, default=Path("runs/default_model/embeddings"))
    parser.add_argument("--queries", type=Path, default=Path("runs/default_model/queries"))
    parser.add_argument("--teachers", type=Path, default=Path("runs/default_model/teachers.json"))
    parser.add_argument("--out", type=Path, default=Path("runs/default_model/rows/ensemble"))
    parser.add_argument("--manifest", type=Path, default=Path("results/default_model_rows.json"))
    settings = parser.parse_args()
    ensemble = Ensemble.load(settings.teachers)
    weights_hash = hashlib.sha256(settings.teachers.read_bytes()).hexdigest()
    for kind in ("general", "corpora"):
        for name in sources.names(settings.data, kind):
            folder, path = settings.cache / "embeddinggemma" / name, settings.out / f"{name}.jsonl"
            if name in sources.HELD_OUT or not folder.exists():
                continue
            # Hash of the inputs: a file is rebuilt when embeddings or weights have changed.
            parts = sorted(path.name for path in settings.cache.glob(f"*/{name}/*.safetensors"))
            state = hashlib.sha256("\n".join([weights_hash, *parts]).encode()).hexdigest()
            state_file = path.with_suffix(".state")
            if path.exists() and state_file.exists() and state_file.read_text() == state:
                continue
            judges = Judges(sources.load(settings.data, kind, name), settings.cache)
            if "embeddinggemma" not in judges.encoders:
                continue
            rows, dropped = rows_of(judges, ensemble, read_written(settings.queries, name))
            if rows:
                write_lines(path, rows)
                state_file.write_text(state)
            print(f"{name}: {len(rows)} rows, {dropped} written queries dropped", flush=True)
    settings.manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest = json.dumps(manifest_of(settings.out, settings.data), ensure_ascii=False, indent=1)
    settings.manifest.write_text(manifest + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
