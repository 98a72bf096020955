"""`querit train`: from collections or rows to a trained folder, with everything needed to repeat it beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ..checkpoints.loading import load_for_training
from ..files import jsonl_sha256, write_json, write_jsonl
from ..modeling_querit import QueritForSequenceRanking
from .arguments import QueritTrainingArguments
from .checks import check_differences, check_health, check_labels, check_metric, check_settings
from .dataset import RankingDataset
from .distillation import QueritDistillationTrainer
from .experts import ExpertLoadCallback, expert_layers, freeze
from .health import HealthCallback
from .plots import PlotCallback
from .reading import Rejects, read_rows
from .record import RECORD_FILE, check_same_run, make_record, newest_checkpoint
from .rows import Row, has_scores
from .settings import DataArguments, ModelArguments, RunArguments, Settings, parse
from .sources import files_of, stream_rows, training_rows, validation_rows
from .trainer import QueritTrainer

logger = logging.getLogger(__name__)

ROWS_FILE = "train_rows.jsonl"
REJECTS_FILE = "rejects.jsonl"
# Of a stream, which is read again and again; the other holds what was wrong with the validation rows.
STREAM_REJECTS_FILE = "rejects_of_stream.jsonl"
# Queries of a stream that are shuffled among each other.
_SHUFFLE_BUFFER = 1000
# Those of mixtures' attention among them; routed experts and routers keep what they have.
_LINEAR_LAYERS = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
]


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line or one YAML file says; see `querit train --help`."""
    trainer = train(*parse(argv or []))
    # Processes that exit while they are still connected to each other may crash.
    trainer.accelerator.end_training()


def train(
    model_args: ModelArguments, data_args: DataArguments, run_args: RunArguments, args: QueritTrainingArguments
) -> QueritTrainer:
    """Train, then write the whole model to `output_dir/model`, and the adapter alone to `output_dir/adapter`.

    Beside them: `train.json` (settings, versions, git revision, hashes of the data), the rows it was trained on,
    `train_rows.jsonl`, those that were broken, `rejects.jsonl`, `teachers.json` of a distillation, `training.png`.
    """
    settings: Settings = (model_args, data_args, run_args, args)
    check_settings(model_args, data_args, run_args, args)
    set_seed(args.seed)
    output_dir = Path(args.output_dir)
    # The first process of all, not of each machine: the others read what it wrote, in a folder that they share.
    with args.main_process_first(local=False, desc="reading rows"):
        rows, validation = _prepare(settings, output_dir, is_main=args.process_index == 0)
    model = load_for_training(model_args.model)
    processor = model.processor
    trainer = _make_trainer(model, rows, validation, settings)
    checkpoint = newest_checkpoint(output_dir) if run_args.resume else args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_state()
    check_health(trainer)
    _save(trainer, processor, model_args, output_dir)
    return trainer


