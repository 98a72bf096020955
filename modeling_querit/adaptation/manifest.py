"""The manifest of a run: its finished stages, with fingerprints of their inputs and hashes of their outputs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

from ..cache import key_of
from ..checkpoints.identity import identity_of
from ..checkpoints.mini import MINI_NAME
from ..environment import environment
from ..files import sha256, write_json
from ..retrieval.dense import PACKAGES
from .settings import AdaptSettings

MANIFEST_FILE = "manifest.json"

# What a stage reports: numbers, and counters of them, by name.
Counts = dict[str, Any]


class StageRecord(TypedDict):
    """A finished stage in the manifest.

    Args:
        fingerprint: Fingerprint of all that its result depends on.
        sha256: Path in the run's folder -> hash, for each file that it wrote.
        counts: Numbers that it reported.
        seconds: Wall-clock time.
    """

    fingerprint: str
    sha256: dict[str, str]
    counts: Counts
    seconds: float


class Manifest:
    """Finished stages of a run.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / MANIFEST_FILE

    @property
    def stages(self) -> dict[str, StageRecord]:
        """Stage -> record.

        Raises:
            ValueError: if the manifest is damaged.
        """
        return self._read().get("stages", {})

    def finished(self, stage: str, fingerprint: str) -> Counts | None:
        """Return the counts of a stage that finished with this fingerprint and unchanged files; None otherwise."""
        record = self.stages.get(stage)
        if not isinstance(record, dict) or record.get("fingerprint") != fingerprint:
            return None
        digests = {self.folder / name: digest for name, digest in record["sha256"].items()}
        is_unchanged = all(path.exists() and sha256(path) == digest for path, digest in digests.items())
        return record["counts"] if is_unchanged else None

    def record(
        self,
        stage: str,
        fingerprint: str,
        written: Iterable[Path],
        counts: Counts,
        seconds: float,
        settings: Mapping[str, Any],
    ) -> None:
        """Record a finished stage.

        Args:
            stage: Name of the stage.
            fingerprint: Fingerprint of all that its result depends on.
            written: Files that it wrote.
            counts: Numbers that it reported.
            seconds: Wall-clock time.
            settings: Settings of the run.
        """
        manifest = {"stages": {}} | self._read() | {"settings": settings, **environment()}
        manifest["stages"][stage] = {
            "fingerprint": fingerprint,
            "sha256": {str(path.relative_to(self.folder)): sha256(path) for path in written},
            "counts": counts,
            "seconds": round(seconds, 1),
        }
        write_json(manifest, self.path)

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            manifest = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError:
            manifest = None
        if not isinstance(manifest, dict) or not isinstance(manifest.get("stages", {}), dict):
            raise ValueError(f"{self.path} is damaged: remove it, and all stages are run again, from their caches.")
        return manifest


@dataclass(frozen=True)
class Dependencies:
    """What the result of a stage depends on, beside the seed and the files of earlier stages.

    Args:
        sections: Names of settings and sections of settings.
        models: Names of models that may change under the same name: folders, and packages.
        files: Files that the user provides; those that do not exist are left out.
        values: JSON values.
    """

    sections: tuple[str, ...]
    models: Sequence[str] = ()
    files: Sequence[Path] = ()
    values: tuple[Any, ...] = ()


def fingerprint_of(settings: AdaptSettings, inputs: Sequence[Path], dependencies: Dependencies) -> str:
    """Return the fingerprint of all that the result of a stage depends on, in hexadecimal.

    Args:
        settings: Settings of the run.
        inputs: Files of earlier stages.
        dependencies: Everything else that the result depends on.
    """
    values = settings.model_dump(mode="json", include=set(dependencies.sections))
    input_digests = [sha256(path) for path in inputs]
    file_digests = [sha256(path) for path in dependencies.files if path.exists()]
    identities = model_identities(dependencies.models)
    return key_of(values, settings.seed, input_digests, file_digests, identities, dependencies.values).hex()


def model_identities(names: Iterable[str]) -> dict[str, Any]:
    """Return the fingerprints of models in folders and in packages, by name; repositories are left out."""
    names = set(names)
    packages = {name: version(PACKAGES[name]) for name in names if name in PACKAGES}
    return packages | {name: identity_of(name) for name in names if name == MINI_NAME or Path(name).is_dir()}


def summarize(counts: Mapping[str, Any]) -> str:
    """Format counts as one line.

    Example:
        ```python
        >>> summarize({"queries": 1200, "dropped": {"short": 3}})
        'queries 1,200, dropped (short 3)'
        ```
    """
    parts = []
    for name, value in counts.items():
        if isinstance(value, Mapping):
            parts += [f"{name} ({inner})"] if (inner := summarize(value)) else []
        else:
            parts.append(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}".strip())
    return ", ".join(parts)
