"""Results of a sweep: scores of its runs and of their combinations, how equal ones are decided, and the table."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bertfast.data.text_files import read_json
from bertfast.training.finetune_model import sign_of

logger = logging.getLogger("bertfast")

Quality = tuple[float, float]
"""How good a result is, more is better: its score, negative for a loss, and its negative validation loss."""


@dataclass(frozen=True)
class Score:
    """Result of a run.

    Attributes:
        metric: Metric that selects the best model.
        score: Its best value; None: the run failed.
        failed: Why it failed, and the remedy; None: it did not.
        loss: Validation loss of the best model; None: the run failed, or its task has no such loss.
    """

    metric: str
    score: float | None
    failed: str | None = None
    loss: float | None = None

    @property
    def quality(self) -> Quality:
        """The quality of a run that did not fail."""
        assert self.score is not None
        return sign_of(self.metric) * self.score, -math.inf if self.loss is None else -self.loss


@dataclass(frozen=True)
class Combination:
    """Results of one combination of hyperparameters.

    Attributes:
        learning_rate, batch_size, epochs: The hyperparameters.
        scores: Best validation score of each seed; None: that run failed.
        mean: Mean of the scores; NaN if a run failed.
        spread: Standard deviation of the scores; NaN for one seed, or if a run failed.
        failed: Why the first run failed that did; None: none did.
        trained: Fraction of their steps that the runs were trained; less than 1 by successive halving.
        loss: Mean of the validation losses; NaN if a run failed, or the task has no such loss.
    """

    learning_rate: float
    batch_size: int
    epochs: float
    scores: list[float | None]
    mean: float
    spread: float
    failed: str | None = None
    trained: float = 1.0
    loss: float = math.nan

    @classmethod
    def of(
        cls, learning_rate: float, batch_size: int, epochs: float, results: list[Score], trained: float = 1.0
    ) -> Combination:
        """Return the combination of which the runs, one for each seed, have these results."""
        failed = next((result.failed for result in results if result.failed is not None), None)
        scores = [result.score for result in results]
        known = [score for score in scores if score is not None]
        losses = [result.loss for result in results if result.loss is not None]
        mean = statistics.mean(known) if failed is None else math.nan
        spread = statistics.stdev(known) if failed is None and len(known) > 1 else math.nan
        loss = statistics.mean(losses) if len(losses) == len(results) else math.nan
        return cls(learning_rate, batch_size, epochs, scores, mean, spread, failed, trained, loss)

    def quality(self, metric: str) -> Quality:
        """Return the quality of the combination; the score is NaN if it failed.

        Args:
            metric: Metric that selects the best model.
        """
        return sign_of(metric) * self.mean, -math.inf if math.isnan(self.loss) else -self.loss


def metric_of(scores: Sequence[Score]) -> str:
    """Return the metric of runs; it is not known of those that failed early."""
    return next((score.metric for score in scores if score.metric), "")


def tie(chosen: Sequence[Quality], others: Sequence[Quality], metric: str, noun: str) -> str:
    """Return a sentence on how a choice between equal scores was made; "": there was none.

    Args:
        chosen: Qualities of what was chosen.
        others: Qualities of what was not; with a score of NaN it failed.
        metric: Name of the metric.
        noun: What the qualities are of, in the plural.
    """
    rivals = [quality for quality in others if math.isfinite(quality[0])]
    if not chosen or not rivals or min(chosen)[0] != max(rivals)[0]:
        return ""
    last, first = min(chosen), max(rivals)
    number = sum(quality[0] == last[0] for quality in (*chosen, *rivals))
    how = "the lower validation loss decides" if first[1] > -math.inf else "the order of the grid decides"
    if last[1] == first[1] > -math.inf:
        how += ", and the order of the grid where that is equal, too"
    return f"{number} {noun} have the same {metric}, {sign_of(metric) * last[0]:.4g}: {how}"


def best_of(results: Sequence[tuple[Score, str]]) -> tuple[str | None, str]:
    """Return the best run, the first of equal ones, and what is to be said of a tie.

    Args:
        results: Result of each run, with its folder, in the order of the grid.

    Returns:
        Its folder, None if all runs failed; and a sentence, or "".
    """
    judged = [(result.quality, run) for result, run in results if result.score is not None]
    if not judged:
        return None, ""
    chosen = max(judged, key=lambda pair: pair[0])
    others = [quality for quality, run in judged if run != chosen[1]]
    return chosen[1], tie([chosen[0]], others, metric_of([result for result, _ in results]), "runs")


def exactly(value: float) -> str:
    """Return a number with six digits, or with all if it has more, so that different ones have different names."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def table(metric: str, best: str | None, equal: str, combinations: list[Combination]) -> str:
    """Return the results as a Markdown table, with the reasons of failures below it.

    Args:
        metric: Metric that selects the best model.
        best: Folder of the best run; None: all failed.
        equal: What is to be said of runs that are as good.
        combinations: The combinations, best first.
    """
    halved = any(row.trained < 1 for row in combinations)
    lines = [f"| learning rate | batch | epochs | {metric}, mean | spread |" + " trained |" * halved]
    lines += ["|---|---|---|---|---|" + "---|" * halved]
    failures = []
    for row in combinations:
        spread = "" if math.isnan(row.spread) else f"{row.spread:.4f}"
        mean = f"{row.mean:.4f}" if row.failed is None else "failed"
        lines.append(
            f"| {exactly(row.learning_rate)} | {row.batch_size} | {exactly(row.epochs)} | {mean} | {spread} |"
            + f" {100 * row.trained:.3g} % |" * halved
        )
        if row.failed is not None:
            values = f"learning rate {exactly(row.learning_rate)}, batch {row.batch_size}, epochs {exactly(row.epochs)}"
            failures += ["", f"Failed: {values}: {row.failed}"]
    named = [] if best is None else ["", f"The best run is in {best}{f' ({equal})' * bool(equal)}."]
    return "\n".join([*lines, *failures, *named, ""])


def read_score(path: Path) -> Score | None:
    """Return the result of a finished run; None: there is none, or its file is damaged."""
    if not path.exists():
        return None
    try:
        saved = read_json(path)
        if saved.get("failed") is not None:
            return Score(str(saved["metric"]), None, str(saved["failed"]))
        score, loss = float(saved["score"]), saved.get("loss")
        if not math.isfinite(score):
            raise ValueError("not finite")
        return Score(str(saved["metric"]), score, loss=None if loss is None else float(loss))
    except (KeyError, TypeError, ValueError):
        logger.warning("%s is damaged: the run is repeated", path)
        return None