def _prepare(settings: Settings, output_dir: Path, is_main: bool) -> tuple[Any, dict[str, list[Row]]]:
    """The rows to train and validate on; the main process writes down what they are, the others read it."""
    _, data_args, run_args, args = settings
    rejects_path = output_dir / REJECTS_FILE
    if not is_main:
        rejects_path = rejects_path.with_name(f".{rejects_path.name}.{args.process_index}")
    with Rejects(rejects_path) as rejects:
        validation = {
            name: [_judged(row) for row in each]
            for name, each in validation_rows(data_args, args.seed, rejects).items()
        }
        if empty := [name for name, each in validation.items() if not each]:
            raise ValueError(f"There are no rows to validate on in {empty[0]}.")
        if validation and args.metric_for_best_model is not None:
            check_metric(args.metric_for_best_model, validation)
        if data_args.streaming:
            rows = _stream(data_args, args)
        elif is_main:
            rows = list(_of_one_kind(training_rows(data_args, args.seed, rejects), rejects))
        else:
            rows = list(read_rows(output_dir / ROWS_FILE))
    if not is_main:
        rejects_path.unlink(missing_ok=True)
        return rows, validation
    if rejects.count:
        logger.warning("%d broken rows were set aside in %s.", rejects.count, rejects.path)
    if not data_args.streaming:
        if not rows:
            raise ValueError(f"There are no rows in {', '.join(data_args.train)}.")
        check_labels(rows, args.losses)
        check_differences(rows, args.losses)
        if rows[0].get("labels") is not None and (data_args.teacher_weights or data_args.calibration != "quantile"):
            raise ValueError("teacher_weights and calibration are for rows of scores, but the first row has labels.")
    if (rows and not data_args.streaming and rows[0].get("labels") is not None) and any(
        row.get("labels") is None for each in validation.values() for row in each
    ):
        raise ValueError("A run on labels is validated on labels, but there are validation rows with scores alone.")
    # Nothing is written before everything that can be wrong has been read.
    sources = [*data_args.train, *data_args.validation]
    record = make_record(settings, [path for source in sources for path in files_of(source)], args.world_size)
    if not data_args.streaming:
        # Tables have columns, such as times, that JSON has no value for.
        record["sha256"][ROWS_FILE] = jsonl_sha256(rows, default=str)
    if newest_checkpoint(output_dir) is not None:
        if not run_args.resume and not args.resume_from_checkpoint:
            raise ValueError(
                f"{output_dir} holds checkpoints of a run: go on with --resume, or name another output_dir."
            )
        check_same_run(record, output_dir)
    elif (output_dir / "model").exists() and not run_args.resume:
        raise ValueError(f"{output_dir / 'model'} is there: name another output_dir, or remove it first.")
    if not data_args.streaming:
        write_jsonl(rows, output_dir / ROWS_FILE, default=str)
        logger.info("Training on %d queries with %d documents.", len(rows), sum(len(row["documents"]) for row in rows))
    write_json(record, output_dir / RECORD_FILE)
    return rows, validation


def _stream(data_args: DataArguments, args: QueritTrainingArguments) -> Any:
    from datasets import IterableDataset

    name = STREAM_REJECTS_FILE if args.process_index == 0 else f".{STREAM_REJECTS_FILE}.{args.process_index}"
    given = {"args": data_args, "seed": args.seed, "path": Path(args.output_dir) / name, "losses": args.losses}
    return IterableDataset.from_generator(_read_stream, gen_kwargs=given).shuffle(
        args.seed, buffer_size=_SHUFFLE_BUFFER
    )


def _read_stream(args: DataArguments, seed: int, path: Path, losses: list[str]) -> Iterator[Row]:
    """The rows again and again, without an end: a run that goes on in a later pass skips what it has seen of all."""
    is_empty = True
    with Rejects(path) as rejects:
        for row in _of_one_kind(stream_rows(args.train, args, seed, rejects), rejects):
            check_labels([row], losses)
            is_empty = False
            yield row
    if path.name != STREAM_REJECTS_FILE:
        path.unlink(missing_ok=True)
    elif rejects.count:
        logger.warning("%d broken rows were set aside in %s.", rejects.count, rejects.path)
    if is_empty:
        raise ValueError(f"There are no rows in {', '.join(args.train)}.")
    while True:
        yield from _of_one_kind(stream_rows(args.train, args, seed, Rejects(None)), Rejects(None))


def _make_trainer(
    model: QueritForSequenceRanking, rows: Any, validation: dict[str, list[Row]], settings: Settings
) -> QueritTrainer:
    model_args, data_args, run_args, args = settings
    if model_args.freeze:
        freeze(model, model_args.freeze)
    _freeze_below(model, model_args.first_layer)
    kwargs: dict[str, Any] = {
        "train_dataset": rows if data_args.streaming else RankingDataset(rows),
        "eval_dataset": {name: RankingDataset(each) for name, each in validation.items()} or None,
        "callbacks": _callbacks(model, model_args, run_args),
    }
    trained = _with_lora(model, model_args) if model_args.lora_rank else model
    first = next(iter(rows), None)
    if first is None:
        raise ValueError(f"There are no rows in {', '.join(data_args.train)}.")
    if first.get("labels") is None:
        kwargs |= {"teacher_weights": data_args.weights, "calibration": data_args.methods}
        return QueritDistillationTrainer(trained, args, **kwargs)
    return QueritTrainer(trained, args, **kwargs)


