"""What a result was made with, so that it can be made again."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = (
    *("modeling-querit", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors"),
    *("bm25s", "sentence-transformers"),
)


def environment() -> dict[str, Any]:
    """Versions of packages, and the git revision."""
    return {"versions": {package: _version(package) for package in _PACKAGES}, "git_revision": _git_revision()}


def _git_revision() -> str | None:
    """Of the working directory, marked if files differ from it; None outside of git."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
