"""`querit train`: from collections or rows to a trained folder, with everything needed to repeat it beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from ..files import writing_in
from ..modeling_querit import QueritForSequenceRanking
from .arguments import QueritTrainingArguments
from .checks import check_health, check_settings
from .dataset import RankingDataset
from .distillation import QueritDistillationTrainer
from .experts import ExpertLoadCallback, expert_layers, freeze
from .health import HealthCallback
from .plots import PlotCallback
from .preparation import prepare
from .record import newest_checkpoint
from .rows import Row
from .settings import DataArguments, ModelArguments, RunArguments, Settings, parse
from .trainer import QueritTrainer

if TYPE_CHECKING:
    from accelerate import Accelerator

# Those of mixtures' attention among them; routed experts and routers keep what they have.
_LINEAR_LAYERS = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
]


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line or one YAML file says; see `querit train --help`."""
    disconnect(train(*parse(argv or [])).accelerator)


def disconnect(accelerator: Accelerator) -> None:
    """End what connects processes, before the interpreter does, which may hang or crash over it.

    A model that was wrapped for several processes holds their connections, so nothing may hold the trainer.
    """
    accelerator.free_memory()
    accelerator.end_training()


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
        rows, validation = prepare(settings, output_dir)
    model = load_for_training(model_args.model)
    processor = model.processor
    trainer = _make_trainer(model, rows, validation, settings)
    checkpoint = newest_checkpoint(output_dir) if run_args.resume else args.resume_from_checkpoint
    with writing_in(output_dir):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.save_state()
        check_health(trainer)
        _save(trainer, processor, model_args, output_dir)
    return trainer


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
