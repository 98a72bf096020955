"""Plots without a display, by matplotlib."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_plot(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """Make an empty figure of a width and height in inches; no backend with a window is loaded.

    Args:
        width: Width in inches.
        height: Height in inches.
        layout: "constrained" for margins that matplotlib finds, which takes as long as drawing; None for those that the
            caller sets.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_plot(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, atomically, with all texts as they are: names with dollars are no formulas."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    with atomic_write(path) as temporary, rc_context({"text.parse_math": False}), warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph")
        # The labels of ticks are made only now, those of axes and legends exist already.
        for text in figure.findobj(Text):
            text.set_parse_math(False)
        figure.savefig(temporary, format="png", dpi=120)
