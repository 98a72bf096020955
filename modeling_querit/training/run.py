"""`querit train`: from collections or rows to a trained folder, with everything needed to repeat it beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, set_seed

from ..checkpoints.loading import load_for_training
from ..modeling_querit import QueritForSequenceRanking
from ..retrieval.collection import Collection
from .data import RankingCollator, RankingDataset, Row, read_rows, write_rows
from .mining import mine_rows
from .trainer import QueritTrainer, QueritTrainingArguments

logger = logging.getLogger(__name__)

_LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class ModelArguments:
    """Which model is trained, and which of its weights."""

    model: str = field(
        default="gemma3-270m",
        metadata={
            "help": "A reranker or a plain decoder (folder or repository); 'mini': the default model; "
            "'gemma3-270m': the decoder it was trained from."
        },
    )
    lora_rank: int = field(default=0, metadata={"help": "Train adapters of this rank (LoRA); 0: all weights."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Scale of the adapters; twice the rank by default."}
    )
    lora_first_layer: int = field(
        default=0,
        metadata={"help": "Leave the layers below it as they are: nothing is computed backwards through them."},
    )


@dataclass
class DataArguments:
    """What it is trained on."""

    train: list[str] = field(
        default_factory=list,
        metadata={
            "help": "JSONL files of rows (query, documents, labels), or folders in the BEIR layout as FOLDER:SPLIT."
        },
    )
    validation: list[str] = field(default_factory=list, metadata={"help": "The same, to measure the loss on."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens a pair may have in training."})
    negatives: int = field(default=3, metadata={"help": "Of a BEIR folder: negatives a query."})
    hard_negatives: int = field(default=2, metadata={"help": "Of a BEIR folder: how many of them BM25 finds."})
    easy_first: float = field(
        default=0.0,
        metadata={
            "help": "Of BEIR folders: the share of rows, at the start, whose negatives are all drawn at random. With "
            "--train_sampling_strategy sequential the model meets them first, and learns to match topics sooner."
        },
    )
    limit: int | None = field(default=None, metadata={"help": "Of a BEIR folder: at most so many queries."})
    max_chars: int | None = field(default=None, metadata={"help": "Of a BEIR folder: leave out longer positives."})


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line or one YAML file says; see `querit train --help`."""
    parser = HfArgumentParser((ModelArguments, DataArguments, QueritTrainingArguments), prog="querit train")
    argv = list(argv or [])
    if argv and argv[0].endswith((".yaml", ".yml")):
        model_args, data_args, args = _parse_yaml(parser, argv[0], argv[1:])
    else:
        model_args, data_args, args = parser.parse_args_into_dataclasses(argv)
    train(model_args, data_args, args)


def train(model_args: ModelArguments, data_args: DataArguments, args: QueritTrainingArguments) -> None:
    """Train, then write the whole model to `output_dir`, and the adapter alone to `output_dir/adapter`.

    Beside them: `train.json` (the resolved configuration, versions of the packages, hashes of the data) and the
    rows it was trained on, `train_rows.jsonl`.
    """
    if not data_args.train:
        raise ValueError("There is nothing to train on: name files or folders with --train.")
    set_seed(args.seed)
    rows = _collect_rows(data_args.train, data_args, args.seed)
    validation = _collect_rows(data_args.validation, data_args, args.seed)
    if not rows:
        raise ValueError(f"There are no rows in {', '.join(data_args.train)}.")
    _check_labels(rows + validation, args.losses)
    model = load_for_training(model_args.model)
    # Nothing is written before everything that can be wrong has been read.
    output_dir = Path(args.output_dir)
    write_rows(rows, output_dir / "train_rows.jsonl")
    _write_record(output_dir, model_args, data_args, args)
    logger.info("Training on %d queries with %d documents.", len(rows), sum(len(row["documents"]) for row in rows))

    processor = model.processor
    trainer = QueritTrainer(
        _with_lora(model, model_args) if model_args.lora_rank else model,
        args,
        train_dataset=RankingDataset(rows),
        eval_dataset=RankingDataset(validation) if validation else None,
        data_collator=RankingCollator(processor, data_args.max_length),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_state()
    if trainer.is_world_process_zero():
        trained = trainer.accelerator.unwrap_model(trainer.model)
        if model_args.lora_rank:
            trained.save_pretrained(output_dir / "adapter")
            trained = trained.merge_and_unload()
        trained.processor = processor
        trained.save_pretrained(output_dir / "model")


def _with_lora(model: QueritForSequenceRanking, args: ModelArguments) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    depth = model.config.text_config.num_hidden_layers
    if not 0 <= args.lora_first_layer < depth:
        raise ValueError(f"lora_first_layer is {args.lora_first_layer}: the model has layers 0 to {depth - 1}.")
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha,
        target_modules=_LINEAR_LAYERS,
        layers_to_transform=list(range(args.lora_first_layer, depth)),
        modules_to_save=["score"],
    )
    return get_peft_model(model, config)


