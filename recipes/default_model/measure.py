"""nDCG@10 of an order over the validation lists, beside that of BM25 and of chance."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import sources


def read_lists(path: Path, data: Path, count: int) -> list[dict]:
    """The first so many validation lists of each source, with the texts of their documents."""
    lists, documents, seen = [], {}, defaultdict(int)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        name = row["source"]
        seen[name] += 1
        if seen[name] <= count:
            if name not in documents:
                documents = {name: sources.load(data, "general", name).documents}
            lists.append(row | {"texts": [documents[name][each] for each in row["documents"]]})
    return lists


def ndcg(grades: Sequence[float], scores: Sequence[float], depth: int = 10) -> float:
    """nDCG with gains 2^grade - 1, over what is in the list."""

    def dcg(ordered: Sequence[float]) -> float:
        return sum((2**grade - 1) / math.log2(place + 2) for place, grade in enumerate(ordered[:depth]))

    order = sorted(range(len(grades)), key=lambda place: -scores[place])
    return dcg([grades[place] for place in order]) / dcg(sorted(grades, reverse=True))


def random_ndcg(grades: Sequence[float], depth: int = 10) -> float:
    """What a random order gives in the mean."""
    gain = sum(2**grade - 1 for grade in grades) / len(grades)
    best = sum((2**g - 1) / math.log2(p + 2) for p, g in enumerate(sorted(grades, reverse=True)[:depth]))
    return gain * sum(1 / math.log2(place + 2) for place in range(min(depth, len(grades)))) / best


@torch.no_grad()
def measure(model: Any, lists: list[dict], max_length: int) -> dict:
    """nDCG@10 x 100 by source and in the mean: of the model, of BM25 (the order of the lists), of chance."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    losses = []
    for row in lists:
        scores, _ = model(row["query"], row["texts"], max_length)
        grades = row["grades"]
        mine = found[row["source"]]
        mine["model"].append(ndcg(grades, scores.tolist()))
        mine["bm25"].append(ndcg(grades, [-place for place in range(len(grades))]))
        mine["random"].append(random_ndcg(grades))
        target = torch.tensor([float(grade > 0) for grade in grades])
        losses.append(-(scores.log_softmax(-1) * target).sum().item() / target.sum().item())
    by_source = {
        name: {kind: round(100 * sum(values) / len(values), 1) for kind, values in each.items()}
        for name, each in found.items()
    }
    mean = {
        kind: round(sum(each[kind] for each in by_source.values()) / len(by_source), 1)
        for kind in ("model", "bm25", "random")
    }
    return {"mean": mean, "loss": round(sum(losses) / len(losses), 4), "lists": len(lists), "by_source": by_source}


def draw_curve(folder: Path) -> None:
    """`curve.png`: training loss and validation nDCG@10 over steps, from the JSON lines of a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    points = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True)
    ratio = [each["loss"] / each["chance"] for each in steps if each["chance"]]
    window = max(1, min(50, len(ratio) // 5))
    smooth = [
        sum(ratio[max(0, i - window) : i + 1]) / len(ratio[max(0, i - window) : i + 1]) for i in range(len(ratio))
    ]
    above.plot([each["step"] for each in steps if each["chance"]], smooth)
    above.set_ylabel("loss / loss of chance")
    for kind in ("model", "bm25", "random"):
        below.plot([each["step"] for each in points], [each["mean"][kind] for each in points], "o-", label=kind)
    below.set_ylabel("nDCG@10 x 100, validation")
    below.set_xlabel("step")
    below.legend()
    figure.tight_layout()
    figure.savefig(folder / "curve.png", dpi=110)
    pyplot.close(figure)
