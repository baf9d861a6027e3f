"""`bertfast bench MODEL`: the speedup of a model over `transformers`, on this machine and on given text."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tyro.conf import Positional

from bertfast.cli.compare import Comparison, TextSettings, open_both, outputs
from bertfast.runtime.plotting import COLORS, draw, plot_title, require_png
from bertfast.runtime.precision import wait_for
from bertfast.runtime.settings import Positive

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOLERANCE = 1e-3  # largest difference of an output, relative to the largest absolute value (at least 1)


@dataclass(frozen=True)
class BenchSettings(TextSettings):
    """Which model to measure, on which texts.

    Attributes:
        model_name_or_path: Folder or hub id of a model and its tokenizer.
        seconds: Approximate duration of the measurement in seconds.
        plot: PNG file for the plot.
    """

    model_name_or_path: Positional[str]
    seconds: Positive = 30.0
    plot: str = "speed.png"

    def validate(self) -> None:
        require_png("--plot", self.plot)


def bench(settings: BenchSettings) -> dict[str, float]:
    """Measure, print and plot the throughput of bertfast and transformers.

    The two are measured alternately, in fp32 and with transformers' default attention implementation, once their
    outputs have been found equal.

    Returns:
        The speedup by measurement, "inference" and "forward and backward".

    Raises:
        ValueError: The outputs differ, or there is nothing to compare (see `open_both`).
    """
    both = open_both(settings.model_name_or_path, settings)
    _check_outputs(both)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in both.batches)
    rates, ratios = {}, {}
    for mode in ("inference", "forward and backward"):
        seconds = _measure(both, settings.seconds / 2, inference=mode == "inference")
        rates[mode] = {name: tokens / statistics.median(samples) for name, samples in seconds.items()}
        pairs = zip(seconds["transformers"], seconds["bertfast"], strict=True)
        ratios[mode] = statistics.median(hf / bertfast for hf, bertfast in pairs)
        shown = ", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in rates[mode].items())
        print(f"{mode}: {ratios[mode]:.2f}x ({shown})")
    title = plot_title(settings.model_name_or_path, both.batches[0]["input_ids"].device, "fp32")
    if draw(Path(settings.plot), (6, 3), partial(_plot, title=title, rates=rates, ratios=ratios)):
        print(f"plot written to {settings.plot}")
    return ratios


def _check_outputs(both: Comparison) -> None:
    """Raise ValueError if any output differs by more than TOLERANCE."""
    with torch.no_grad():
        for batch in both.batches:
            results, hf = outputs(both.bertfast, batch), outputs(both.hf, batch)
            for (name, value), hf_value in zip(results.items(), hf.values(), strict=True):
                # Not `>`: the comparison must also fail for NaN.
                if not (value - hf_value).abs().max() <= TOLERANCE * hf_value.abs().max().clamp(min=1):
                    raise ValueError(
                        f"{name} differs from transformers, so nothing is timed: run `bertfast verify` on this model"
                    )


def _measure(both: Comparison, duration: float, inference: bool) -> dict[str, list[float]]:
    """Return the seconds of each pass over all batches, by library, of passes that alternate for `duration` seconds."""
    models = {"transformers": both.hf, "bertfast": both.bertfast}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    end = time.perf_counter() + duration
    while not seconds["bertfast"] or time.perf_counter() < end:
        for name, model in models.items():
            seconds[name].append(_seconds(model, both.batches, inference))
    return seconds


def _seconds(model: nn.Module, batches: list[dict[str, Tensor]], inference: bool) -> float:
    """Return the wall time of a pass over all batches."""
    device = batches[0]["input_ids"].device
    wait_for(device)
    started = time.perf_counter()
    for batch in batches:
        with torch.set_grad_enabled(not inference):
            first_output = model(**batch)[0]
        if not inference:
            first_output.sum().backward()
            model.zero_grad()
    wait_for(device)
    return time.perf_counter() - started


def _plot(axes: Axes, title: str, rates: dict[str, dict[str, float]], ratios: dict[str, float]) -> None:
    """Draw one group of horizontal bars per measurement, one bar per library."""
    for bar, name in enumerate(next(iter(rates.values()))):
        throughputs = [of_mode[name] for of_mode in rates.values()]
        axes.barh([group + 0.4 * bar for group in range(len(rates))], throughputs, 0.38, label=name, color=COLORS[name])
    labels = [f"{mode}\n{ratios[mode]:.2f}x" for mode in rates]
    axes.set_yticks([group + 0.2 for group in range(len(rates))], labels)
    axes.set_title(title)
    axes.set_xlabel("throughput (tokens/s)")
    axes.legend()
