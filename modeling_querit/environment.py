"""Versions of packages and the git revision, for records of results."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = (
    *("modeling-querit", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors"),
    *("bm25s", "sentence-transformers"),
)


def environment() -> dict[str, Any]:
    """Return the versions of packages and the git revision, each None if unknown: `{"versions", "git_revision"}`."""
    return {"versions": {package: _version(package) for package in _PACKAGES}, "git_revision": _git_revision()}


def _git_revision() -> str | None:
    """Return the commit of the working directory, with `-dirty` if tracked files are modified; None outside of git."""
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
