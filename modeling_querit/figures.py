"""Pictures without a screen: figures made and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .files import replacing


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, which needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure as PNG; the file appears once it is complete."""
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
