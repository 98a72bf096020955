"""Pictures of a run: which queries there are, what was dropped, how teachers score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..figures import new_figure, save_figure
from ..training.rows import Row

_LANGUAGES_SHOWN = 12
_BINS = 30


def draw_queries(queries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Queries by language, stacked by style.

    Args:
        queries: As in `data/queries.jsonl`.
        path: A PNG file.
    """
    counts = Counter((each["metadata"]["language"], each["metadata"]["style"]) for each in queries)
    languages = [name for name, _ in Counter(each["metadata"]["language"] for each in queries).most_common()]
    shown = languages[:_LANGUAGES_SHOWN][::-1]
    figure = new_figure(7, 1.2 + 0.35 * len(shown))
    axes, left = figure.subplots(), np.zeros(len(shown))
    for style in sorted({style for _, style in counts}):
        values = np.array([counts[language, style] for language in shown])
        axes.barh(shown, values, left=left, label=style)
        left += values
    hidden = f" ({len(languages) - len(shown)} more languages)" if len(languages) > len(shown) else ""
    axes.set_title(f"queries by language and style{hidden}", loc="left", fontsize=10)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def draw_drops(dropped: Mapping[str, int], path: Path) -> None:
    """What was dropped, by reason."""
    names = sorted(dropped, key=lambda name: dropped[name]) or ["nothing"]
    figure = new_figure(7, 1.2 + 0.35 * len(names))
    axes = figure.subplots()
    bars = axes.barh(names, [dropped.get(name, 0) for name in names], color="tab:red")
    axes.bar_label(bars, padding=3, fontsize=8)
    axes.set_title("queries dropped, by reason", loc="left", fontsize=10)
    save_figure(figure, path)


def draw_scores(rows: Sequence[Row], path: Path) -> None:
    """Each teacher's scores: of the document that a query was written for, and of the others.

    Args:
        rows: With `scores`, and the place of that document as `positive`.
        path: A PNG file.
    """
    names = sorted(rows[0]["scores"])
    figure = new_figure(7, 2.2 * len(names))
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        groups: dict[str, list[float]] = {"source document": [], "other candidates": []}
        for row in rows:
            for place, score in enumerate(row["scores"][name]):
                groups["source document" if place == row["positive"] else "other candidates"].append(score)
        everything = [score for each in groups.values() for score in each]
        bins = np.linspace(min(everything), max(everything) or 1, _BINS + 1)
        for label, values in groups.items():
            if values and bins[0] < bins[-1]:
                axes.hist(values, bins=bins, density=True, alpha=0.6, label=label)
        axes.set_title(f"scores of {name}", loc="left", fontsize=10)
        axes.legend(fontsize=8)
    save_figure(figure, path)
