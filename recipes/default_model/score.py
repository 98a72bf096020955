"""Label rows with the trained cross-encoder, for its students: `python -m recipes.default_model.score`.

Its logit differences are mixed with the ensemble's labels. Resumable: the rows that a source's file already has are
skipped. Sources are interleaved, so that students can start early. Speed is that of inference: a few rows per second
and core.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from . import sources
from .cross_encoder import CrossEncoder, restore
from .rows import SPAN
from .stream import texts_of

BLOCK = 50


def joined(row: dict, logits: list[float], share: float) -> dict:
    """A row whose labels mix the cross-encoder's logits, weighted `share`, and the ensemble's, weighted 1 - `share`."""
    scores = np.array(logits)
    nats = share * (scores - scores.max()) + (1 - share) * SPAN * (np.array(row["labels"]) - 1)
    labels = np.clip(1 + (nats - nats.max()) / SPAN, 0, 1)
    relevance = share / (1 + np.exp(-scores)) + (1 - share) * np.array(row["relevance"])
    teachers = row["teachers"] | {"cross_encoder": scores.round(3).tolist()}
    return row | {"labels": labels.round(4).tolist(), "relevance": relevance.round(4).tolist(), "teachers": teachers}


def whole_lines(path: Path) -> int:
    """Count the lines of a file, and truncate an incomplete last line."""
    if not path.exists():
        return 0
    text = path.read_bytes()
    if not text.endswith(b"\n"):
        text = text[: text.rfind(b"\n") + 1]
        path.write_bytes(text)
    return text.count(b"\n")


@torch.no_grad()
def main() -> None:
    """Score all rows of a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rows", type=Path, default=Path("runs/default_model/rows/ensemble"))
    parser.add_argument("--out", type=Path, default=Path("runs/default_model/rows/teacher"))
    parser.add_argument("--weights", type=Path, default=Path("runs/weights/embeddinggemma-300m/model_download"))
    parser.add_argument("--state", type=Path, default=Path("runs/default_model/cross_encoder/state.safetensors"))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--alpha", type=float, default=32.0)
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--share", type=float, default=0.7)
    parser.add_argument("--limit", type=int, default=2000, help="rows per source")
    parser.add_argument("--threads", type=int, default=1)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    model = CrossEncoder(settings.weights, settings.rank, settings.alpha)
    restore(settings.state, model, None)
    settings.out.mkdir(parents=True, exist_ok=True)
    waiting = []
    for path in sorted(settings.rows.glob("*.jsonl")):
        target = settings.out / path.name
        done = whole_lines(target)
        remaining = path.read_text(encoding="utf-8").splitlines()[done : settings.limit]
        if remaining:
            kind = "general" if (settings.data / "general" / path.stem).exists() else "corpora"
            waiting.append((target, remaining, sources.load(settings.data, kind, path.stem).documents))
    began, count, total = time.monotonic(), 0, sum(len(remaining) for _, remaining, _ in waiting)
    while waiting:
        target, remaining, documents = waiting.pop(0)
        lines = []
        for line in remaining[:BLOCK]:
            row = json.loads(line)
            logits, _ = model(row["query"], texts_of(row, documents), settings.max_length)
            lines.append(json.dumps(joined(row, logits.tolist(), settings.share), ensure_ascii=False) + "\n")
        with target.open("a", encoding="utf-8") as out:
            out.write("".join(lines))
        count += len(lines)
        if remaining[BLOCK:]:
            waiting.append((target, remaining[BLOCK:], documents))
        seconds = (time.monotonic() - began) / count
        hours = seconds * (total - count) / 3600
        print(f"{target.stem}: {count} of {total} rows, {1 / seconds:.2f} a second, {hours:.1f} h left", flush=True)


if __name__ == "__main__":
    main()
