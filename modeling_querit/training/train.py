"""`querit train`: from sources of rows to a trained folder, with everything beside it that makes the run repeatable."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, set_seed

from ..cards import InheritedMetadata, stub_card
from ..checkpoints.checkpoint import inherited_from
from ..checkpoints.loading import check_for_training, load_for_training
from ..console import is_terminal, say
from ..files import explain_full_disk
from ..modeling_querit import QueritForSequenceRanking
from ..processing_querit import QueritProcessor
from .arguments import ModelArguments, RunArguments, TrainingSettings, parse
from .callbacks import EarlyStopping, HealthCallback, PlotCallback
from .data import Row
from .distillation import QueritDistillationTrainer
from .experts import ExpertLoadCallback, expert_layers, freeze
from .prepare import Validation, prepare
from .record import MODEL_FOLDER, newest_checkpoint
from .trainer import QueritTrainer

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import IterableDataset
    from peft import PeftModel

ADAPTER_FOLDER = "adapter"

# Also those of the attention of mixtures; routed experts and routers get no adapter.
_LORA_TARGETS = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
]


def main(argv: Sequence[str] | None = None) -> None:
    """Train as a command line or a YAML file says; see `querit train --help`."""
    settings = parse(argv or [])
    if not is_terminal(sys.stderr):
        # A bar redraws itself, which fills a log; without one, the trainer prints its log lines.
        settings.training_args.disable_tqdm = True
    trainer = train(settings)
    is_main, accelerator = trainer.is_world_process_zero(), trainer.accelerator
    del trainer
    disconnect(accelerator)
    if is_main:
        say(f"Wrote {Path(settings.training_args.output_dir) / MODEL_FOLDER}")


def disconnect(accelerator: Accelerator) -> None:
    """Close the connections between processes while the interpreter is whole; at its end they may hang or crash.

    A model that was wrapped for several processes holds such connections, so the trainer has to be gone by now.
    """
    accelerator.free_memory()
    accelerator.end_training()


def train(settings: TrainingSettings, callbacks: Sequence[TrainerCallback] = ()) -> QueritTrainer:
    """Train a reranker, and write the whole model to `output_dir/model`, its adapter alone to `output_dir/adapter`.

    Beside them are written: `train.json` (settings, versions, git revision, hashes of the data), `train_rows.jsonl`,
    `rejects.jsonl` (invalid rows), `teachers.json` (calibrations, in distillation) and `training.png`.

    Args:
        settings: Settings of the run.
        callbacks: More callbacks, after those that the settings ask for.

    Returns:
        The trainer, with the trained model and its log.

    Raises:
        ValueError: if rows or settings are at fault, or the run collapsed; then no model is written.

    Example:
        ```python
        >>> mapping = {"model": "mini", "train": ["rows.jsonl"], "output_dir": "runs/first"}
        >>> train(settings_from_mapping(mapping, "my settings"))
        ```
    """
    args, output_dir = settings.training_args, Path(settings.training_args.output_dir)
    check_for_training(settings.model_args.model)
    set_seed(args.seed)
    # local=False: one main process for all machines; the others read what it wrote, in a folder that they share.
    with args.main_process_first(local=False, desc="reading rows"):
        rows, validation = prepare(settings, output_dir)
    model = load_for_training(settings.model_args.model)
    processor = model.processor
    trainer = _make_trainer(model, rows, validation, settings, callbacks)
    checkpoint = newest_checkpoint(output_dir) if settings.run_args.resume else args.resume_from_checkpoint
    with explain_full_disk(output_dir):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.save_state()
        check_health(trainer)
        _save(trainer, processor, settings.model_args, output_dir)
    return trainer


def _make_trainer(
    model: QueritForSequenceRanking,
    rows: list[Row] | IterableDataset,
    validation: Validation,
    settings: TrainingSettings,
    callbacks: Sequence[TrainerCallback],
) -> QueritTrainer:
    model_args, data_args, run_args, args = settings.parts
    if model_args.freeze:
        freeze(model, model_args.freeze)
    _freeze_below(model, model_args.first_layer)
    keywords: dict[str, Any] = {
        "train_dataset": rows,
        "eval_dataset": validation or None,
        "callbacks": [*_make_callbacks(model, model_args, run_args), *callbacks],
    }
    trained = _with_lora(model, model_args) if model_args.lora_rank else model
    first_row = next(iter(rows), None)
    if first_row is None:
        raise ValueError(f"There are no rows in {', '.join(data_args.train)}.")
    if first_row.get("labels") is not None:
        return QueritTrainer(trained, args, **keywords)
    keywords |= {"teacher_weights": data_args.teacher_weights, "calibration": data_args.calibration or "quantile"}
    return QueritDistillationTrainer(trained, args, **keywords)


def _make_callbacks(
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


def check_health(trainer: QueritTrainer) -> None:
    """Check that a run did not collapse; if it did, there is no model to write, while its checkpoints stay.

    Raises:
        ValueError: if a `HealthCallback` stopped the run, or a trained weight is not finite.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, HealthCallback) and callback.diagnosis:
            raise ValueError(f"{callback.diagnosis} No model was written.")
    if trainer.is_fsdp_enabled:
        # No process holds all of any weight.
        return
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise ValueError(f"{name} is not finite after training: no model was written. Lower learning_rate.")


