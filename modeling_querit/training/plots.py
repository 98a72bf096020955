"""The course of a run as a picture: loss, nDCG, and the load of experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..figures import new_figure, save_figure

PLOT_FILE = "training.png"
# Title of a panel, and the keys it shows: those that begin so.
_PANELS = {
    "loss": ("loss", "eval_loss"),
    "nDCG@10": ("eval_ndcg_at_10", "eval_*_ndcg_at_10"),
    "scores": ("score_spread", "score_saturated"),
    "gradient norm": ("grad_norm",),
    "expert load": ("expert_load_max", "expert_load_entropy", "expert_dead"),
}


def draw_run(history: Sequence[dict[str, Any]], path: str | Path) -> bool:
    """Draw what a run has logged, one panel a quantity; returns whether there was anything to draw.

    Args:
        history: `trainer.state.log_history`.
        path: A PNG file; it appears once it is complete.
    """
    panels = {title: lines for title, keys in _PANELS.items() if (lines := _lines(history, keys))}
    if not panels:
        return False
    figure = new_figure(7, 2.6 * len(panels))
    for axes, (title, lines) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for name, points in lines.items():
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, label=name, marker="o" if len(points) < 30 else None, markersize=3)
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    axes.set_xlabel("step")
    save_figure(figure, path)
    return True


def _lines(history: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            if any(_matches(name, key) for key in keys):
                found.setdefault(name, []).append((entry["step"], value))
    return found


def _matches(name: str, key: str) -> bool:
    start, star, end = key.partition("*")
    return name == key or (bool(star) and name.startswith(start) and name.endswith(end) and len(name) > len(key))


class PlotCallback(TrainerCallback):
    """Draws the run so far into `output_dir/training.png`, whenever a checkpoint is written and at the end."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw."""
        if state.is_world_process_zero:
            draw_run(state.log_history, Path(args.output_dir) / PLOT_FILE)

    on_train_end = on_save
