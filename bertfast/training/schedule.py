"""Learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from torch.optim import Optimizer

ScheduleName = Literal["linear", "cosine", "wsd"]
SchedulerType = Literal["linear", "cosine", "constant", "constant_with_warmup", "wsd"]
"""Schedules of fine-tuning, by transformers' names where it has them."""

LR_SCALE = "lr_scale"
"""Entry of a parameter group: factor of its learning rate."""
DECAY = 0.2  # fraction of a run in which "wsd" decays; sufficient according to Hägele et al. (2024)


def schedule(name: ScheduleName | SchedulerType, progress: float, warmup: float) -> float:
    """Return the learning rate as a fraction of its peak.

    All schedules except for constant rise linearly from 0 during the warm-up. Those that are not constant end at 0.

    Args:
        name: linear: linear decay, as in the BERT paper; cosine: decay along half a cosine wave; wsd (warm-up, stable,
            decay): constant, then linear decay in the last fifth of the run; constant: always 1; constant_with_warmup:
            1 after the warm-up.
        progress: Fraction of the run that is done.
        warmup: Fraction of the run that is warm-up.
    """
    if name == "constant":
        return 1.0
    if progress < warmup:
        return progress / warmup
    if name == "constant_with_warmup":
        return 1.0
    left = max(1 - progress, 0.0)
    share = left / max(1 - warmup, 1e-9)
    if name == "linear":
        return share
    if name == "cosine":
        return (1 - math.cos(math.pi * share)) / 2
    return min(left / DECAY, 1.0)


def set_learning_rate(optimizers: Iterable[Optimizer], rate: float) -> None:
    """Set the learning rate of every parameter group in place: it is a tensor that captured steps read.

    Args:
        optimizers: The optimizers.
        rate: Learning rate; a group multiplies it by its own `LR_SCALE`, if it has one.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"].fill_(rate * group.get(LR_SCALE, 1.0))
