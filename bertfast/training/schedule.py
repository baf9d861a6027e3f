"""The learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from torch.optim import Optimizer

ScheduleName = Literal["linear", "cosine", "wsd"]

DECAY = 0.2  # share of a run in which "wsd" goes down, as Hägele et al. (2024) found enough


def schedule(name: ScheduleName, progress: float, warmup: float) -> float:
    """The share of the highest rate at `progress`; that and `warmup` are fractions of the run.

    All rise from 0 over the warm-up and end at 0: "linear" falls at once, as in the paper; "cosine" falls along half a
    wave; "wsd" stays, and falls linearly in the last fifth (warm-up, stable, decay).
    """
    if progress < warmup:
        return progress / warmup
    left = max(1 - progress, 0.0)
    share = left / max(1 - warmup, 1e-9)
    if name == "linear":
        return share
    if name == "cosine":
        return (1 - math.cos(math.pi * share)) / 2
    return min(left / DECAY, 1.0)


def set_learning_rate(optimizers: Iterable[Optimizer], rate: float) -> None:
    """Set the rate of every parameter group, a tensor, where it is."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"].fill_(rate)
