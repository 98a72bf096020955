"""What the result of a stage depends on, as a hash: settings, files and models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoints.mini import MINI_NAME
from ..files import sha256
from ..retrieval.dense import PACKAGES
from ..retrieval.runs import is_run
from ..training.distillation import TEACHERS_FILE
from .settings import ENDPOINT, AdaptSettings
from .shards import key_of
from .weights import identity_of


def fingerprint_of(settings: AdaptSettings, stage: str, sections: Sequence[str], reads: Sequence[Path]) -> str:
    """Of the settings of a stage, of the files that it reads, and of the models that it asks.

    Args:
        settings: Of the run.
        stage: Its name.
        sections: Of the settings, those that it depends on.
        reads: Files of earlier stages.
    """
    given = settings.model_dump(mode="json", include=set(sections))
    hashes = [sha256(path) for path in (*reads, *_files_of(settings, stage))]
    return key_of(given, settings.seed, hashes, identities_of(models_of(settings, sections))).hex()


def _files_of(settings: AdaptSettings, name: str) -> list[Path]:
    """Files of the user's that a stage reads."""
    if name == "corpus":
        found = [path for each in settings.corpus.source for path in _files_of_source(each)]
    elif name == "queries":
        found = [settings.queries.examples] if settings.queries.examples else []
    elif name == "candidates":
        found = [Path(each) for each in settings.candidates.first_stages if is_run(each)]
    elif name == "report":
        run = settings.output_dir / "train"
        judged = [Path(source.partition(":")[0]) for source in settings.evaluation]
        found = [run / TEACHERS_FILE, *sorted((run / "model").glob("*.safetensors"))]
        found += [path for folder in judged for path in sorted(folder.rglob("*")) if path.is_file()]
    else:
        found = []
    return [path for path in found if path.exists()]


def _files_of_source(source: str) -> list[Path]:
    path, dataset = Path(source), Path(source.partition(":")[0])
    if path.is_dir() and (found := sorted(path.glob("corpus.jsonl*"))):
        return found
    # A dataset that is a folder is read whole.
    return sorted(each for each in dataset.rglob("*") if each.is_file()) if dataset.is_dir() else [path]


def models_of(settings: AdaptSettings, sections: Sequence[str]) -> list[str]:
    """Names of the models that sections ask for; none of those that a server has."""
    found = [name for name in settings.candidates.first_stages if not is_run(name)] if "candidates" in sections else []
    if "queries" in sections:
        asked = settings.queries.generators.items()
        found += [each.get("model", "") for name, each in asked if each.get("type", name) != ENDPOINT]
    if "teachers" in sections:
        asked = settings.teachers.items()
        found += [
            (each.model_extra or {}).get("model", name) for name, each in asked if (each.type or name) != ENDPOINT
        ]
    if "train" in sections:
        found.append(settings.train.get("model", MINI_NAME))
    return found


def identities_of(names: Iterable[str]) -> dict[str, Any]:
    """What tells apart models that may change under their names: those in folders, and in packages."""
    found = {name: version(PACKAGES[name]) for name in names if name in PACKAGES}
    return found | {name: identity_of(name) for name in names if name == MINI_NAME or (name and Path(name).is_dir())}
