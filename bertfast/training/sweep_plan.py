"""The plan of a sweep: which runs are left, and how long they will take."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from bertfast.runtime.settings import counted
from bertfast.training.finetune_settings import FinetuneSettings

logger = logging.getLogger("bertfast")


class SweepPlan:
    """The runs of a sweep, or of one rung of successive halving, that are not finished.

    Args:
        left: Settings of these runs, in order.
        total: Number of all runs.
        until: Fraction of their steps after which they are paused; 1: they are not.
        share: Fraction of their steps that they take before.
        later: Epochs that follow in later rungs.
        earlier: Plan of the rung before, whose times count as well.

    Attributes:
        seconds, epochs: Time that runs have taken so far, and their epochs.
    """

    def __init__(
        self,
        left: Sequence[FinetuneSettings],
        total: int,
        *,
        until: float = 1.0,
        share: float = 1.0,
        later: float = 0.0,
        earlier: SweepPlan | None = None,
    ):
        self.left, self.total, self.share, self.later = [*left], total, share, later
        self.seconds: float = 0.0 if earlier is None else earlier.seconds
        self.epochs: float = 0.0 if earlier is None else earlier.epochs
        finished = total - len(left)
        what = "the sweep has" if earlier is None else "the sweep goes on with"
        logger.info(
            "%s %s%s%s",
            what,
            counted(total, "run"),
            f", up to {100 * until:.3g} % of their steps" * (until < 1),
            f", {finished} of them finished" * (finished > 0),
        )

    def begin(self, run: FinetuneSettings) -> None:
        """Log which run begins, and about how long the rest will take, if a run has been timed."""
        if run not in self.left:  # its result is damaged
            self.left.insert(0, run)
        values = run.hyperparameters
        number = self.total - len(self.left) + 1
        logger.info(
            "run %d of %d: learning rate %g, batch %d, epochs %g, seed %d%s",
            number,
            self.total,
            values.learning_rate,
            values.per_device_train_batch_size,
            values.num_train_epochs,
            values.seed,
            f"; about {shown_duration(self.seconds_left)} left" if self.epochs else "",
        )

    def end(self, run: FinetuneSettings, seconds: float) -> None:
        """Count a run that has ended after so many seconds; the time of others is estimated from their epochs."""
        self.left.remove(run)
        self.seconds += seconds
        self.epochs += self.share * run.hyperparameters.num_train_epochs

    @property
    def seconds_left(self) -> float:
        """Estimated time of the runs that are left; NaN before the first has ended."""
        epochs = self.later + self.share * sum(run.hyperparameters.num_train_epochs for run in self.left)
        return self.seconds / self.epochs * epochs if self.epochs else math.nan


def shown_duration(seconds: float) -> str:
    """Return a duration in words, such as "40 s", "12 min" or "3 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
