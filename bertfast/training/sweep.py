"""`bertfast sweep`: fine-tune with every combination of hyperparameters and several seeds, and name the best run."""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bertfast.data.text_files import read_json
from bertfast.runtime.atomic_write import remove, write_atomically
from bertfast.runtime.malloc import is_out_of_memory
from bertfast.runtime.output_folder import Origin, check_contents, locked_folder, require_origin
from bertfast.runtime.processes import refuse_several
from bertfast.runtime.settings import Count, Epochs, LearningRate, Seed, Settings, counted, flag, refuse_repeated
from bertfast.runtime.signals import RunStopped
from bertfast.training.checkpoint import CHECKPOINTS
from bertfast.training.evaluate import write_results
from bertfast.training.finetune_folder import SWEEP_SCORE, finetune_origin
from bertfast.training.finetune_settings import FinetuneBase, FinetuneSettings, Hyperparameters
from bertfast.training.finetuning import Finetuning, open_run
from bertfast.training.optimizer import remedy_for
from bertfast.training.step_results import DivergedError
from bertfast.training.successive_halving import better_half, fractions, recorded_score, run_until
from bertfast.training.sweep_plan import SweepPlan

logger = logging.getLogger("bertfast")

Planned = dict[tuple[float, int, float], list[FinetuneSettings]]
"""Settings of the runs, one for each seed, of each combination of learning rate, batch size and epochs."""

_CONTENTS = ("rate-*", "features", "sweep.json", "sweep.md")


@dataclass(frozen=True, kw_only=True)
class Grid(Settings):
    """Hyperparameters to combine: by default those of the BERT paper, with one seed.

    Attributes:
        learning_rates: Peak learning rates.
        batch_sizes: Examples per forward and backward pass.
        epochs: Numbers of passes over the training data.
        seeds: Random seeds; on small training sets, results vary considerably between seeds.
        successive_halving: Pause all runs after an eighth of their steps, continue the better half of the combinations
            up to a quarter, half of them up to a half, and half of them to the end. Two to four combinations are halved
            less often.
    """

    learning_rates: list[LearningRate] = field(default_factory=lambda: [5e-5, 3e-5, 2e-5])
    batch_sizes: list[Count] = field(default_factory=lambda: [16, 32])
    epochs: list[Epochs] = field(default_factory=lambda: [2, 3, 4])
    seeds: list[Seed] = field(default_factory=lambda: [42])
    successive_halving: bool = False

    def validate(self) -> None:
        for name, values in self.flat().items():
            if isinstance(values, bool):
                continue
            if not values:
                raise ValueError(f"{flag(name)} requires at least one value")
            refuse_repeated(name, values)


@dataclass(frozen=True, kw_only=True)
class SweepSettings(FinetuneBase):
    """Settings of a sweep: those of a fine-tuning run, and the hyperparameters to combine.

    Attributes:
        grid: Hyperparameters to combine. Runs of other combinations in --output-dir are kept.
        overwrite_output_dir: Replace the runs of another sweep in --output-dir.
    """

    grid: Grid = field(default_factory=Grid)
    overwrite_output_dir: bool = False

    def validate(self) -> None:
        super().validate()
        if self.validation_file is None:
            raise ValueError("a sweep requires --validation-file, on which the best run is chosen")


