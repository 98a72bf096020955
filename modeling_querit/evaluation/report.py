"""What an evaluation found: `results.json`, a plot, and the rows of its table."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_json
from ..plotting import new_plot, save_plot
from .comparison import p_value
from .evaluate import FIRST_STAGE, MRR, NDCG, Evaluation

RESULTS_FILE, PLOT_FILE = "results.json", "results.png"
SCHEMA = 1


def write_report(
    evaluations: Sequence[Evaluation],
    models: Sequence[str],
    settings: Mapping[str, Any],
    main_scores: Mapping[str, Mapping[str, float]],
    folder: Path,
) -> dict[str, Any]:
    """Write `results.json` and `results.png`.

    Args:
        evaluations: Evaluations of all models, one for each collection.
        models: Names of the models.
        settings: Settings of the evaluation.
        main_scores: mteb task -> model -> main score in [0, 1].
        folder: Folder of the files.

    Returns:
        The content of `results.json`, as docs/evaluate.md describes it.
    """
    results = {
        "schema": SCHEMA,
        "settings": dict(settings),
        # What cards read: nDCG@10 x 100 of every system.
        "rows": [
            {"collection": evaluation.collection, "queries": len(evaluation.metrics[NDCG][FIRST_STAGE])}
            | {system: 100 * evaluation.mean(system) for system in evaluation.systems}
            for evaluation in evaluations
        ],
        "collections": [
            evaluation.summary() | {"differences": _differences(evaluation, models)} for evaluation in evaluations
        ],
        "means": {
            system: {
                metric: sum(evaluation.mean(system, metric) for evaluation in evaluations) / len(evaluations)
                for metric in (NDCG, MRR)
            }
            for system in evaluations[0].systems
        },
        "mteb_main_scores": {task: dict(scores) for task, scores in main_scores.items()},
    }
    write_json(results, folder / RESULTS_FILE)
    draw_results(results, folder / PLOT_FILE)
    return results


def _differences(evaluation: Evaluation, models: Sequence[str]) -> list[dict[str, Any]]:
    """Differences between models: nDCG@10 of one less that of another, with the p-value."""
    values = evaluation.metrics[NDCG]
    return [
        {
            "model": second,
            "baseline": first,
            NDCG: evaluation.mean(second) - evaluation.mean(first),
            f"{NDCG}_p_value": p_value(values[second], values[first], evaluation.seed),
        }
        for first, second in itertools.combinations(models, 2)
    ]


def table_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Format results as rows of five cells.

    Returns:
        A row with the name of each collection, and under it system, nDCG@10, its interval, p against the first stage
        and MRR@10 (values x 100); the means follow where there are several collections.
    """
    rows: list[tuple[str, ...]] = []
    for collection in results["collections"]:
        rows.append((f"{collection['collection']} ({collection['queries']} queries)", "", "", "", ""))
        for system, values in collection["systems"].items():
            low, high = values[f"{NDCG}_interval"]
            p = "" if system == FIRST_STAGE else f"{values[f'{NDCG}_p_value']:.4f}"
            interval = f"{100 * low:.2f}-{100 * high:.2f}"
            rows.append((f"  {system}", f"{100 * values[NDCG]:.2f}", interval, p, f"{100 * values[MRR]:.2f}"))
    if len(results["collections"]) > 1:
        rows.append((f"mean of {len(results['collections'])} collections", "", "", "", ""))
        for system, values in results["means"].items():
            rows.append((f"  {system}", f"{100 * values[NDCG]:.2f}", "", "", f"{100 * values[MRR]:.2f}"))
    return rows


def difference_lines(results: Mapping[str, Any]) -> list[str]:
    """Format the differences between models, and the main scores of mteb, as lines."""
    lines = [
        f"{collection['collection']}: {row['model']} against {row['baseline']}: "
        f"{100 * row[NDCG]:+.2f} nDCG@10, p {row[f'{NDCG}_p_value']:.4f}"
        for collection in results["collections"]
        for row in collection["differences"]
    ]
    for task, scores in results["mteb_main_scores"].items():
        values = ", ".join(f"{model} {100 * score:.2f}" for model, score in scores.items())
        lines.append(f"mteb's main score of {task}: {values}")
    return lines


def draw_results(results: Mapping[str, Any], path: Path) -> None:
    """Draw nDCG@10 x 100 with its intervals, a panel for each collection."""
    collections = results["collections"]
    systems = list(collections[0]["systems"])
    figure = new_plot(7, 0.6 + len(collections) * (0.5 + 0.28 * len(systems)))
    panels = figure.subplots(len(collections), squeeze=False)[:, 0]
    for axes, collection in zip(panels, collections, strict=True):
        values = [collection["systems"][system] for system in systems]
        means = [100 * value[NDCG] for value in values]
        errors = [
            [mean - 100 * value[f"{NDCG}_interval"][0] for mean, value in zip(means, values, strict=True)],
            [100 * value[f"{NDCG}_interval"][1] - mean for mean, value in zip(means, values, strict=True)],
        ]
        axes.barh(systems, means, xerr=errors, color="#4477aa", ecolor="#222222", capsize=2, height=0.7)
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_title(f"{collection['collection']}, {collection['queries']} queries", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("nDCG@10 x 100, with 95 % intervals")
    save_plot(figure, path)
