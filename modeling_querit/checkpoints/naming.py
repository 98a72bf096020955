"""Names of models for records that leave this machine: as short as tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .mini import MINI_NAME

# What training calls its results, whatever they are results of.
_SAYS_NOTHING = ("model", "adapter")


def public_names(names: Sequence[str]) -> list[str]:
    """Folders by the end of their paths, from `./` on if that has several parts; repositories as they are.

    Args:
        names: Of folders and repositories.

    Example:
        ```python
        >>> public_names(["/data/law", "/data/runs/tax/model", "me/reranker"])
        ['law', './tax/model', 'me/reranker']
        ```
    """
    folders = [Path(name).resolve() if Path(name).is_dir() else None for name in names]
    return [
        name if folder is None else _shown(folder, {other for other in folders if other and other != folder})
        for name, folder in zip(names, folders, strict=True)
    ]


def _shown(folder: Path, others: set[Path]) -> str:
    length = 2 if folder.name in _SAYS_NOTHING else 1
    while length < len(folder.parts) and any(each.parts[-length:] == folder.parts[-length:] for each in others):
        length += 1
    shown = "/".join(part for part in folder.parts[-length:] if part != folder.anchor)
    return shown if length == 1 and shown not in ("", MINI_NAME) else f"./{shown}"
