"""Which model a name stands for: hashes for records, and names without paths for whoever reads them elsewhere."""

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
# `querit train` names all its results like this.
_UNINFORMATIVE_NAMES = ("model", "adapter")


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


def public_names(names: Sequence[str]) -> list[str]:
    """Shorten the paths of folders to their ends, as far as they differ; the names of repositories stay as they are.

    Args:
        names: Names of folders and repositories.

    Returns:
        The names in the same order; an end of several parts begins with `./`.

    Example:
        ```python
        >>> public_names(["/data/law", "/data/runs/tax/model", "me/reranker"])
        ['law', './tax/model', 'me/reranker']
        ```
    """
    folders = [Path(name).resolve() if Path(name).is_dir() else None for name in names]
    return [
        name if folder is None else _shortest_end(folder, {other for other in folders if other and other != folder})
        for name, folder in zip(names, folders, strict=True)
    ]


def _shortest_end(folder: Path, others: set[Path]) -> str:
    length = 2 if folder.name in _UNINFORMATIVE_NAMES else 1
    while length < len(folder.parts) and any(other.parts[-length:] == folder.parts[-length:] for other in others):
        length += 1
    end = "/".join(part for part in folder.parts[-length:] if part != folder.anchor)
    return end if length == 1 and end not in ("", MINI_NAME) else f"./{end}"
