"""Callbacks of a training run: health, early stopping, the plot of the run, and metrics for its log."""

from __future__ import annotations

import logging
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..plotting import new_plot, save_plot

logger = logging.getLogger(__name__)

PLOT_FILE = "training.png"

# Logged gradient norms from which on their median says what is usual.
_MIN_NORMS = 10
# Points up to which a line of the plot marks each of them.
_MAX_MARKED_POINTS = 30
# Title of a panel -> metrics that it shows; `*` stands for the name of a validation source.
_PANELS = {
    "loss": ("loss", "eval_loss"),
    "nDCG@10": ("eval_ndcg_at_10", "eval_*_ndcg_at_10"),
    "scores": ("score_spread", "score_saturated"),
    "gradient norm": ("grad_norm",),
    "expert load": ("expert_load_max", "expert_load_entropy", "expert_dead"),
}

LogEntry = Mapping[str, float]
# Title of a panel -> metric -> its (step, value) points.
Panels = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]


@dataclass
class HealthThresholds:
    """When `HealthCallback` takes a run for collapsed.

    Args:
        saturated: Largest share of scores beyond 0.99, where the bounded score has next to no gradient.
        spread: Smallest standard deviation of a query's scores; below it all documents score alike.
        grad_norm: Largest gradient norm, relative to the median of the run so far.
        patience: Logs in a row with the same symptom after which the run is stopped; a NaN stops it at once.
        warmup_steps: Steps before scores are looked at: a head that starts at zero scores everything alike at first.
    """

    saturated: float = 0.9
    spread: float = 1e-3
    grad_norm: float = 100.0
    patience: int = 5
    warmup_steps: int = 200