@dataclass(frozen=True)
class Score:
    """Result of a run.

    Attributes:
        metric: Metric that selects the best model.
        score: Its best value; None: the run failed.
        failed: Why it failed, and the remedy; None: it did not.
    """

    metric: str
    score: float | None
    failed: str | None = None


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
    """

    learning_rate: float
    batch_size: int
    epochs: float
    scores: list[float | None]
    mean: float
    spread: float
    failed: str | None = None
    trained: float = 1.0

    @classmethod
    def of(
        cls, learning_rate: float, batch_size: int, epochs: float, results: list[Score], trained: float = 1.0
    ) -> Combination:
        """Return the combination of which the runs, one for each seed, have these results."""
        failed = next((result.failed for result in results if result.failed is not None), None)
        scores = [result.score for result in results]
        known = [score for score in scores if score is not None]
        mean = statistics.mean(known) if failed is None else math.nan
        spread = statistics.stdev(known) if failed is None and len(known) > 1 else math.nan
        return cls(learning_rate, batch_size, epochs, scores, mean, spread, failed, trained)


def sweep(settings: SweepSettings) -> dict[str, Any]:
    """Fine-tune with every combination of hyperparameters, each run in a folder of its own under `output_dir`.

    Finished runs in these folders are not repeated. The means and standard deviations over the seeds are written to
    sweep.json and sweep.md, best first.

    A run fails if it diverges or exhausts the memory; the sweep goes on.

    Returns:
        The content of sweep.json: "metric", "best" (folder of the best run) and "combinations" (fields of
        `Combination`, with None for NaN).

    Raises:
        OriginError: The folder has runs with another model, other data or other settings.
        RunStopped: All runs failed, or after Ctrl-C.
    """
    refuse_several("bertfast sweep")
    origin = finetune_origin(settings, "sweep")
    values = {name: value for name, value in origin.settings.items() if name not in map(flag, settings.grid.flat())}
    origin = Origin(origin.inputs, values, origin.command)
    folder, grid = Path(settings.output_dir), settings.grid
    with locked_folder(folder):
        begin = check_contents(folder, origin, _CONTENTS, overwrite=settings.overwrite_output_dir)
        if settings.overwrite_output_dir:  # check model, data and settings before earlier runs are removed
            first = next(itertools.product(grid.learning_rates, grid.batch_sizes, grid.epochs, grid.seeds))
            Finetuning(_run_settings(settings, *first).replace(resume=False))
        begin()
        return _sweep(settings)


def _run_settings(settings: SweepSettings, rate: float, size: int, epochs: float, seed: int) -> FinetuneSettings:
    """Return the settings of the run with a combination of hyperparameters."""
    folder = Path(settings.output_dir)
    shared = {name: value for name, value in settings.flat().items() if name not in settings.grid.flat()}
    if settings.feature_based.strategy == "feature-based" and settings.feature_based.features_dir is None:
        shared["features_dir"] = str(folder / "features")
    output = folder / f"rate-{_exactly(rate)}-batch-{size}-epochs-{_exactly(epochs)}-seed-{seed}"
    hyperparameters = Hyperparameters(
        learning_rate=rate, per_device_train_batch_size=size, num_train_epochs=epochs, seed=seed
    )
    changes = {"output_dir": str(output), "hyperparameters": hyperparameters, "overwrite_output_dir": False}
    return FinetuneSettings.of(**shared | changes, resume=True)


def _exactly(value: float) -> str:
    """Return a number with six digits, or with all if it has more, so that different ones have different names."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _sweep(settings: SweepSettings) -> dict[str, Any]:
    """Run what is missing of a sweep in its locked folder."""
    folder, grid = Path(settings.output_dir), settings.grid
    planned = {
        values: [_run_settings(settings, *values, seed) for seed in grid.seeds]
        for values in itertools.product(grid.learning_rates, grid.batch_sizes, grid.epochs)
    }
    combinations, results = _halved(planned) if grid.successive_halving else _complete(planned)
    metric = _metric([result for result, _ in results])
    sign = _sign(metric)
    combinations.sort(key=lambda row: (math.inf,) if row.failed is not None else (-row.trained, -sign * row.mean))
    scored = [(sign * result.score, run) for result, run in results if result.score is not None]
    best = max(scored, key=lambda pair: pair[0])[1] if scored else None
    # JSON has no NaN.
    rows = [
        {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in asdict(row).items()}
        for row in combinations
    ]
    results_of_all = {"metric": metric, "best": best, "combinations": rows}
    write_results(folder / "sweep.json", results_of_all)
    page = table(metric, best, combinations)
    write_atomically(folder / "sweep.md", page)
    if best is None:
        failed = counted(len(results), "run")
        raise RunStopped(f"all {failed} failed, see {folder / 'sweep.md'}: {results[0][0].failed}")
    print(page)
    return results_of_all


def _complete(planned: Planned, plan: SweepPlan | None = None) -> tuple[list[Combination], list[tuple[Score, str]]]:
    """Train runs to their end.

    Args:
        planned: Settings of the runs of each combination.
        plan: Plan of the rung before; None: there was none.

    Returns:
        The combinations, and the result of each run with its folder.
    """
    runs = [run for of_values in planned.values() for run in of_values]
    left = [run for run in runs if not Path(run.output_dir, SWEEP_SCORE).exists()]
    plan = SweepPlan(left, len(runs), share=1.0 if plan is None else 0.5, earlier=plan)
    scores = {values: [_score(run, plan) for run in of_values] for values, of_values in planned.items()}
    combinations = [Combination.of(*values, of_values) for values, of_values in scores.items()]
    folders = [run.output_dir for run in runs]
    return combinations, [*zip(itertools.chain.from_iterable(scores.values()), folders, strict=True)]


def _halved(planned: Planned) -> tuple[list[Combination], list[tuple[Score, str]]]:
    """Train runs by successive halving; see `_complete`. If all fail, the results are those of the runs that did."""
    dropped: list[Combination] = []
    failures: list[tuple[Score, str]] = []
    plan: SweepPlan | None = None
    before, rungs = 0.0, fractions(len(planned))
    for number, fraction in enumerate(rungs):
        runs = [run for of_values in planned.values() for run in of_values]
        left = [run for run in runs if _known_score(Path(run.output_dir), fraction) is None]
        shares = [end - start for start, end in itertools.pairwise([*rungs[number:], 1.0])]
        epochs = sum(run.hyperparameters.num_train_epochs for run in runs)
        later = sum(share * epochs / 2**halvings for halvings, share in enumerate(shares, 1))
        plan = SweepPlan(left, len(runs), until=fraction, share=fraction - before, later=later, earlier=plan)
        scores = {values: [_score(run, plan, fraction) for run in of_values] for values, of_values in planned.items()}
        rows = {values: Combination.of(*values, of_values, fraction) for values, of_values in scores.items()}
        sign = _sign(_metric([*itertools.chain.from_iterable(scores.values())]))
        kept = better_half([(values, sign * row.mean) for values, row in rows.items()])
        for values in [values for values in rows if values not in kept]:
            dropped.append(rows[values])
            for run, score in zip(planned[values], scores[values], strict=True):
                failures += [(score, run.output_dir)] * (score.failed is not None)
                remove(Path(run.output_dir, CHECKPOINTS))
        planned, before = {values: planned[values] for values in kept}, fraction
        if not planned:
            return dropped, failures
    combinations, results = _complete(planned, plan)
    return combinations + dropped, results