def _check_labels(rows: Sequence[Row], losses: Sequence[str]) -> None:
    """Labels a loss has no meaning for would train towards NaN, or without bound."""
    labels = [label for row in rows for label in row["labels"]]
    if "listwise_kl" in losses and min(labels) < 0:
        raise ValueError(f"listwise_kl needs labels of at least 0, but there is {min(labels)}.")
    if "pointwise_bce" in losses and not 0 <= min(labels) <= max(labels) <= 1:
        raise ValueError(
            f"pointwise_bce needs labels in [0, 1], but they go from {min(labels)} to {max(labels)}: "
            "divide grades by the highest."
        )


def _collect_rows(sources: Sequence[str], args: DataArguments, seed: int) -> list[Row]:
    """Rows of files as they stand, then those mined from collections, evenly interleaved."""
    rows: list[Row] = []
    mined: list[tuple[float, Row]] = []
    for source in sources:
        if source.endswith((".jsonl", ".json")):
            rows += read_rows(source)
            continue
        folder, _, split = source.partition(":")
        found = mine_rows(
            Collection.load(folder, split or "train"),
            negatives=args.negatives,
            hard=args.hard_negatives,
            easy_first=args.easy_first,
            limit=args.limit,
            max_chars=args.max_chars,
            seed=seed,
        )
        logger.info("%s: %d queries.", source, len(found))
        # Each collection is spread over the whole run, so that its easy rows come first and none comes in a lump.
        mined += [(number / len(found), row) for number, row in enumerate(found)]
    return rows + [row for _, row in sorted(mined, key=lambda pair: pair[0])]


def _parse_yaml(parser: HfArgumentParser, path: str, overrides: list[str]) -> tuple[Any, ...]:
    """A YAML file of the same names as the flags; flags after it win."""
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is no mapping of settings, such as 'model: mini'.")
    known = {each.name for kind in parser.dataclass_types for each in dataclasses.fields(kind)}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"{path}: {unknown[0]!r} is no setting; see querit train --help.")
    argv: list[str] = []
    for name, value in settings.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            argv += [f"--{name}", *(os.path.expanduser(str(each)) for each in values)]
    return parser.parse_args_into_dataclasses(argv + overrides)


def _write_record(output_dir: Path, *parts: Any) -> None:
    """What a run needs to be repeated: the settings that are not defaults, versions, and hashes of the data."""
    rows = output_dir / "train_rows.jsonl"
    packages = ("modeling-querit", "torch", "transformers", "peft", "accelerate", "tokenizers", "bm25s")
    record = {
        "settings": {name: value for part in parts for name, value in changed_settings(part).items()},
        "versions": {package: _version(package) for package in packages},
        "sha256": {rows.name: hashlib.sha256(rows.read_bytes()).hexdigest()},
    }
    (output_dir / "train.json").write_text(json.dumps(record, indent=2, default=str) + "\n")


def changed_settings(arguments: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from what its defaults come to."""
    required = {
        each.name: getattr(arguments, each.name) for each in dataclasses.fields(arguments) if each.name == "output_dir"
    }
    usual = type(arguments)(**required)
    return required | {
        each.name: getattr(arguments, each.name)
        for each in dataclasses.fields(arguments)
        if each.init and getattr(arguments, each.name) != getattr(usual, each.name)
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
