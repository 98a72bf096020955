"""Stage 6: what a run did, as a page with pictures."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from ..files import replacing, write_json
from ..training.calibration import Teachers
from ..training.plots import PLOT_FILE
from ..training.rows import Row
from .manifest import in_words
from .measuring import evaluate
from .plots import draw_drops, draw_queries, draw_scores
from .settings import AdaptSettings

REPORT_FILE, FIGURES_FILE = "report.md", "figures.json"
_EXAMPLES, _SHOWN = 12, 160
_COLUMNS = ("first_stage", "teacher", "general", "adapted")


def write_report(
    settings: AdaptSettings,
    stages: Mapping[str, Mapping[str, Any]],
    queries: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
) -> dict[str, Any]:
    """Write `report/report.md` with its pictures, and `report/figures.json`.

    Args:
        settings: Of the run.
        stages: What the manifest says of them.
        queries: As in `data/queries.jsonl`.
        rows: As in `data/train.jsonl`.

    Returns:
        nDCG@10 x 100 before and after, in words, by collection.
    """
    folder = settings.output_dir / "report"
    draw_queries(queries, folder / "queries.png")
    draw_drops(stages["queries"]["counts"]["dropped"], folder / "drops.png")
    draw_scores(rows, folder / "scores.png")
    pictures = {"Queries": "queries.png", "Dropped": "drops.png", "Teachers": "scores.png"}
    curve = settings.output_dir / "train" / PLOT_FILE
    if curve.exists():
        shutil.copyfile(curve, folder / PLOT_FILE)
        pictures["Training"] = PLOT_FILE
    figures = [evaluate(settings, source) for source in settings.evaluation]
    write_json({"rows": figures}, folder / FIGURES_FILE)
    parts = ["# Adaptation", _figures(figures), _stages(stages), _teachers(settings, rows)]
    parts.append(_examples(queries, settings.seed))
    parts += [f"## {title}\n\n![{title}]({name})" for title, name in pictures.items()]
    with replacing(folder / REPORT_FILE) as aside:
        aside.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return {each["collection"]: f"{each['general']:.1f} -> {each['adapted']:.1f}" for each in figures}


def _figures(figures: Sequence[Mapping[str, Any]]) -> str:
    if not figures:
        return ""
    lines = [
        "nDCG@10 x 100 on judged collections, and the p-value of adapted against general (paired randomization test):",
        "",
        f"| collection | queries | {' | '.join(_COLUMNS)} | p |",
        f"| --- | ---: | {'---: | ' * len(_COLUMNS)}---: |",
    ]
    for each in figures:
        cells = " | ".join(f"{each[name]:.1f}" for name in _COLUMNS)
        lines.append(f"| {each['collection']} | {each['queries']} | {cells} | {each['p_value']:.4f} |")
    return "\n".join(lines).replace("first_stage", "first stage")


def _stages(stages: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["## Stages", "", "| stage | seconds | |", "| --- | ---: | --- |"]
    for name, each in stages.items():
        lines.append(f"| {name} | {each['seconds']:,.0f} | {in_words(each['counts'])} |")
    return "\n".join(lines)


def _teachers(settings: AdaptSettings, rows: Sequence[Row]) -> str:
    """Where teachers put the document that a query was written for: without a label, the best guess of who is right."""
    judged = [row for row in rows if row["positive"] is not None]
    if not judged:
        return ""
    weights = settings.teacher_weights
    together = Teachers.fit([row["scores"] for row in rows], weights, settings.calibrations)
    lines = [
        "## Teachers",
        "",
        "Where they put the document that a query was written for, among its candidates. One that seldom puts it first",
        "may deserve less weight; but queries that were taken from documents flatter teachers that match words.",
        "",
        "| teacher | weight | puts it first | mean reciprocal rank |",
        "| --- | ---: | ---: | ---: |",
    ]
    shown = [(name, f"{weight:g}", [row["scores"][name] for row in judged]) for name, weight in weights.items()]
    shown.append(("together", "", [together.labels(row["scores"]) for row in judged]))
    for name, weight, scores in shown:
        ranks = [_rank(row["positive"], each) for row, each in zip(judged, scores, strict=True)]
        first, reciprocal = (sum(each) / len(ranks) for each in ([rank == 1 for rank in ranks], [1 / n for n in ranks]))
        lines.append(f"| {name} | {weight} | {first:.0%} | {reciprocal:.2f} |")
    return "\n".join(lines)


def _rank(place: int, scores: Sequence[float]) -> int:
    """From 1; of equal scores, the last."""
    return sum(score >= scores[place] for score in scores)


def _examples(queries: Sequence[Mapping[str, Any]], seed: int) -> str:
    chosen = random.Random(f"{seed}/examples").sample(list(queries), min(_EXAMPLES, len(queries)))
    lines = ["## Examples of queries", "", "| query | language | style | written by | document |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for each in chosen:
        text = each["text"][:_SHOWN].replace("|", "\\|")
        kind = each["metadata"]
        lines.append(f"| {text} | {kind['language']} | {kind['style']} | {kind['generator']} | {kind['document']} |")
    return "\n".join(lines)
