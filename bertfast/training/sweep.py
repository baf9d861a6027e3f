"""`bertfast sweep`: fine-tune with every combination of hyperparameters and several seeds, and name the best run."""

from __future__ import annotations

import itertools
import logging
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bertfast.data.text_files import read_json
from bertfast.runtime.atomic_write import remove, write_atomically
from bertfast.runtime.malloc import is_out_of_memory
from bertfast.runtime.output_folder import Origin, check_contents, locked_folder, require_origin
from bertfast.runtime.settings import Count, Epochs, LearningRate, Seed, Settings, counted, flag, refuse_repeated
from bertfast.runtime.signals import RunStopped
from bertfast.training.checkpoint import CHECKPOINTS
from bertfast.training.evaluate import write_results
from bertfast.training.finetune_folder import SWEEP_SCORE, finetune_origin
from bertfast.training.finetune_settings import FinetuneBase, FinetuneSettings, Hyperparameters
from bertfast.training.finetuning import Finetuning, open_run
from bertfast.training.optimizer import remedy_for
from bertfast.training.step_results import DivergedError
from bertfast.training.sweep_plan import SweepPlan

logger = logging.getLogger("bertfast")

_CONTENTS = ("rate-*", "features", "sweep.json", "sweep.md")


@dataclass(frozen=True, kw_only=True)
class Grid(Settings):
    """Hyperparameters to combine: by default those of the BERT paper, with one seed.

    Attributes:
        learning_rates: Peak learning rates.
        batch_sizes: Examples per forward and backward pass.
        epochs: Numbers of passes over the training data.
        seeds: Random seeds; on small training sets, results vary considerably between seeds.
    """

    learning_rates: list[LearningRate] = field(default_factory=lambda: [5e-5, 3e-5, 2e-5])
    batch_sizes: list[Count] = field(default_factory=lambda: [16, 32])
    epochs: list[Epochs] = field(default_factory=lambda: [2, 3, 4])
    seeds: list[Seed] = field(default_factory=lambda: [42])

    def validate(self) -> None:
        for name, values in self.flat().items():
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
    """

    learning_rate: float
    batch_size: int
    epochs: float
    scores: list[float | None]
    mean: float
    spread: float
    failed: str | None = None

    @classmethod
    def of(cls, learning_rate: float, batch_size: int, epochs: float, results: list[Score]) -> Combination:
        """Return the combination of which the runs, one for each seed, have these results."""
        failed = next((result.failed for result in results if result.failed is not None), None)
        scores = [result.score for result in results]
        known = [score for score in scores if score is not None]
        mean = statistics.mean(known) if failed is None else math.nan
        spread = statistics.stdev(known) if failed is None and len(known) > 1 else math.nan
        return cls(learning_rate, batch_size, epochs, scores, mean, spread, failed)


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
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("bertfast sweep runs in one process: start it without torchrun")
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
    combinations: list[Combination] = []
    runs: list[tuple[Score, str]] = []
    planned = {
        values: [_run_settings(settings, *values, seed) for seed in grid.seeds]
        for values in itertools.product(grid.learning_rates, grid.batch_sizes, grid.epochs)
    }
    all_runs = [run for of_values in planned.values() for run in of_values]
    plan = SweepPlan([run for run in all_runs if not Path(run.output_dir, SWEEP_SCORE).exists()], len(all_runs))
    for (rate, size, epochs), one_per_seed in planned.items():
        results = [_score(run, plan) for run in one_per_seed]
        runs += zip(results, (run.output_dir for run in one_per_seed), strict=True)
        combinations.append(Combination.of(rate, size, epochs, results))
    metric = runs[0][0].metric
    sign = -1 if metric == "loss" else 1
    combinations.sort(key=lambda row: math.inf if row.failed is not None else -sign * row.mean)
    scored = [(sign * result.score, run) for result, run in runs if result.score is not None]
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
        raise RunStopped(f"all {counted(len(runs), 'run')} failed, see {folder / 'sweep.md'}: {runs[0][0].failed}")
    print(page)
    return results_of_all


def table(metric: str, best: str | None, combinations: list[Combination]) -> str:
    """Return the results as a Markdown table, with the reasons of failures below it."""
    lines = [f"| learning rate | batch | epochs | {metric}, mean | spread |", "|---|---|---|---|---|"]
    failures = []
    for row in combinations:
        spread = "" if math.isnan(row.spread) else f"{row.spread:.4f}"
        mean = f"{row.mean:.4f}" if row.failed is None else "failed"
        lines.append(
            f"| {_exactly(row.learning_rate)} | {row.batch_size} | {_exactly(row.epochs)} | {mean} | {spread} |"
        )
        if row.failed is not None:
            rate, epochs = _exactly(row.learning_rate), _exactly(row.epochs)
            values = f"learning rate {rate}, batch {row.batch_size}, epochs {epochs}"
            failures += ["", f"Failed: {values}: {row.failed}"]
    return "\n".join([*lines, *failures, *([] if best is None else ["", f"The best run is in {best}."]), ""])


def _score(settings: FinetuneSettings, plan: SweepPlan) -> Score:
    """Return the result of a run; one that is finished is not repeated, nor one that diverged."""
    folder = Path(settings.output_dir)
    finished = folder / SWEEP_SCORE
    if saved := _read_score(finished):
        require_origin(folder, finetune_origin(settings, "finetune"))
        return saved
    metric, started = "", time.perf_counter()
    plan.begin(settings)
    try:
        with open_run(settings) as run:
            metric = run.metric
            result = _run(run)
            write_results(finished, asdict(result))
    except Exception as error:  # each library has one of its own for exhausted memory
        if not is_out_of_memory(error):
            raise
        # Not recorded, as there may be more memory the next time.
        result = Score(metric, None, "not enough memory: use smaller --batch-sizes, or lower --tokens-per-batch")
    plan.end(settings, time.perf_counter() - started)
    if result.failed is not None:
        logger.warning("%s failed, the sweep goes on: %s", folder, result.failed)
    return result


def _run(run: Finetuning) -> Score:
    try:
        return Score(run.metric, run.run(lambda step: None)[f"eval_{run.metric}"])
    except DivergedError as error:
        remove(run.folder / CHECKPOINTS)  # the run is not continued
        return Score(run.metric, None, f"{error.problem}; {remedy_for(error.any_step_taken, '--learning-rates')}")


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
