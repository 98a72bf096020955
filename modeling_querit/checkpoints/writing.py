"""Folders that appear only once they are complete."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..modeling_querit import QueritForSequenceRanking


def write_whole(model: QueritForSequenceRanking, destination: Path, card: str | None = None) -> None:
    """Save a model, with its card or a stub of one, to a folder that appears only once it is complete."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as aside:
        folder = Path(aside) / destination.name
        if card is not None:
            folder.mkdir()
            (folder / "README.md").write_text(card, encoding="utf-8")
        model.save_pretrained(folder)
        # Takes the place of an empty folder, never of one that somebody filled meanwhile.
        folder.replace(destination)
