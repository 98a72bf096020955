"""What has been done in a run's folder, from what, and with what result: `manifest.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..environment import environment
from ..files import sha256, write_json

MANIFEST_FILE = "manifest.json"


class Manifest:
    """The stages that have ended, with the hashes of what they wrote.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / MANIFEST_FILE

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """By name: `fingerprint`, `sha256` by file, `counts`, `seconds`."""
        return self._read().get("stages", {})

    def done(self, stage: str, fingerprint: str) -> dict[str, Any] | None:
        """The counts of a stage that has ended, if it would do the same again and its files are as it wrote them."""
        found = self.stages.get(stage)
        if not isinstance(found, dict) or found.get("fingerprint") != fingerprint:
            return None
        files = {self.folder / name: digest for name, digest in found["sha256"].items()}
        is_whole = all(path.exists() and sha256(path) == digest for path, digest in files.items())
        return found["counts"] if is_whole else None

    def record(
        self,
        stage: str,
        fingerprint: str,
        written: Iterable[Path],
        counts: dict[str, Any],
        seconds: float,
        settings: dict[str, Any],
    ) -> None:
        """Write down that a stage has ended.

        Args:
            stage: Its name.
            fingerprint: Of its settings and of what it read.
            written: The files it wrote.
            counts: What it tells of itself.
            seconds: How long it took.
            settings: Of the run.
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
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict) or not isinstance(found.get("stages", {}), dict):
            raise ValueError(f"{self.path} is damaged: remove it, and all stages are done again, from what is cached.")
        return found


def in_words(counts: Mapping[str, Any]) -> str:
    """Counts in a line.

    Example:
        ```python
        >>> in_words({"queries": 1200, "dropped": {"short": 3}})
        'queries 1,200, dropped (short 3)'
        ```
    """
    parts = []
    for name, value in counts.items():
        if isinstance(value, Mapping):
            parts += [f"{name} ({inner})"] if (inner := in_words(value)) else []
        else:
            parts.append(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}".strip())
    return ", ".join(parts)
