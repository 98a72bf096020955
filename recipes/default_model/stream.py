"""An endless, resumable stream of training rows, mixed over sources."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from . import sources


class Stream:
    """Rows of several folders; a source is read from the first folder that has it.

    Args:
        data: Folder of `general` and `corpora`.
        folders: Folders of row files, `SOURCE.jsonl`, the preferred first.
        seed: Seed of the draws.
    """

    def __init__(self, data: Path, folders: Sequence[Path], seed: int = 0):
        paths: dict[str, Path] = {}
        for folder in folders:
            for path in sorted(folder.glob("*.jsonl")):
                paths.setdefault(path.stem, path)
        if not paths:
            raise FileNotFoundError(f"No rows in {', '.join(map(str, folders))}.")
        self._seed, self._documents, self._rows = seed, {}, {}
        for name, path in sorted(paths.items()):
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            kind = "general" if (data / "general" / name).exists() else "corpora"
            documents = sources.load(data, kind, name).documents
            used = {document for row in rows for document in row["documents"]}
            self._documents[name] = {document: documents[document] for document in used}
            self._rows[name] = rows
        self.names = list(self._rows)
        self._weights = [len(self._rows[name]) ** 0.5 * sources.EMPHASIS.get(name, 1.0) for name in self.names]
        self.counts = dict.fromkeys(self.names, 0)

    def step(self, number: int, queries: int) -> list[dict]:
        """Rows of a step, of different sources if possible: `query`, `texts`, `labels`, `source`, `language`."""
        rng = random.Random(f"{self._seed}/{number}")
        chosen: list[str] = []
        while len(chosen) < queries:
            name = rng.choices(self.names, self._weights)[0]
            if name not in chosen or queries > len(self.names):
                chosen.append(name)
        return [self._next(name) for name in chosen]

    def _next(self, name: str) -> dict:
        rows, count = self._rows[name], self.counts.get(name, 0)
        order = random.Random(f"{self._seed}/{name}/{count // len(rows)}").sample(range(len(rows)), len(rows))
        row = rows[order[count % len(rows)]]
        self.counts[name] = count + 1
        return row | {"source": name, "texts": texts_of(row, self._documents[name])}


def texts_of(row: dict, documents: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    """The documents of a row: without titles, or without the text of the query, where the row says so."""
    texts = [row.get("edits", {}).get(document) or documents[document] for document in row["documents"]]
    return texts if row.get("titles", True) else [{"title": "", "text": document["text"]} for document in texts]
