"""Plots of what a task reports of its predictions, and of the curves of a fine-tuning run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bertfast.data.text_files import read_json
from bertfast.runtime.extras import install_command
from bertfast.runtime.plotting import COLORS, draw, draw_smoothed, load_pyplot, marker_of
from bertfast.training.metrics_log import Entry, read_entries

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger("bertfast")

Panel = Callable[["Axes"], None]
"""Draws on the axes of a panel."""
DrawsOne = Callable[["Axes", str, str, list[int], list[float]], None]
"""Draws the curve of a run on the axes of a panel: its name, its color, steps and values."""
PLOTS = ("curves.png", "confusion.png", "precision_recall.png")
_LABELS_SHOWN = 30  # of a confusion matrix; larger ones are not plotted


def report_file(split: str) -> str:
    """Return the name of the file with what a task reports of a split; see `Task.report`."""
    return f"report_{split}.json"


def draw_run(folder: Path, title: str, metric: str) -> None:
    """Draw the curves of a finished run, and the report of its validation.

    Args:
        folder: Output folder of the run.
        title: Title of the plots.
        metric: Metric that selects the best model.
    """
    if load_pyplot() is None:
        logger.info("No plots: they require matplotlib: %s", install_command("plots"))
        return
    if entries := read_entries(folder / "metrics.jsonl"):
        draw_curves(folder / "curves.png", title, {"": Curves(entries, f"eval_{metric}")})
    report = folder / report_file("validation")
    if report.exists():
        draw_report(read_json(report), folder, title)


class Curves(NamedTuple):
    """What is drawn of a run.

    Attributes:
        entries: Entries of its metrics.jsonl.
        metric: Entry with the metric that decides.
    """

    entries: Sequence[Entry]
    metric: str


def draw_curves(path: Path, title: str, runs: Mapping[str, Curves], *, loss: str = "loss") -> bool:
    """Draw training loss, learning rate and the deciding metric of runs over their steps.

    There is a panel for each metric that decides, and none for what no run has logged.

    Args:
        path: Image file to write.
        title: Title of the plot.
        runs: The runs, of which at least one has logged one of these, by name; "" for a single one.
        loss: Entry with the training loss.

    Returns:
        Whether matplotlib is installed; without it nothing is written.
    """
    cycle = [COLORS["bertfast"], "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan"]
    colors = {name: cycle[number % len(cycle)] for number, name in enumerate(runs)}
    panels: list[Panel] = []

    def add(draw_one: DrawsOne, key: str, label: str, names: Iterable[str]) -> None:
        points = {name: [(entry["step"], entry[key]) for entry in runs[name].entries if key in entry] for name in names}
        points = {name: of_run for name, of_run in points.items() if of_run}
        if not points:
            return

        def paint(axes: Axes) -> None:
            for name, of_run in points.items():
                draw_one(axes, name, colors[name], [step for step, _ in of_run], [value for _, value in of_run])
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[1]:
                axes.legend()

        panels.append(paint)

    add(_draw_losses, loss, "training loss", runs)
    add(_draw_line, "learning_rate", "learning rate", runs)
    for metric in dict.fromkeys(run.metric for run in runs.values()):
        shown = metric.removeprefix("eval_").removeprefix("validation_")
        decided = [name for name, run in runs.items() if run.metric == metric]
        add(_draw_points, metric, f"validation {shown}", decided)
    panels[0] = partial(_titled, panels[0], title)
    panels[-1] = partial(_below, panels[-1])
    return draw(path, (8, 2.5 * len(panels)), *panels)


def _titled(paint: Panel, title: str, axes: Axes) -> None:
    paint(axes)
    axes.set_title(title)


def _below(paint: Panel, axes: Axes) -> None:
    paint(axes)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True)


def _draw_losses(axes: Axes, name: str, color: str, steps: list[int], values: list[float]) -> None:
    draw_smoothed(axes, steps, values, name or "loss", color)


def _draw_line(axes: Axes, name: str, color: str, steps: list[int], values: list[float]) -> None:
    axes.plot(steps, values, color=color, linewidth=1, label=name or None, marker=marker_of(steps))


def _draw_points(axes: Axes, name: str, color: str, steps: list[int], values: list[float]) -> None:
    axes.plot(steps, values, color=color, linewidth=1, marker="o", label=name or None)


def draw_report(report: dict[str, Any], folder: Path, title: str) -> bool:
    """Plot the confusion matrix and the precision-recall curve of a report; return False without matplotlib."""
    drawn = True
    matrix, curve = report.get("confusion_matrix"), report.get("precision_recall")
    if matrix is not None and len(matrix["labels"]) <= _LABELS_SHOWN:
        drawn = _draw_confusion(matrix["labels"], np.array(matrix["counts"]), folder / "confusion.png", title)
    if curve is not None:
        drawn = _draw_precision_recall(curve, folder / "precision_recall.png", title)
    return drawn


def _draw_confusion(names: Sequence[str], counts: np.ndarray, path: Path, title: str) -> bool:
    """Plot a confusion matrix, coloured by the fraction of its row."""
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    side = 2.5 + 0.45 * len(names)

    def paint(axes: Axes) -> None:
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row, column in zip(*counts.nonzero(), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=color, fontsize=8)
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="predicted label", ylabel="true label")
        axes.set_title(f"Confusion matrix (numbers: counts)\n{title}", fontsize=9, wrap=True)
        bar = axes.figure.colorbar(image, ax=axes, shrink=0.8)
        bar.set_label("share of the true label's examples (row)", fontsize=8)

    return draw(path, (side + 1, side), paint)


def _draw_precision_recall(curve: dict[str, Any], path: Path, title: str) -> bool:
    def paint(axes: Axes) -> None:
        label = f"average precision {curve['average_precision']:.3f}"
        axes.plot(curve["recall"], curve["precision"], color=COLORS["bertfast"], label=label)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
        axes.set_title(f"Label {curve['label']!r} at every threshold\n{title}", fontsize=9, wrap=True)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left")

    return draw(path, (5, 4.5), paint)
