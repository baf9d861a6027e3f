"""Successive halving (Jamieson and Talwalkar, 2016): of the runs of a sweep, only the better half goes on, repeatedly.

A run is paused at a checkpoint and continues from there, with the learning rates of its full length: its result is
bitwise that of a run that was never paused.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from bertfast.data.text_files import read_json
from bertfast.runtime.signals import RunStopped
from bertfast.training.evaluate import write_results
from bertfast.training.finetune_folder import SWEEP_RUNGS
from bertfast.training.finetune_model import worst_of
from bertfast.training.finetuning import Finetuning
from bertfast.training.sweep_results import Quality

logger = logging.getLogger("bertfast")

_MOST = 3  # halvings: before an eighth of a run, its learning rate has hardly left the warm-up

_T = TypeVar("_T")


class _Paused(Exception):
    """A run has reached the step at which it is paused."""


def fractions(combinations: int) -> list[float]:
    """Return the fractions of the runs after which half of the combinations is dropped, in ascending order."""
    halvings = min(_MOST, math.ceil(math.log2(combinations)))
    return [0.5**number for number in range(halvings, 0, -1)]


def better_half(judged: Sequence[tuple[_T, Quality]]) -> list[_T]:
    """Return the better half, rounded up, in the order given, which decides between equal qualities.

    Args:
        judged: What to choose from, with its quality; a score of NaN is a failure, which is never chosen.
    """
    usable = [index for index, (_, quality) in enumerate(judged) if not math.isnan(quality[0])]
    best_first = sorted(usable, key=lambda index: judged[index][1], reverse=True)  # keeps the order of equal ones
    return [judged[index][0] for index in sorted(best_first[: math.ceil(len(judged) / 2)])]


def run_until(run: Finetuning, fraction: float) -> tuple[float, float | None] | None:
    """Train a run up to a fraction of its steps, record its score there, and leave a checkpoint.

    Returns:
        The validation score of the model at that step, and its validation loss if the task has one; None: the run has
        ended before, by early stopping.

    Raises:
        DivergedError: Losses, gradients or outputs are not finite.
        RunStopped: After Ctrl-C or SIGTERM.
    """
    last, metrics = max(1, round(fraction * run.steps)), dict[str, float]()

    def pause(step: int) -> None:
        if step >= last:
            run.read_pending()
            if (problem := run.results.fault(only_sign=False)) is not None:
                raise run.diverged(problem)
            metrics.update(run.predict("validation")[1])
            result = {"score": metrics.get(f"eval_{run.metric}"), "loss": metrics.get("eval_loss")}  # None: undefined
            # Recorded before the checkpoint: a run without a record is one that has not passed this step.
            known = _recorded(run.folder) | {"metric": run.metric, str(fraction): result}
            write_results(run.folder / SWEEP_RUNGS, known)
            run.save_checkpoint()
            raise _Paused

    try:
        run.run(pause)
    except _Paused:
        if run.interrupt.requested:  # during that step
            raise RunStopped(f"stopped after step {last} of {run.steps}", run.interrupt.status) from None
        return metrics.get(f"eval_{run.metric}", worst_of(run.metric)), metrics.get("eval_loss")
    return None


def recorded_score(folder: Path, fraction: float) -> tuple[str, float, float | None] | None:
    """Return the metric, the score and the loss that `run_until` has recorded in a run's folder; None: it has not."""
    known = _recorded(folder)
    result, metric = known.get(str(fraction)), known.get("metric")
    if not isinstance(result, dict) or not isinstance(metric, str):
        return None
    score, loss = result.get("score", math.nan), result.get("loss")
    if score is None:
        return metric, worst_of(metric), loss
    if not isinstance(score, float) or not math.isfinite(score) or not isinstance(loss, float | None):
        return None
    return metric, score, loss


def _recorded(folder: Path) -> dict[str, Any]:
    path = folder / SWEEP_RUNGS
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except ValueError:
        logger.warning("%s is damaged: the run is repeated", path)
        return {}
