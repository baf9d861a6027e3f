"""Pictures, where matplotlib (the extra `plots`) is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def draw(path: Path, size: tuple[float, float], paint: Callable) -> bool:
    """Write the picture of what `paint` does with matplotlib's axes, `size` in inches; False without matplotlib."""
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
