"""Stage 6: the report of an adaptation, a page of Markdown with plots."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from ..files import atomic_write, write_json
from ..markdown import escape
from ..plotting import new_plot, save_plot
from ..training.callbacks import PLOT_FILE
from ..training.teacher_labels import Teachers
from .evaluate import ADAPTED, GENERAL, evaluate_adaptation
from .manifest import Counts, StageRecord, summarize
from .scoring import ScoredRow
from .settings import AdaptSettings

REPORT_FILE, METRICS_FILE = "report.md", "figures.json"
_COLUMNS = ("first_stage", "teacher", "general", "adapted")
_EXAMPLES, _EXAMPLE_CHARS = 12, 160
_LANGUAGES_SHOWN = 12
_ORIGIN: tuple[Literal["language", "style", "generator", "document"], ...]
_ORIGIN = ("language", "style", "generator", "document")
_BINS = 30


class QueryMetadata(TypedDict):
    """Where a query is from: id of its document, style, language, and name of its generator."""

    document: str
    style: str
    language: str
    generator: str


class QueryRow(TypedDict):
    """A line of `data/queries.jsonl`, in the BEIR layout."""

    _id: str
    text: str
    metadata: QueryMetadata


def write_report(
    settings: AdaptSettings, stages: Mapping[str, StageRecord], queries: Sequence[QueryRow], rows: Sequence[ScoredRow]
) -> Counts:
    """Write `report/report.md` with its plots, and `report/figures.json`.

    Args:
        settings: Settings of the run.
        stages: Records of the manifest.
        queries: Rows of `data/queries.jsonl`.
        rows: Rows of `data/train.jsonl`.

    Returns:
        Collection -> nDCG@10 x 100 before and after, as text.
    """
    folder = settings.output_dir / "report"
    plot_queries(queries, folder / "queries.png")
    plot_dropped(stages["queries"]["counts"]["dropped"], folder / "drops.png")
    plot_scores(rows, folder / "scores.png")
    plots = {"Queries": "queries.png", "Dropped": "drops.png", "Teachers": "scores.png"}
    training_plot = settings.output_dir / "train" / PLOT_FILE
    if training_plot.exists():
        shutil.copyfile(training_plot, folder / PLOT_FILE)
        plots["Training"] = PLOT_FILE
    metrics = [evaluate_adaptation(settings, source) for source in settings.evaluation]
    write_json({"rows": metrics}, folder / METRICS_FILE)
    parts = ["# Adaptation", _metrics_section(metrics), _stages_section(stages), _teachers_section(settings, rows)]
    parts.append(_examples_section(queries, settings.seed))
    parts += [f"## {title}\n\n![{title}]({name})" for title, name in plots.items()]
    with atomic_write(folder / REPORT_FILE) as temporary:
        temporary.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return {row["collection"]: f"{row[GENERAL]:.1f} -> {row[ADAPTED]:.1f}" for row in metrics}


def _metrics_section(metrics: Sequence[Mapping[str, Any]]) -> str:
    if not metrics:
        return ""
    lines = [
        "nDCG@10 x 100 on collections with relevance judgements, and the p-value of adapted against general (paired",
        "randomization test):",
        "",
        f"| collection | queries | {' | '.join(_COLUMNS)} | p |",
        f"| --- | ---: | {'---: | ' * len(_COLUMNS)}---: |",
    ]
    for row in metrics:
        cells = " | ".join(f"{row[name]:.1f}" for name in _COLUMNS)
        lines.append(f"| {escape(row['collection'])} | {row['queries']} | {cells} | {row['p_value']:.4f} |")
    return "\n".join(lines).replace("first_stage", "first stage")


def _stages_section(stages: Mapping[str, StageRecord]) -> str:
    lines = ["## Stages", "", "| stage | seconds | |", "| --- | ---: | --- |"]
    for name, record in stages.items():
        lines.append(f"| {name} | {record['seconds']:,.0f} | {escape(summarize(record['counts']))} |")
    return "\n".join(lines)


def _teachers_section(settings: AdaptSettings, rows: Sequence[ScoredRow]) -> str:
    """Describe how teachers rank the source document of a query: the best guess of their quality without labels."""
    positives = [(row["scores"], row["positive"]) for row in rows if row["positive"] is not None]
    if not positives:
        return ""
    weights = settings.teacher_weights
    together = Teachers.fit([row["scores"] for row in rows], weights, settings.calibrations)
    lines = [
        "## Teachers",
        "",
        "How each ranks the document that a query was written for among the candidates. A teacher that seldom ranks it",
        "first may deserve less weight; but queries copied from documents favour teachers that match words.",
        "",
        "| teacher | weight | ranks it first | mean reciprocal rank |",
        "| --- | ---: | ---: | ---: |",
    ]
    scores_by_teacher = [
        (name, f"{weight:g}", [scores[name] for scores, _ in positives]) for name, weight in weights.items()
    ]
    scores_by_teacher.append(("together", "", [together.labels(scores) for scores, _ in positives]))
    for name, weight, scores in scores_by_teacher:
        ranks = [_rank(positive, values) for (_, positive), values in zip(positives, scores, strict=True)]
        first = sum(rank == 1 for rank in ranks) / len(ranks)
        reciprocal = sum(1 / rank for rank in ranks) / len(ranks)
        lines.append(f"| {escape(name)} | {weight} | {first:.0%} | {reciprocal:.2f} |")
    return "\n".join(lines)


def _rank(index: int, scores: Sequence[float]) -> int:
    """Rank of a score, from 1; the last of equal scores."""
    return sum(score >= scores[index] for score in scores)


def _examples_section(queries: Sequence[QueryRow], seed: int) -> str:
    chosen = random.Random(f"{seed}/examples").sample(list(queries), min(_EXAMPLES, len(queries)))
    lines = ["## Examples of queries", "", "| query | language | style | written by | document |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for query in chosen:
        origin = query["metadata"]
        cells = [query["text"][:_EXAMPLE_CHARS], *(origin[name] for name in _ORIGIN)]
        lines.append(f"| {' | '.join(map(escape, cells))} |")
    return "\n".join(lines)


def plot_queries(queries: Sequence[QueryRow], path: Path) -> None:
    """Plot the number of queries by language, stacked by style.

    Args:
        queries: Rows of `data/queries.jsonl`.
        path: PNG file to write.
    """
    counts = Counter((query["metadata"]["language"], query["metadata"]["style"]) for query in queries)
    languages = [name for name, _ in Counter(query["metadata"]["language"] for query in queries).most_common()]
    shown = languages[:_LANGUAGES_SHOWN][::-1]
    figure = new_plot(7, 1.2 + 0.35 * len(shown))
    axes, left = figure.subplots(), np.zeros(len(shown))
    for style in sorted({style for _, style in counts}):
        values = np.array([counts[language, style] for language in shown])  # (languages,)
        axes.barh(shown, values, left=left, label=style)
        left += values
    hidden = f" ({len(languages) - len(shown)} more languages)" if len(languages) > len(shown) else ""
    axes.set_title(f"queries by language and style{hidden}", loc="left", fontsize=10)
    axes.legend(fontsize=8)
    save_plot(figure, path)


def plot_dropped(dropped: Mapping[str, int], path: Path) -> None:
    """Plot the number of dropped queries by reason.

    Args:
        dropped: Reason -> number.
        path: PNG file to write.
    """
    reasons = sorted(dropped, key=lambda reason: dropped[reason]) or ["nothing"]
    figure = new_plot(7, 1.2 + 0.35 * len(reasons))
    axes = figure.subplots()
    bars = axes.barh(reasons, [dropped.get(reason, 0) for reason in reasons], color="tab:red")
    axes.bar_label(bars, padding=3, fontsize=8)
    axes.set_title("queries dropped, by reason", loc="left", fontsize=10)
    save_plot(figure, path)


def plot_scores(rows: Sequence[ScoredRow], path: Path) -> None:
    """Plot the distribution of each teacher's scores, for the document that a query was written for and for the others.

    Args:
        rows: Training rows with `scores`, and the index of that document as `positive`.
        path: PNG file to write.
    """
    names = sorted(rows[0]["scores"])
    figure = new_plot(7, 2.2 * len(names))
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        groups: dict[str, list[float]] = {"source document": [], "other candidates": []}
        for row in rows:
            for index, score in enumerate(row["scores"][name]):
                groups["source document" if index == row["positive"] else "other candidates"].append(score)
        scores = [score for group in groups.values() for score in group]
        bins = np.linspace(min(scores), max(scores) or 1, _BINS + 1)
        for label, group in groups.items():
            if group and bins[0] < bins[-1]:
                axes.hist(group, bins=bins, density=True, alpha=0.6, label=label)
        axes.set_title(f"scores of {name}", loc="left", fontsize=10)
        axes.legend(fontsize=8)
    save_plot(figure, path)