def _metric(scores: Sequence[Score]) -> str:
    """Return the metric of runs; it is not known of those that failed early."""
    return next((score.metric for score in scores if score.metric), "")


def _sign(metric: str) -> int:
    """Return 1 if higher values of a metric are better, else -1."""
    return -1 if metric == "loss" else 1


def table(metric: str, best: str | None, combinations: list[Combination]) -> str:
    """Return the results as a Markdown table, with the reasons of failures below it."""
    halved = any(row.trained < 1 for row in combinations)
    lines = [f"| learning rate | batch | epochs | {metric}, mean | spread |" + " trained |" * halved]
    lines += ["|---|---|---|---|---|" + "---|" * halved]
    failures = []
    for row in combinations:
        spread = "" if math.isnan(row.spread) else f"{row.spread:.4f}"
        mean = f"{row.mean:.4f}" if row.failed is None else "failed"
        lines.append(
            f"| {_exactly(row.learning_rate)} | {row.batch_size} | {_exactly(row.epochs)} | {mean} | {spread} |"
            + f" {100 * row.trained:.3g} % |" * halved
        )
        if row.failed is not None:
            rate, epochs = _exactly(row.learning_rate), _exactly(row.epochs)
            values = f"learning rate {rate}, batch {row.batch_size}, epochs {epochs}"
            failures += ["", f"Failed: {values}: {row.failed}"]
    return "\n".join([*lines, *failures, *([] if best is None else ["", f"The best run is in {best}."]), ""])


def _score(settings: FinetuneSettings, plan: SweepPlan, fraction: float = 1.0) -> Score:
    """Return the result of a run; one that is finished is not repeated, nor one that diverged.

    Args:
        settings: Settings of the run.
        plan: The plan.
        fraction: Fraction of its steps after which it is paused.
    """
    folder = Path(settings.output_dir)
    if saved := _known_score(folder, fraction):
        require_origin(folder, finetune_origin(settings, "finetune"))
        return saved
    metric, started = "", time.perf_counter()
    plan.begin(settings)
    try:
        with open_run(settings) as run:
            metric = run.metric
            result = _run(run, fraction)
    except Exception as error:  # each library has one of its own for exhausted memory
        if not is_out_of_memory(error):
            raise
        # Not recorded, as there may be more memory the next time.
        result = Score(metric, None, "not enough memory: use smaller --batch-sizes, or lower --tokens-per-batch")
    plan.end(settings, time.perf_counter() - started)
    if result.failed is not None:
        logger.warning("%s failed, the sweep goes on: %s", folder, result.failed)
    return result


def _run(run: Finetuning, fraction: float) -> Score:
    """Train a run, and record its result unless it is only paused."""
    try:
        if fraction < 1 and (score := run_until(run, fraction)) is not None:
            return Score(run.metric, score)
        score = run.run(lambda step: None).get(f"eval_{run.metric}")
        failed = f"{run.metric} cannot be measured, as all predictions are equal: lower --learning-rates"
        result = Score(run.metric, score, failed if score is None else None)
    except DivergedError as error:
        remove(run.folder / CHECKPOINTS)  # the run is not continued
        result = Score(run.metric, None, f"{error.problem}; {remedy_for(error.any_step_taken, '--learning-rates')}")
    write_results(run.folder / SWEEP_SCORE, asdict(result))
    return result


def _known_score(folder: Path, fraction: float) -> Score | None:
    """Return the result of a run that is finished, or paused after a fraction of its steps; None: it is neither."""
    paused = None if fraction == 1 else recorded_score(folder, fraction)
    return _read_score(folder / SWEEP_SCORE) if paused is None else Score(*paused)


def _read_score(path: Path) -> Score | None:
    """Return the result of a finished run; None: there is none, or its file is damaged."""
    if not path.exists():
        return None
    try:
        saved = read_json(path)
        if saved.get("failed") is not None:
            return Score(str(saved["metric"]), None, str(saved["failed"]))
        score = float(saved["score"])
        if not math.isfinite(score):
            raise ValueError("not finite")
        return Score(str(saved["metric"]), score)
    except (KeyError, TypeError, ValueError):
        logger.warning("%s is damaged: the run is repeated", path)
        return None
