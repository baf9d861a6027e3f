"""The learning rate over a run."""

from __future__ import annotations

from collections.abc import Iterable

from torch.optim import Optimizer


def linear(progress: float, warmup: float) -> float:
    """The paper's schedule: up from 0 to 1 over the first `warmup` of the run, then down to 0 at its end.

    `progress` and `warmup` are fractions of the run.
    """
    if progress < warmup:
        return progress / warmup
    return max(1 - progress, 0.0) / max(1 - warmup, 1e-9)


def set_learning_rate(optimizers: Iterable[Optimizer], rate: float) -> None:
    """Set the rate of every parameter group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