def _callbacks(
    model: QueritForSequenceRanking, model_args: ModelArguments, run_args: RunArguments
) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [PlotCallback()]
    if run_args.stop_on_collapse:
        callbacks.append(HealthCallback())
    if run_args.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(run_args.early_stopping_patience))
    if any(expert_layers(model)) or model_args.bias_update_rate:
        callbacks.append(ExpertLoadCallback(model_args.bias_update_rate))
    return callbacks


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, by the mean over collections: the figures of single ones come before it."""

    _last_step = -1

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Look at figures that the metric is among."""
        is_known = f"eval_{args.metric_for_best_model.removeprefix('eval_')}" in metrics
        # The metrics of one validation come more than once: of each collection, and all together.
        if is_known and state.global_step != self._last_step:
            self._last_step = state.global_step
            super().on_evaluate(args, state, control, metrics, **kwargs)


def _save(trainer: QueritTrainer, processor: Any, model_args: ModelArguments, output_dir: Path) -> None:
    """Write the trained model."""
    # Sharded weights are spread over processes, which all have to help to gather them.
    gathered = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        trained = trainer.accelerator.unwrap_model(trainer.model) if gathered is None else _plain(model_args, gathered)
        if model_args.lora_rank:
            trained.save_pretrained(output_dir / "adapter")
            trained = trained.merge_and_unload()
        trained.processor = processor
        trained.save_pretrained(output_dir / "model")
    trainer.accelerator.wait_for_everyone()


def _plain(model_args: ModelArguments, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The model as it was before it was sharded, with these weights."""
    model = load_for_training(model_args.model)
    model = _with_lora(model, model_args) if model_args.lora_rank else model
    model.load_state_dict(weights)
    return model


def _freeze_below(model: QueritForSequenceRanking, first_layer: int) -> None:
    """Leave the embeddings and the layers below `first_layer` out of training; 0 leaves nothing out."""
    depth = model.config.text_config.num_hidden_layers
    if not 0 <= first_layer < depth:
        raise ValueError(f"first_layer is {first_layer}: the model has layers 0 to {depth - 1}.")
    if first_layer:
        for module in (model.get_input_embeddings(), *model.model.layers[:first_layer]):
            module.requires_grad_(False)


def _with_lora(model: QueritForSequenceRanking, args: ModelArguments) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    depth = model.config.text_config.num_hidden_layers
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha,
        target_modules=_LINEAR_LAYERS,
        layers_to_transform=list(range(args.first_layer, depth)),
        modules_to_save=["score"],
    )
    adapted = get_peft_model(model, config)
    # Said by hand: a model that was made from a plain decoder has no name that peft could find.
    adapted.peft_config["default"].base_model_name_or_path = args.model
    return adapted


def _judged(row: Row) -> Row:
    """A row to validate on: by its labels, if it has any, whatever teachers said of it."""
    return row if row.get("labels") is None else {key: value for key, value in row.items() if key != "scores"}


def _of_one_kind(rows: Iterable[Row], rejects: Rejects) -> Iterator[Row]:
    """Rows with labels, or, if the first one has none, rows with scores; the others are set aside."""
    kind = None
    for number, row in enumerate(rows, start=1):
        kind = kind or ("scores" if row.get("labels") is None else "labels")
        if row.get("labels") is not None if kind == "labels" else has_scores(row):
            yield row
        else:
            message = f"Row {number} of those to train on: no {kind!r}, which the first row has; a run learns from one."
            rejects.add(ValueError(message), row)
