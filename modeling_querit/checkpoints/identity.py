"""Identify the model that a name stands for, by hashes of its files, or by repository and commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from transformers.utils import cached_file, extract_commit_hash

from ..files import sha256
from .adapters import ADAPTER_CONFIG, base_model_of
from .mini import BASE_NAME, BASE_PACKAGE, MINI_NAME, default_model_path

# The hashes of a folder's files by their paths (those of an adapter's base under "base"); a name and its version.
Identity = Mapping[str, object] | Sequence[str | None]
# Files that decide what a model computes.
_HASHED_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.json", "*.model", "vocab.txt", "merges.txt", "*.jinja")


def identity_of(name: str) -> Identity:
    """Identify the weights behind a name, as JSON values: equal for equal models, other after any change.

    Args:
        name: "mini", its backbone, a folder or a repository.

    Returns:
        The SHA-256 of each file of a folder by its path in it, with the identity of an adapter's base model as `base`;
        the name of a repository and its commit; the name of the mini's backbone and the version of its package.
    """
    if name == BASE_NAME:
        return [BASE_NAME, version(BASE_PACKAGE)]
    folder = default_model_path() if name == MINI_NAME else Path(name)
    if not folder.is_dir():
        return [name, extract_commit_hash(cached_file(name, "config.json"), None)]
    base = {"base": identity_of(base_model_of(folder))} if (folder / ADAPTER_CONFIG).exists() else {}
    return base | {
        str(path.relative_to(folder)): sha256(path)
        for pattern in _HASHED_FILES
        for path in sorted(folder.rglob(pattern))
    }
