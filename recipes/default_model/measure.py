"""nDCG@10 on the validation lists: of a model, of BM25, and of a random order."""

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
    """The first `count` validation lists of every source, with the texts of their documents."""
    lists, documents, seen = [], {}, defaultdict(int)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        name = row["source"]
        seen[name] += 1
        if seen[name] <= count:
            if name not in documents:
                documents = {name: sources.load(data, "general", name).documents}
            lists.append(row | {"texts": [documents[name][document] for document in row["documents"]]})
    return lists


def ndcg(grades: Sequence[float], scores: Sequence[float], depth: int = 10) -> float:
    """nDCG with gains 2^grade - 1; the ideal order is that of the list's own documents."""

    def dcg(ordered: Sequence[float]) -> float:
        return sum((2**grade - 1) / math.log2(rank + 2) for rank, grade in enumerate(ordered[:depth]))

    order = sorted(range(len(grades)), key=lambda index: -scores[index])
    return dcg([grades[index] for index in order]) / dcg(sorted(grades, reverse=True))


def random_ndcg(grades: Sequence[float], depth: int = 10) -> float:
    """Expected nDCG of a random order."""
    gain = sum(2**grade - 1 for grade in grades) / len(grades)
    best = sum((2**g - 1) / math.log2(p + 2) for p, g in enumerate(sorted(grades, reverse=True)[:depth]))
    return gain * sum(1 / math.log2(rank + 2) for rank in range(min(depth, len(grades)))) / best


@torch.no_grad()
def measure(model: Any, lists: list[dict], max_length: int) -> dict:
    """nDCG@10 x 100, by source and macro-averaged, of the model, BM25 (the order of the lists) and a random order."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    losses = []
    for row in lists:
        scores, _ = model(row["query"], row["texts"], max_length)
        grades = row["grades"]
        of_source = values[row["source"]]
        of_source["model"].append(ndcg(grades, scores.tolist()))
        of_source["bm25"].append(ndcg(grades, [-rank for rank in range(len(grades))]))
        of_source["random"].append(random_ndcg(grades))
        target = torch.tensor([float(grade > 0) for grade in grades])
        losses.append(-(scores.log_softmax(-1) * target).sum().item() / target.sum().item())
    by_source = {
        name: {kind: round(100 * sum(numbers) / len(numbers), 1) for kind, numbers in kinds.items()}
        for name, kinds in values.items()
    }
    mean = {
        kind: round(sum(row[kind] for row in by_source.values()) / len(by_source), 1)
        for kind in ("model", "bm25", "random")
    }
    return {"mean": mean, "loss": round(sum(losses) / len(losses), 4), "lists": len(lists), "by_source": by_source}


def draw_curve(folder: Path) -> None:
    """`curve.png`: training loss and validation nDCG@10 over steps, from the JSON Lines of a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    points = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True)
    ratio = [step["loss"] / step["chance"] for step in steps if step["chance"]]
    window = max(1, min(50, len(ratio) // 5))
    smooth = [
        sum(ratio[max(0, i - window) : i + 1]) / len(ratio[max(0, i - window) : i + 1]) for i in range(len(ratio))
    ]
    above.plot([step["step"] for step in steps if step["chance"]], smooth)
    above.set_ylabel("loss / loss at chance level")
    for kind in ("model", "bm25", "random"):
        below.plot([point["step"] for point in points], [point["mean"][kind] for point in points], "o-", label=kind)
    below.set_ylabel("nDCG@10 x 100, validation")
    below.set_xlabel("step")
    below.legend()
    figure.tight_layout()
    figure.savefig(folder / "curve.png", dpi=110)
    pyplot.close(figure)
