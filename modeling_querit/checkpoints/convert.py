"""From a published checkpoint to the one folder that every runtime loads."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from ..modeling_querit import QueritForSequenceRanking


def convert_checkpoint(source: str | os.PathLike, destination: str | os.PathLike, dtype: str = "auto") -> Path:
    """Load a checkpoint in any layout that `from_pretrained` understands, and write it as `save_pretrained` does.

    The folder is written aside and then renamed: it is whole, or not there.

    Args:
        source: Folder or repository.
        destination: A folder that does not exist yet, or is empty.
        dtype: Of the weights; "auto" keeps the checkpoint's.

    Raises:
        FileExistsError: if there is something at the destination.
        ValueError: if the checkpoint lacks a weight, or its tokenizer `[CLS]`.

    Example:
        ```python
        >>> convert_checkpoint("Querit/Querit-4B", "querit-4b")
        PosixPath('querit-4b')
        ```
    """
    destination = Path(destination)
    if destination.is_file() or (destination.is_dir() and any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists: name a new folder.")
    model = QueritForSequenceRanking.from_pretrained(source, dtype=dtype)
    # Before anything is written: without a tokenizer the folder would serve nobody.
    _ = model.processor
    write_whole(model, destination)
    return destination


def write_whole(model: QueritForSequenceRanking, destination: Path, card: str | None = None) -> None:
    """Save a model, with its card or a stub of one, to a folder that appears only once it is complete."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as aside:
        folder = Path(aside) / destination.name
        if card is not None:
            folder.mkdir()
            (folder / "README.md").write_text(card, encoding="utf-8")
        model.save_pretrained(folder)
        if destination.is_dir():
            destination.rmdir()
        shutil.move(folder, destination)