class HealthCallback(TrainerCallback):
    """Stops a run whose loss or gradients are NaN, whose scores are saturated or all alike, or which explodes.

    It reads what `QueritTrainer` logs (`loss`, `grad_norm`, `score_spread`, `score_saturated`), so it checks the run
    every `logging_steps`. Why it stopped a run, and what to change, is in `diagnosis` and in the log.

    Args:
        thresholds: Limits beyond which a run counts as collapsed.

    Example:
        ```python
        >>> health = HealthCallback()
        >>> QueritTrainer(model, args, train_dataset=rows, callbacks=[health]).train()
        >>> health.diagnosis
        ```
    """

    def __init__(self, thresholds: HealthThresholds | None = None):
        self.thresholds = thresholds or HealthThresholds()
        self.diagnosis: str | None = None
        # Symptom -> logs in a row that have shown it.
        self._streaks: dict[str, int] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look for symptoms in a log of training."""
        if not logs or "loss" not in logs or self.diagnosis:
            return
        symptoms = self._symptoms(logs, state)
        self._streaks = {name: self._streaks.get(name, 0) + 1 for name in symptoms}
        for name, advice in symptoms.items():
            if name == "nan" or self._streaks[name] >= self.thresholds.patience:
                self.diagnosis = (
                    f"Stopped at step {state.global_step}. {advice} lower learning_rate, or a longer warmup."
                )
                logger.error(self.diagnosis)
                control.should_training_stop = True
                return

    def _symptoms(self, logs: LogEntry, state: TrainerState) -> dict[str, str]:
        """Find symptoms, by name, with advice that ends in "a", for `on_log` to complete."""
        symptoms = {}
        if not all(math.isfinite(logs.get(name, 0.0)) for name in ("loss", "grad_norm")):
            symptoms["nan"] = "Loss or gradients are not finite: use bf16 or float32 if this is fp16, and a"
        # The last entry of the history is this log.
        norms = [entry["grad_norm"] for entry in state.log_history[:-1] if "grad_norm" in entry]
        usual_norm = statistics.median(norms) if len(norms) >= _MIN_NORMS else math.inf
        if logs.get("grad_norm", 0.0) > self.thresholds.grad_norm * usual_norm:
            symptoms["grad_norm"] = (
                f"The gradient norm is {logs['grad_norm']:.3g}, and was {usual_norm:.3g} in the median before: set "
                "max_grad_norm, and a"
            )
        if state.global_step > self.thresholds.warmup_steps:
            symptoms |= self._score_symptoms(logs)
        return symptoms

    def _score_symptoms(self, logs: LogEntry) -> dict[str, str]:
        saturated, spread = logs.get("score_saturated", 0.0), logs.get("score_spread", math.inf)
        if saturated > self.thresholds.saturated:
            return {
                "saturated": f"{saturated:.0%} of the scores are beyond 0.99, where the bounded score has no gradient: "
                "compute the loss on the logit (losses: NAME:logit), start the head at zero (from_backbone does), and "
                "take a"
            }
        if spread < self.thresholds.spread:
            return {
                "spread": f"The scores of a query differ by only {spread:.2g}: the model does not rank. Compute the "
                "loss on the logit (losses: NAME:logit), begin with easier negatives (easy_first), and take a"
            }
        return {}


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, by the mean over validation sources.

    The Trainer reports the metrics of each source first, and `QueritTrainer` all of them with their mean.
    """

    _last_step = -1

    def on_evaluate(  # type: ignore[override]  # as transformers' own
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Count a validation once, when the metric that decides is among those reported."""
        is_reported = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}" in metrics
        if is_reported and state.global_step != self._last_step:
            self._last_step = state.global_step
            super().on_evaluate(args, state, control, metrics, **kwargs)


class LogMetricsCallback(TrainerCallback, ABC):
    """A callback that adds metrics to each log of training.

    `QueritTrainer` asks for them. Its own `on_log` would be too late: callbacks that report the log run before it.
    """

    @abstractmethod
    def log_metrics(self) -> dict[str, float]:
        """Return the metrics over the steps since the last call, by name."""


class PlotCallback(TrainerCallback):
    """Draws the run so far into `output_dir/training.png` at each checkpoint and at the end."""

    def __init__(self) -> None:
        self._drawn: Panels = {}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw the run, in the main process, unless nothing is new since it was drawn last."""
        panels = _panels(state.log_history)
        if state.is_world_process_zero and panels != self._drawn:
            draw_run(state.log_history, Path(args.output_dir or ".") / PLOT_FILE)
            self._drawn = panels

    on_train_end = on_save


def draw_run(history: Sequence[LogEntry], path: str | Path) -> bool:
    """Draw what a run has logged, one panel for each of loss, nDCG@10, scores, gradient norm and expert load.

    Args:
        history: Logs of the run, `trainer.state.log_history`.
        path: PNG file, written atomically.

    Returns:
        Whether there was anything to draw.
    """
    panels = _panels(history)
    if not panels:
        return False
    height = 2.6 * len(panels)
    # Margins in inches: finding them by drawing would take longer than the drawing.
    plot = new_plot(7, height, layout=None)
    plot.subplots_adjust(left=0.7 / 7, right=6.8 / 7, bottom=0.5 / height, top=1 - 0.3 / height, hspace=0.15)
    for axes, (title, lines) in zip(
        plot.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels.items(), strict=True
    ):
        for name, points in lines.items():
            steps, values = zip(*points, strict=True)
            marker = "o" if len(points) < _MAX_MARKED_POINTS else None
            axes.plot(steps, values, label=name, marker=marker, markersize=3)
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    axes.set_xlabel("step")
    save_plot(plot, path)
    return True


def _panels(history: Sequence[LogEntry]) -> Panels:
    return {title: lines for title, patterns in _PANELS.items() if (lines := _lines(history, patterns))}


def _lines(history: Sequence[LogEntry], patterns: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """Collect the (step, value) points of each metric that matches a pattern."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            if any(_matches(name, pattern) for pattern in patterns):
                lines.setdefault(name, []).append((entry["step"], value))
    return lines


def _matches(name: str, pattern: str) -> bool:
    start, star, end = pattern.partition("*")
    if not star:
        return name == pattern
    return name.startswith(start) and name.endswith(end) and len(name) > len(pattern)