def _save(trainer: QueritTrainer, processor: QueritProcessor, model_args: ModelArguments, output_dir: Path) -> None:
    """Write the trained model, from the main process."""
    # Sharded weights are gathered by all processes together.
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        if weights is None:
            trained = trainer.accelerator.unwrap_model(trainer.model)
        else:
            trained = _unsharded(model_args, weights)
        if model_args.lora_rank:
            trained.save_pretrained(output_dir / ADAPTER_FOLDER)
            trained = trained.merge_and_unload()
        trained.processor = processor
        _write_inherited(model_args.model, output_dir / MODEL_FOLDER)
        trained.save_pretrained(output_dir / MODEL_FOLDER)
    trainer.accelerator.wait_for_everyone()


def _write_inherited(model: str, folder: Path) -> None:
    """Write a card and files with the licence and notices inherited from the model that was trained."""
    inherited = inherited_from(model)
    if inherited != InheritedMetadata():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(stub_card(folder.name, inherited), encoding="utf-8")
        inherited.write(folder)


def _unsharded(model_args: ModelArguments, weights: dict[str, torch.Tensor]) -> QueritForSequenceRanking | PeftModel:
    """Return the model as it was before FSDP wrapped it, with the trained weights."""
    model = load_for_training(model_args.model)
    trained = _with_lora(model, model_args) if model_args.lora_rank else model
    trained.load_state_dict(weights)
    return trained


def _freeze_below(model: QueritForSequenceRanking, first_layer: int) -> None:
    """Freeze the embeddings and the layers below `first_layer`; 0 freezes nothing."""
    depth = model.config.text_config.num_hidden_layers
    if not 0 <= first_layer < depth:
        raise ValueError(f"first_layer is {first_layer}: the model has layers 0 to {depth - 1}.")
    if first_layer:
        for module in (model.get_input_embeddings(), *model.model.layers[:first_layer]):
            module.requires_grad_(False)


def _with_lora(model: QueritForSequenceRanking, args: ModelArguments) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    depth = model.config.text_config.num_hidden_layers
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha,  # type: ignore[arg-type]
        target_modules=_LORA_TARGETS,
        layers_to_transform=list(range(args.first_layer, depth)),
        modules_to_save=["score"],
    )
    adapted = get_peft_model(model, config)
    # A model made from a plain decoder has no name of its own that peft could record.
    adapted.peft_config["default"].base_model_name_or_path = args.model
    return adapted
