"""Training rows with the ensemble's labels: `python -m recipes.default_model.rows`.

One file a source, for every source whose documents the strong encoder has read; queries that it has not read yet come
with the next call. Human queries and written ones, ten documents each: from the top, the middle and anywhere of BM25
and the encoders. Labels are in [0, 1]: `exp(10 * label)` is what the teachers and people together hold a document's
odds to be, in proportion to the others of its list; `relevance` is the probability of each by itself.
A manifest of counts, languages, licences and hashes is written beside.
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
# Of each kind of ranking, how many from its first ten and from the forty behind; what is left is from anywhere.
NEAR_TOP, NEAR_MIDDLE, WORDS_TOP, WORDS_MIDDLE = 3, 1, 2, 1
# A written query whose own document is not among the encoder's first so many is thrown away.
ROUND_TRIP = 20
# Nats of a label of 1: by it a label of 1 and one of 0 differ by a factor of e^10.
SPAN = 10.0


def rows_of(judges: Judges, ensemble: Ensemble, written: list[dict], seed: int = 0) -> tuple[list[dict], int]:
    """Rows of a source, and how many written queries were thrown away."""
    source, rows, thrown = judges.source, [], 0
    everything = sorted(source.documents)
    wanted: list[tuple[Query, dict[str, float], dict]] = []
    for name, text in source.queries.items():
        relevant = relevant_of(source, name)
        if not any(sources.is_held_back(source.name, each) for each in relevant):
            kind = "cross_lingual" if source.name == "gnome_help" and name.endswith("_x") else "human"
            wanted.append((Query(name, text), relevant, {"style": kind}))
    for each in written:
        query = Query(each["_id"], each["text"], each.get("native", ""))
        wanted.append((query, {each["document"]: 1.0}, each))
    for query, relevant, about in wanted:
        if not judges.knows(query):
            continue
        rng = random.Random(f"{seed}/{source.name}/{query.name}")
        is_human = about["style"] in ("human", "cross_lingual")
        origin = next(iter(relevant))
        near = judges.nearest(query, 50)
        if not is_human and not _is_found(judges, query, origin, near, about["style"]):
            thrown += 1
            continue
        documents = _draw(judges, query, relevant, near, everything, rng)
        scores = judges.scores(query, documents)
        logits = ensemble.logits(scores)
        bonus = HUMAN if is_human else ORIGIN
        logits = logits + np.array([bonus * relevant.get(each, 0.0) for each in documents])
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
            left = without_copy(document, query.text)
            if left is None:
                thrown += 1
                continue
            if about["style"] == "title":
                # No document shows its title, or a missing one would tell which it is.
                row["titles"] = False
            elif {name: left[name] for name in document} != document:
                row["edits"] = {origin: {"title": left["title"], "text": left["text"]}}
        rows.append(row)
    rng = random.Random(f"{seed}/{source.name}")
    rng.shuffle(rows)
    return rows, thrown


def _is_found(judges: Judges, query: Query, origin: str, near: list[str], style: str) -> bool:
    """Whether a written query leads back to its document; a language model's has to lead there first."""
    if style == "model":
        words = set(judges.by_words(query, 20))
        return next((each for each in near if each in words or each == origin), None) == origin
    return origin in near[:ROUND_TRIP]


def _draw(
    judges: Judges, query: Query, relevant: dict[str, float], near: list[str], everything: list[str], rng: random.Random
) -> list[str]:
    """Ten documents: a relevant one or two, and those that may be mistaken for it."""
    source = judges.source
    pages = {sources.page_of(source.name, each) for each in relevant}
    judged = query.name in source.candidates
    chosen = rng.sample(sorted(relevant), min(2 if judged else 1, len(relevant)))

    def add(ranking: list[str], count: int) -> None:
        free = [
            each
            for each in ranking
            if each not in chosen and (each in relevant or sources.page_of(source.name, each) not in pages)
        ]
        chosen.extend(rng.sample(free, min(count, len(free), SIZE - len(chosen))))

    words = judges.by_words(query, 50)
    if judged:
        # Judged lists have all that the judges saw; of them as many as there is room for.
        add(words, SIZE - 2)
    else:
        add(near[:10], NEAR_TOP)
        add(words[:10], WORDS_TOP)
        add(near[10:], NEAR_MIDDLE)
        add(words[10:], WORDS_MIDDLE)
    for _ in range(50):
        if len(chosen) == SIZE:
            break
        add([rng.choice(everything)], 1)
    return chosen


def manifest_of(folder: Path, data: Path) -> dict:
    """Counts by source, language and kind, licences, and the hash of each file."""
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
        "queries": sum(each["queries"] for each in files.values()),
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
    made_from = hashlib.sha256(settings.teachers.read_bytes()).hexdigest()
    for kind in ("general", "corpora"):
        for name in sources.names(settings.data, kind):
            folder, path = settings.cache / "embeddinggemma" / name, settings.out / f"{name}.jsonl"
            if name in sources.HELD_BACK or not folder.exists():
                continue
            # What a file was made of; another list of embeddings or other weights make it anew.
            parts = sorted(each.name for each in settings.cache.glob(f"*/{name}/*.safetensors"))
            state = hashlib.sha256("\n".join([made_from, *parts]).encode()).hexdigest()
            mark = path.with_suffix(".state")
            if path.exists() and mark.exists() and mark.read_text() == state:
                continue
            judges = Judges(sources.load(settings.data, kind, name), settings.cache)
            if "embeddinggemma" not in judges.encoders:
                continue
            rows, thrown = rows_of(judges, ensemble, read_written(settings.queries, name))
            if rows:
                write_lines(path, rows)
                mark.write_text(state)
            print(f"{name}: {len(rows)} rows, {thrown} written queries thrown away", flush=True)
    settings.manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest = json.dumps(manifest_of(settings.out, settings.data), ensure_ascii=False, indent=1)
    settings.manifest.write_text(manifest + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
