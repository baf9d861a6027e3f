"""Plots of the results of a processor: roofline, memory against vocabulary, where the time of a step goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.end_to_end import curve_parity, growth, long_sequences
from bench.figures import OPERATOR_NAMES, case_title, hardware, plain_ticks, plot_operators, runs_of, save
from bench.page.learning import draw_curves
from bench.page.rows import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 8.0  # inches
MARKERS = {"forward": "o", "backward": "s", "inference": "o", "training": "s"}


def plots_of(results: list[Result], folder: Path) -> list[tuple[str, str]]:
    """Return titles and paths below `folder` of the plots that exist for some results."""
    found = []
    for result in results:
        if result.name in TITLES:
            path = Path(result.file).with_suffix(".png")
            if (folder / path).is_file():
                found.append((TITLES[result.name], path.as_posix()))
    return found


def draw(results: list[Result], folder: Path) -> list[Path]:
    """Draw all plots next to their result files and return them; none if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed (pip install 'bertfast[plots]')")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for result in results:
        if plot := PLOTS.get(result.name):
            figure, axis = pyplot.subplots(figsize=(WIDTH, 4.5), layout="constrained")
            plot(axis, result)
            axis.set_title(f"{TITLES[result.name]}; {hardware(result.origin)}", fontsize="medium", loc="left")
            written.append((folder / result.file).with_suffix(".png"))
            save(figure, written[-1], [result.values])
        if own := DRAWN_BY_PROGRAMS.get(result.name):
            own(folder / result.file)
            written.append((folder / result.file).with_suffix(".png"))
        if result.name == "cpu_operators":
            written += plot_operators([result.values], (folder / result.file).parent)
    return written + draw_curves(results, folder)


def roofline(axis: Axes, result: Result) -> None:
    """Draw FLOP/s against FLOPs per byte of bertfast's fp32 kernels with matmuls, below both ceilings."""
    import numpy as np

    runs = [run for run in runs_of([result.values]) if run["flops"] and run["case"].endswith("-fp32")]
    runs = [run for run in runs if run["implementation"] == "bertfast"]
    peak = result.values["throughput_gflops"]["gemm fp32"]
    bandwidth = max((run["bytes"] / run["copy_s"] / 1e9 for run in runs), default=1.0)
    x = np.geomspace(1, 2000, 200)
    axis.plot(x, np.minimum(peak, bandwidth * x), color="tab:gray", label="GEMM throughput, copy bandwidth")
    for index, operation in enumerate(dict.fromkeys(run["operation"] for run in runs)):
        for run in runs:
            if run["operation"] == operation:
                intensity, rate = run["flops"] / run["bytes"], run["flops"] / run["median_s"] / 1e9
                marker = MARKERS.get(run["direction"], "o")
                axis.plot(intensity, rate, marker, color=f"C{index}", label=f"{operation}, {run['direction']}")
    axis.set_xscale("log")
    axis.set_yscale("log")
    plain_ticks(axis.xaxis)
    plain_ticks(axis.yaxis)
    axis.set_xlabel("FLOPs per byte to and from memory")
    axis.set_ylabel("GFLOP/s")
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))  # one entry per label
    axis.legend(handles.values(), handles.keys(), fontsize="small")
    axis.grid(alpha=0.3)


def vocabulary(axis: Axes, result: Result) -> None:
    """Draw the peak memory of the loss against the size of the vocabulary."""
    points = [point for point in result.values["points"] if "peak_bytes" in point]
    for index, name in enumerate(dict.fromkeys(point["implementation"] for point in points)):
        own = [point for point in points if point["implementation"] == name]
        x, y = ([point[key] for point in own] for key in ("vocab_size", "peak_bytes"))
        axis.plot(x, [value / 1e6 for value in y], "o-", label=OPERATOR_NAMES.get(name, name), color=f"C{index}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    plain_ticks(axis.yaxis)
    axis.set_xticks(*label_all(points, "vocab_size"))
    axis.set_xlabel("vocabulary")
    axis.set_ylabel("peak memory of loss and gradients (MB)")
    axis.legend()
    axis.grid(alpha=0.3)


def label_all(points: list[dict[str, Any]], key: str) -> tuple[list[int], list[str]]:
    """Return the sizes that were measured, and their labels."""
    sizes = sorted({point[key] for point in points})
    return sizes, [f"{size:,}" for size in sizes]


def step_parts(axis: Axes, result: Result) -> None:
    """Draw the time of a step as a stacked bar per system."""
    seconds = result.values["seconds"]
    left = dict.fromkeys(seconds, 0.0)
    for index, group in enumerate(next(iter(seconds.values()))):
        widths = [groups[group] for groups in seconds.values()]
        axis.barh(list(seconds), widths, left=list(left.values()), label=group, color=f"C{index}")
        left = {name: left[name] + width for name, width in zip(seconds, widths, strict=True)}
    axis.invert_yaxis()
    for index, total in enumerate(left.values()):
        axis.text(total, index, f" {total:.2f} s", va="center")
    axis.set_xlim(0, 1.1 * max(left.values()))
    axis.set_xlabel(f"time (s) of a pre-training step of {case_title(result.values)}")
    axis.legend(ncols=2, fontsize="small")
    axis.spines[["top", "right"]].set_visible(False)


PLOTS: dict[str, Callable[[Axes, Result], None]] = {
    "cpu_operators": roofline,
    "vocabulary": vocabulary,
    "step_parts": step_parts,
}
DRAWN_BY_PROGRAMS: dict[str, Callable[[Path], None]] = {
    "curve_parity": curve_parity.plot,
    "growth": growth.plot,
    "long_sequences": long_sequences.plot,
}
TITLES = {
    "cpu_operators": "Roofline of operators with matmuls, fp32",
    "vocabulary": "Memory of the masked-LM loss",
    "step_parts": "Where the time of a pre-training step goes",
    "growth": "Cost of a layer against length and batch",
    "long_sequences": "Time and memory of ModernBERT from 1,024 to 8,192 tokens",
}
