"""Folders that appear only once they are complete."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..modeling_querit import QueritForSequenceRanking

# In a folder aside: whether somebody still writes to it.
_LOCK = ".lock"


def check_new(destination: str | os.PathLike) -> Path:
    """The real path of a folder that can be written, before any work is done for it.

    Raises:
        OSError: if there is something at the destination, or it cannot be written.
    """
    try:
        destination = Path(destination).resolve()
    except RuntimeError:
        raise FileExistsError(f"{destination} is a link to itself: name a new folder.") from None
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists: name a new folder.")
    if destination.is_mount():
        raise FileExistsError(f"{destination} is where a disk is mounted: name a folder in it.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(destination.parent, os.W_OK):
        raise PermissionError(f"{destination} cannot be written: no permission in {destination.parent}.")
    return destination


@contextmanager
def whole_folder(destination: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `destination` once the block has ended without an error.

    What a process that was killed has left of the same folder is removed.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}-"
    _remove_left(destination.parent, prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=destination.parent) as aside:
        folder = Path(aside) / destination.name
        # Held as long as this process lives.
        with FileLock(Path(aside) / _LOCK):
            folder.mkdir()
            yield folder
            # Takes the place of an empty folder, never of one that somebody filled meanwhile.
            folder.replace(destination)


def room_beside(folder: Path) -> Path:
    """A path for what is needed only until a `whole_folder` is complete; it goes when the folder comes."""
    return folder.with_name(f"{folder.name}-parents")


def _remove_left(parent: Path, prefix: str) -> None:
    """Remove the folders aside that no living process writes to."""
    for lock in parent.glob(f"{glob.escape(prefix)}*/{_LOCK}"):
        try:
            with FileLock(lock, timeout=0):
                pass
        except Timeout:
            continue
        shutil.rmtree(lock.parent, ignore_errors=True)


def write_whole(model: QueritForSequenceRanking, destination: Path, card: str | None = None) -> None:
    """Save a model, with its card or a stub of one, to a folder that appears only once it is complete."""
    with whole_folder(destination) as folder:
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        model.save_pretrained(folder)
