"""Time and peak memory against a size: of a layer, of the loss, of embeddings and of ModernBERT on long sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bench.page.rows import Result, is_clearly_faster, spread_of
from bench.page.text import bound_text, duration, table

Point = dict[str, Any]
PRECISIONS = ("fp32", "bf16")
# Of files from before `bench.points.restart_peak`.
UNSEEN = (
    "\nThis file predates the lower bound. Its memory counts only what exceeds the peak reached while creating weights "
    "and inputs, so each value may be too low by up to that peak.\n"
)


@dataclass(frozen=True)
class Sweep:
    """Measured points of a result file.

    Attributes:
        title: What was measured.
        short_title: The same in a list.
        column: Heading of the sizes.
        points: By size, in ascending order, the points by implementation.
        timed: Whether time is shown; that of embeddings has rows of its own.
    """

    title: str
    short_title: str
    column: str
    points: dict[str, dict[str, Point]]
    timed: bool = True


def sweep_of(result: Result) -> Sweep | None:
    """Return the points of a result file, None if it has none."""
    values = result.values
    if result.name == "growth":
        found = [point for sweep in values["sweeps"].values() for point in sweep]
        title = f"One layer of BERT-{values['preset']}, forward and backward, fp32"
        return _sweep(title, "one layer, training", "batch", found, _batch)
    if result.name == "vocabulary":
        title = f"Masked-LM loss of {values['rows']} tokens of width {values['width']} with gradients, fp32"
        return _sweep(title, "masked-LM loss", "vocabulary", values["points"], lambda point: (point["vocab_size"],))
    if result.name == "long_sequences":
        title = (
            f"ModernBERT-{values['preset']}, inference, one sequence, five calls or as many as fit into some seconds"
        )
        return _sweep(title, "ModernBERT, one sequence", "sequence", values["points"], _precision_and_length)
    if result.name.startswith("embed") and values["memory"]:
        points = values["memory"]
        sweep = _sweep("Embeddings", "embeddings", "sentences", points, lambda point: (point["sentences"],))
        return replace(sweep, timed=False)
    return None


def _batch(point: Point) -> tuple[int, ...]:
    return point["sequences"] * point["length"], point["sequences"], point["length"]


def _precision_and_length(point: Point) -> tuple[int, ...]:
    return PRECISIONS.index(point["precision"]), point["length"]


def _label(size: tuple[int, ...]) -> str:
    """Return the name of a size: a number, a precision and a length, or a batch."""
    if len(size) == 1:
        return f"{size[0]:,}"
    return f"{PRECISIONS[size[0]]}, {size[1]:,} tokens" if len(size) == 2 else f"{size[1]} x {size[2]:,} tokens"


def _sweep(title: str, short: str, column: str, points: list[Point], size: Callable[[Point], tuple[int, ...]]) -> Sweep:
    sizes: dict[str, dict[str, Point]] = {}
    for point in sorted((point for point in points if "peak_bytes" in point), key=size):
        sizes.setdefault(_label(size(point)), {})[point["implementation"]] = point
    return Sweep(title, short, column, sizes)


def memory_table(sweep: Sweep) -> str:
    """Return the table of peak memory, and where it is measured with it, of time with its spread."""
    names = list(dict.fromkeys(name for found in sweep.points.values() for name in found))
    rows = [
        [size, *(_cell(found.get(name), sweep.timed) for name in names), _bounds(found, sweep.timed)]
        for size, found in sweep.points.items()
    ]
    shown = "median time, 20 to 80 %, peak memory" if sweep.timed else "peak memory"
    text = f"{sweep.title} ({shown}):\n\n{table([sweep.column, *names, 'lower bound'], rows)}\n"
    if sweep.timed and not any("bound_bytes" in point for found in sweep.points.values() for point in found.values()):
        text += UNSEEN
    return text


def over_time_table(result: Result) -> str:
    """Return the table of memory after few and many batches, or at few and many lines; "" for other results."""
    values = result.values
    tables: dict[str, tuple[str, str]] = {
        "bytes_after_batches": ("Resident memory of inference over batches of changing shapes", "batches"),
        "peak_bytes_by_lines": ("Peak memory of commands", "lines"),
    }
    key = next((key for key in tables if key in values), None)
    if key is None:
        return ""
    (title, unit), found = tables[key], values[key]
    counts = [f"{int(count):,} {unit}" for count in next(iter(found.values()))]
    rows = [
        [name.replace("-", ", "), *(f"{x / 2**20:,.0f} MiB" for x in memory.values())] for name, memory in found.items()
    ]
    return f"{title}, {values['size']} model:\n\n{table(['', *counts], rows)}\n"


def _cell(point: Point | None, timed: bool) -> str:
    if point is None or not timed:
        return megabytes(point) if point else ""
    samples = point.get("seconds_samples")
    spread = f" ({' to '.join(map(duration, spread_of(samples)))})" if samples and len(samples) > 1 else ""
    return f"{duration(point['seconds'])}{spread}, {megabytes(point)}"


def _bounds(found: dict[str, Point], timed: bool) -> str:
    """Return the smallest lower bounds that the processes of a size computed, "" if none did."""
    points = [point for point in found.values() if "bound_bytes" in point]
    if not points:
        return ""
    memory = f"{min(point['bound_bytes'] for point in points) / 1e6:,.0f} MB"
    if not timed:
        return memory
    fastest = min(points, key=lambda point: float(point["bound_s"]))
    return f"{bound_text(fastest['bound_s'], fastest['gemm_gflops'])}, {memory}"


def megabytes(point: Point) -> str:
    """Return the peak memory of a point."""
    return f"{point['peak_bytes'] / 1e6:,.0f} MB"


def ahead_in(sweep: Sweep) -> list[str]:
    """Return where another implementation takes less time or less memory than bertfast."""
    unit = " sentences" if sweep.column == "sentences" else ""  # other sizes have units, or are vocabularies
    lines = []
    for size, found in sweep.points.items():
        for name, point in found.items():
            fused = found.get("bertfast", point)
            if sweep.timed and _is_faster(point, fused):
                lines.append(f"{name} {duration(point['seconds'])} vs {duration(fused['seconds'])} at {size}{unit}")
            if point["peak_bytes"] < fused["peak_bytes"]:
                lines.append(f"{name} {megabytes(point)} vs {megabytes(fused)} at {size}{unit}")
    return lines


def _is_faster(point: Point, fused: Point) -> bool:
    """Return whether a point took less time, by more than the spread where it was measured."""
    both = [each.get("seconds_samples") or [each["seconds"]] for each in (point, fused)]
    return is_clearly_faster(*map(spread_of, both))
