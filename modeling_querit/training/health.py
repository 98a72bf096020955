"""Health of a training run: a callback that watches what is logged, and stops a run that has collapsed."""

from __future__ import annotations

import logging
import math
import statistics
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

# With fewer, nobody knows what is usual.
_NORMS_TO_JUDGE_BY = 10


@dataclass
class Limits:
    """What counts as ill.

    Args:
        saturated: Share of scores beyond 0.99, from which on the bounded score has next to no gradient.
        spread: Standard deviation of a query's scores below which all documents score alike.
        grad_norm: Gradient norm relative to the median of the run so far.
        patience: Logs in a row after which the run is stopped; a NaN stops it at once.
        warmup_steps: Steps that are not judged: a head that starts at zero scores everything alike at first.
    """

    saturated: float = 0.9
    spread: float = 1e-3
    grad_norm: float = 100.0
    patience: int = 5
    warmup_steps: int = 200


class HealthCallback(TrainerCallback):
    """Stops a run whose loss or gradients are NaN, whose scores are saturated or all alike, or which explodes.

    It reads what `QueritTrainer` logs (`loss`, `grad_norm`, `score_spread`, `score_saturated`), so it looks as often as
    `logging_steps` says. Why it stopped a run, and what to change, is in `diagnosis` and in the log.

    Args:
        limits: What counts as ill.

    Example:
        ```python
        >>> health = HealthCallback()
        >>> QueritTrainer(model, args, train_dataset=rows, callbacks=[health]).train()
        >>> health.diagnosis
        ```
    """

    def __init__(self, limits: Limits | None = None):
        self.limits = limits or Limits()
        self.diagnosis: str | None = None
        # How many logs in a row have shown each symptom.
        self._ill: dict[str, int] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at one log of training."""
        if not logs or "loss" not in logs or self.diagnosis:
            return
        symptoms = self._symptoms(logs, state)
        self._ill = {name: self._ill.get(name, 0) + 1 for name in symptoms}
        for name, advice in symptoms.items():
            if name == "nan" or self._ill[name] >= self.limits.patience:
                self.diagnosis = (
                    f"Stopped at step {state.global_step}. {advice} lower learning_rate, or a longer warmup."
                )
                logger.error(self.diagnosis)
                control.should_training_stop = True
                return

    def _symptoms(self, logs: dict[str, Any], state: TrainerState) -> dict[str, str]:
        """What is wrong, by name, and what to do about it."""
        found = {}
        if not all(math.isfinite(logs.get(name, 0.0)) for name in ("loss", "grad_norm")):
            found["nan"] = "Loss or gradients are not finite: use bf16 or float32 if this is fp16, and a"
        # The newest entry of the history is this log.
        norms = [each["grad_norm"] for each in state.log_history[:-1] if "grad_norm" in each]
        usual = statistics.median(norms) if len(norms) >= _NORMS_TO_JUDGE_BY else math.inf
        if logs.get("grad_norm", 0.0) > self.limits.grad_norm * usual:
            found["grad_norm"] = (
                f"The gradient norm is {logs['grad_norm']:.3g}, where {usual:.3g} was usual: set max_grad_norm, and a"
            )
        if state.global_step <= self.limits.warmup_steps:
            return found
        saturated, spread = logs.get("score_saturated", 0.0), logs.get("score_spread", math.inf)
        if saturated > self.limits.saturated:
            found["saturated"] = (
                f"{saturated:.0%} of the scores are beyond 0.99, where the bounded score has no gradient: let the loss "
                "act on the logit (losses: NAME:logit), start the head at zero (from_backbone does), and take a"
            )
        elif spread < self.limits.spread:
            found["spread"] = (
                f"The scores of a query differ by {spread:.2g} only: the model says nothing of order. Let the loss act "
                "on the logit (losses: NAME:logit), begin with easier negatives (easy_first), and take a"
            )
        return found
