"""What is checked before and after a run: settings that cannot be meant, rows that teach nothing, a ruined model."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from .arguments import QueritTrainingArguments
from .health import HealthCallback
from .rows import Row
from .settings import DataArguments, ModelArguments, RunArguments
from .sources import is_collection
from .trainer import QueritTrainer

logger = logging.getLogger(__name__)

_METRICS = ("loss", "ndcg_at_10", "mrr_at_10")


def check_settings(
    model_args: ModelArguments, data_args: DataArguments, run_args: RunArguments, args: QueritTrainingArguments
) -> None:
    """Raise for settings that cannot be meant, before anything is loaded or written."""
    if not data_args.train:
        raise ValueError("There is nothing to train on: name files or folders with --train.")
    if Path(args.output_dir).is_file():
        raise ValueError(f"output_dir {args.output_dir} is a file: name a folder.")
    for name in ("limit", "max_chars", "validation_depth"):
        if (value := getattr(data_args, name)) is not None and value < 1:
            raise ValueError(f"{name} is {value}: it has to be at least 1.")
    if args.save_only_model and (run_args.resume or args.resume_from_checkpoint):
        raise ValueError("A run with save_only_model True keeps no state of the optimizer: it cannot go on.")
    if data_args.streaming and (args.max_steps <= 0 or any(map(is_collection, data_args.train))):
        raise ValueError(
            "streaming needs --max_steps, and files of rows or datasets: a BEIR folder is mined as a whole."
        )
    _check_numbers(model_args, args)
    _check_validation(data_args, run_args, args)
    if model_args.freeze not in (None, "router", "experts"):
        raise ValueError(f"freeze is {model_args.freeze!r}: choose router or experts.")
    if model_args.bias_update_rate and model_args.lora_rank:
        raise ValueError(
            "bias_update_rate moves biases that an adapter does not hold: train all weights (lora_rank 0)."
        )


def _check_numbers(model_args: ModelArguments, args: QueritTrainingArguments) -> None:
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}: it has to be at least 1.")
    for name in ("learning_rate", "head_learning_rate"):
        rate = getattr(args, name)
        if rate is not None and not 0 <= rate < math.inf:
            raise ValueError(f"{name} is {rate}: it has to be a number, 0 or above.")
    if args.max_length is not None and args.max_length < 1:
        raise ValueError(f"max_length is {args.max_length}: a pair has at least 1 token.")
    for name in ("lora_rank", "first_layer"):
        if getattr(model_args, name) < 0:
            raise ValueError(f"{name} is {getattr(model_args, name)}: it has to be 0 or above.")


def _check_validation(data_args: DataArguments, run_args: RunArguments, args: QueritTrainingArguments) -> None:
    is_validated = bool(data_args.validation) and args.eval_strategy != "no"
    if data_args.validation and not is_validated:
        raise ValueError("validation is given, but nothing says when: add --eval_strategy steps or epoch.")
    if run_args.early_stopping_patience is not None and not (is_validated and args.metric_for_best_model):
        raise ValueError(
            "early_stopping_patience needs --validation, --eval_strategy and --metric_for_best_model ndcg_at_10."
        )
    metric = args.metric_for_best_model
    if is_validated and metric is not None and not metric.endswith(_METRICS):
        raise ValueError(f"metric_for_best_model is {metric!r}: choose {', '.join(_METRICS)}, or NAME_ before it.")


def check_metric(metric: str, validation: dict[str, list[Row]]) -> None:
    """Raise for a figure that the validation will not have."""
    metric = metric.removeprefix("eval_")
    means = {name: name for name in _METRICS}
    of = {name: list(validation) for name in means} | {
        f"{each}_{name}": [each] for each in validation for name in _METRICS
    }
    if metric not in of:
        raise ValueError(f"metric_for_best_model is {metric!r}, but what is validated is {', '.join(validation)}.")
    has_relevant = any(
        row.get("labels") is None or max(row["labels"]) > 0 for each in of[metric] for row in validation[each]
    )
    if not metric.endswith("loss") and not has_relevant:
        raise ValueError(f"metric_for_best_model is {metric!r}, but no row to validate on has a label above 0.")


def check_labels(rows: Sequence[Row], losses: Sequence[str]) -> None:
    """Labels a loss has no meaning for would train towards NaN, or without bound."""
    labels = [label for row in rows for label in row.get("labels") or []]
    if any(name.startswith("pointwise_bce") for name in losses) and labels and not 0 <= min(labels) <= max(labels) <= 1:
        raise ValueError(
            f"pointwise_bce needs labels in [0, 1], but they go from {min(labels)} to {max(labels)}: "
            "divide grades by the highest."
        )


def check_differences(rows: Sequence[Row], losses: Sequence[str]) -> None:
    """Losses of order learn nothing from a query whose documents are labelled alike."""
    if any(name.startswith("pointwise") for name in losses):
        return
    count = sum(_teaches(row) for row in rows)
    if not count:
        raise ValueError(f"No query has two different labels, so {', '.join(losses)} would learn nothing.")
    if count < len(rows):
        logger.warning(
            "%d of %d queries have no two different labels: they teach nothing.", len(rows) - count, len(rows)
        )


def _teaches(row: Row) -> bool:
    if row.get("labels") is not None:
        return len(set(row["labels"])) > 1
    return any(len(set(values) - {None}) > 1 for values in row["scores"].values() if values is not None)


def check_health(trainer: QueritTrainer) -> None:
    """Raise for a run that collapsed: what it made is no model to publish. Its checkpoints stay."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, HealthCallback) and callback.diagnosis:
            raise ValueError(f"{callback.diagnosis} No model was written.")
    if trainer.is_fsdp_enabled:
        # No process has the whole of any weight.
        return
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise ValueError(f"{name} is not finite after training: no model was written. Lower learning_rate.")
