"""Plots, drawn if matplotlib (the extra `plots`) is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bertfast.runtime.atomic_write import atomic_path
from bertfast.runtime.settings import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"bertfast": "tab:blue", "transformers": "tab:orange"}  # in all plots


def plot_title(model: str | Path, device: torch.device, precision: str) -> str:
    """Return the title of a plot: what was run, and on what.

    Args:
        model: Folder or hub id of the model, of which the last part is shown.
        device: Device that it ran on.
        precision: Precision that it ran in, such as "fp32".
    """
    if device.type == "cuda":
        return f"{Path(model).name} ({torch.cuda.get_device_name(device)}, {precision})"
    threads = counted(torch.get_num_threads(), "thread")
    return f"{Path(model).name} ({device.type.upper()}, {threads}, {precision})"


def load_pyplot() -> Any:
    """Return matplotlib's pyplot, which draws without a window; None if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def require_png(flag: str, path: str) -> None:
    """Raise ValueError, naming a flag, unless a plot can be written to a path as PNG."""
    if Path(path).suffix != ".png" or not Path(path).parent.is_dir():
        raise ValueError(f"{flag} must be a .png file in a folder that exists, got {path}")


def smoothed(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Return the exponential moving average of values, without bias towards the first ones."""
    averages: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        averages.append(total / weight)
    return averages


def marker_of(steps: Sequence[int]) -> str:
    """Return the marker of a curve: a single point, through which there is no line, would not be seen without one."""
    return "o" if len(steps) == 1 else ""


def draw_smoothed(axes: Axes, steps: Sequence[int], values: Sequence[float], label: str, color: str) -> None:
    """Draw a noisy curve: its moving average, and the values themselves faintly."""
    axes.plot(steps, values, color=color, linewidth=1, alpha=0.25)
    average = smoothed(values)
    axes.plot(steps, average, color=color, linewidth=1.5, label=f"{label} (smoothed)", marker=marker_of(steps))


def draw(path: Path, size: tuple[float, float], *panels: Callable[[Axes], None]) -> bool:
    """Draw a plot and write it to a file.

    Args:
        path: The file; its suffix is the format.
        size: Width and height in inches.
        panels: Draw on axes, which lie one below the other and have the same x-axis.

    Returns:
        Whether matplotlib is installed; without it nothing is written.
    """
    pyplot = load_pyplot()
    if pyplot is None:
        return False
    figure, axes = pyplot.subplots(len(panels), figsize=size, layout="constrained", sharex=True, squeeze=False)
    for paint, below in zip(panels, axes[:, 0], strict=True):
        paint(below)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    return True
