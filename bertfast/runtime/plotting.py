"""Plots, drawn if matplotlib (the extra `plots`) is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"bertfast": "tab:blue", "transformers": "tab:orange"}  # in all plots


def draw(path: Path, size: tuple[float, float], paint: Callable[[Axes], None]) -> bool:
    """Draw a plot and write it to a file.

    Args:
        path: The file; its suffix is the format.
        size: Width and height in inches.
        paint: Draws on the axes.

    Returns:
        Whether matplotlib is installed; without it nothing is written.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    paint(axes)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
