"""From a published checkpoint to the one folder that every runtime loads."""

from __future__ import annotations

import os
from pathlib import Path

from .loading import load_model
from .writing import write_whole


def convert_checkpoint(source: str | os.PathLike, destination: str | os.PathLike, dtype: str = "auto") -> Path:
    """Load a checkpoint in any layout that `from_pretrained` understands, and write it as `save_pretrained` does.

    The folder is written aside and then renamed: it is whole, or not there.

    Args:
        source: Folder or repository.
        destination: A folder that does not exist yet, or is empty.
        dtype: Of the weights; "auto" keeps the checkpoint's.

    Raises:
        OSError: if there is something at the destination, it cannot be written, or there is no such source.
        ValueError: if the checkpoint lacks a weight, or its tokenizer `[CLS]`.

    Example:
        ```python
        >>> convert_checkpoint("Querit/Querit-4B", "querit-4b")
        PosixPath('querit-4b')
        ```
    """
    destination = Path(destination).absolute()
    if destination.is_file() or (destination.is_dir() and any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists: name a new folder.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(destination.parent, os.W_OK):
        raise PermissionError(f"{destination} cannot be written: no permission in {destination.parent}.")
    model = load_model(source, dtype)
    # Before anything is written: without a tokenizer the folder would serve nobody.
    _ = model.processor
    write_whole(model, destination)
    return destination
