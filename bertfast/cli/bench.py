"""`bertfast bench MODEL`: how much faster a model of one's own is than in `transformers`, on this machine and text."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tyro.conf import Positional

from bertfast.cli.compare import TextSettings, open_both, outputs
from bertfast.runtime.plotting import draw
from bertfast.runtime.precision import wait_for

TOLERANCE = 1e-3  # of outputs, beside the largest


@dataclass
class SpeedupSettings(TextSettings):
    """Which model, on which texts.

    Attributes:
        model_name_or_path: Folder or hub id of a BERT and its tokenizer.
        seconds: About how long to measure.
        picture: Where the picture goes.
    """

    model_name_or_path: Positional[str]
    seconds: float = 30.0
    picture: str = "speed.png"


def speedup(settings: SpeedupSettings) -> dict[str, float]:
    """Print and draw tokens a second of both, without and with a backward pass; returns the ratios by name.

    Both run in turn, in fp32 and with `transformers`' own choice of attention, after their outputs were compared.
    """
    both = open_both(settings.model_name_or_path, settings)
    sides = {"transformers": both.theirs, "bertfast": both.ours}
    tokens = sum(int(batch["attention_mask"].sum()) for batch in both.batches)
    rates, ratios = {}, {}
    with torch.no_grad():
        for batch in both.batches:
            for (name, ours), theirs in zip(
                outputs(both.ours, batch).items(), outputs(both.theirs, batch).values(), strict=True
            ):
                if not (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max().clamp(min=1):
                    raise ValueError(f"{name} differs from transformers', so nothing is timed: see bertfast verify")
    for what in ("inference", "forward and backward"):
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        end = time.perf_counter() + settings.seconds / 2
        while not seconds["bertfast"] or time.perf_counter() < end:
            for name, model in sides.items():
                seconds[name].append(_seconds(model, both.batches, what == "inference"))
        rates[what] = {name: tokens / statistics.median(samples) for name, samples in seconds.items()}
        pairs = zip(seconds["transformers"], seconds["bertfast"], strict=True)
        ratios[what] = statistics.median(theirs / ours for theirs, ours in pairs)
        shown = ", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in rates[what].items())
        print(f"{what}: {ratios[what]:.2f} x ({shown})")
    if draw(Path(settings.picture), (6, 3), partial(_paint, rates=rates, ratios=ratios)):
        print(f"{settings.picture} shows it")
    return ratios


def _seconds(model: nn.Module, batches: list[dict[str, Tensor]], inference: bool) -> float:
    wait_for(batches[0]["input_ids"].device)
    started = time.perf_counter()
    for batch in batches:
        with torch.set_grad_enabled(not inference):
            found = model(**batch)[0]
        if not inference:
            found.sum().backward()
            model.zero_grad()
    wait_for(batches[0]["input_ids"].device)
    return time.perf_counter() - started


def _paint(axes, rates: dict[str, dict[str, float]], ratios: dict[str, float]) -> None:
    for number, name in enumerate(next(iter(rates.values()))):
        heights = [own[name] for own in rates.values()]
        axes.barh([place + 0.4 * number for place in range(len(rates))], heights, 0.38, label=name)
    titles = [f"{what}\n{ratios[what]:.2f} x" for what in rates]
    axes.set_yticks([place + 0.2 for place in range(len(rates))], titles)
    axes.set_xlabel("tokens a second")
    axes.legend()
