"""First stages, generators and teachers from settings."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..retrieval.dense import PACKAGES
from ..retrieval.runs import is_run
from .candidates import BM25_NAME, FirstStage
from .corpus import Document
from .extractive import ExtractiveGenerator
from .generators import EndpointGenerator, Generator, TransformersGenerator
from .queries import check_styles
from .settings import ENDPOINT, EXTRACTIVE, AdaptSettings, CandidateSettings, TeacherSettings, told
from .teachers import CausalLMTeacher, CrossEncoderTeacher, EndpointTeacher, FirstStageTeacher, Teacher

GENERATORS = {"transformers": TransformersGenerator, ENDPOINT: EndpointGenerator}
TEACHERS = {"cross-encoder": CrossEncoderTeacher, "causal-lm": CausalLMTeacher, ENDPOINT: EndpointTeacher}
FIRST_STAGE = "first-stage"


def make_first_stages(
    settings: CandidateSettings, documents: Mapping[str, Document], folder: Path
) -> dict[str, FirstStage]:
    """The indexes that candidates are found with, by name; embeddings are kept in `folder`."""
    options = {"folder": folder, "factory": settings.index, "batch_size": settings.batch_size}
    return {name: FirstStage(name, documents, **options) for name in settings.first_stages if not is_run(name)}


def make_generators(
    settings: Mapping[str, Mapping[str, Any]], extractive: ExtractiveGenerator | None
) -> dict[str, Generator]:
    """Writers of queries, by name.

    Raises:
        ValueError: if a type or an option is unknown.
    """
    found: dict[str, Generator] = {}
    for name, given in settings.items():
        options = dict(given)
        kind = options.pop("type", name)
        if kind == EXTRACTIVE:
            if options:
                raise ValueError(
                    f"queries.generators.{name}: {EXTRACTIVE} has no option {next(iter(options))!r}: leave it out."
                )
            found[name] = extractive
        else:
            found[name] = _make(GENERATORS, kind, options, f"queries.generators.{name}", [EXTRACTIVE])
    return found


def make_teachers(
    settings: Mapping[str, TeacherSettings],
    candidates: CandidateSettings,
    first_stages: Mapping[str, FirstStage],
    documents: Mapping[str, Document],
    folder: Path,
) -> dict[str, Teacher]:
    """Teachers, by name; first stages that are one are used as they are, and made as they are if they are not.

    Raises:
        ValueError: if a type or an option is unknown.
    """
    found: dict[str, Teacher] = {}
    for name, given in settings.items():
        options = dict(given.model_extra or {})
        kind = _kind_of(name, given, first_stages)
        if kind == FIRST_STAGE:
            model = options.pop("model", name)
            made = (
                first_stages
                if model in first_stages
                else make_first_stages(candidates.model_copy(update={"first_stages": [model]}), documents, folder)
            )
            stage = made[model]
            found[name] = _make({FIRST_STAGE: FirstStageTeacher}, kind, {"stage": stage, **options}, f"teachers.{name}")
        else:
            found[name] = _make(TEACHERS, kind, options, f"teachers.{name}", [FIRST_STAGE])
    return found


def check_options(settings: AdaptSettings) -> None:
    """Make the generators and teachers that need no documents, which loads nothing yet, to find mistakes early.

    Raises:
        ValueError: if a type or an option is unknown, or out of range.
    """
    check_styles(settings.queries.styles, settings.queries.per_document)
    make_generators(settings.queries.generators, None)
    known = settings.candidates.first_stages
    rerankers = {name: each for name, each in settings.teachers.items() if _kind_of(name, each, known) != FIRST_STAGE}
    make_teachers(rerankers, settings.candidates, {}, {}, Path())


def _kind_of(name: str, given: TeacherSettings, first_stages: Container[str]) -> str:
    is_index = name in first_stages or name == BM25_NAME or name in PACKAGES
    return given.type or (FIRST_STAGE if is_index else name)


def _make(
    kinds: Mapping[str, Callable[..., Any]], kind: str, options: dict[str, Any], where: str, more: Sequence[str] = ()
) -> Any:
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{where}: type is {kind!r}: choose from {', '.join([*kinds, *more])}.")
    try:
        return kinds[kind](**options)
    except ValidationError as error:
        raise ValueError(f"{where}.{told(error)}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
