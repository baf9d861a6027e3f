"""`bertfast sweep`: fine-tune with every combination of hyperparameters and several seeds, and name the best run."""

from __future__ import annotations

import itertools
import logging
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bertfast.runtime.atomic_write import remove, write_atomically
from bertfast.runtime.malloc import is_out_of_memory
from bertfast.runtime.output_folder import Origin, check_contents, locked_folder, require_origin
from bertfast.runtime.processes import refuse_several
from bertfast.runtime.settings import Count, Epochs, LearningRate, Seed, Settings, counted, flag, refuse_repeated
from bertfast.runtime.signals import RunStopped, continued_by
from bertfast.training.checkpoint import CHECKPOINTS, has_begun
from bertfast.training.evaluate import write_results
from bertfast.training.finetune_data import RunData
from bertfast.training.finetune_folder import SWEEP_SCORE, finetune_origin
from bertfast.training.finetune_settings import FinetuneBase, FinetuneSettings, Hyperparameters
from bertfast.training.finetuning import Finetuning, open_run
from bertfast.training.optimizer import remedy_for
from bertfast.training.run_length import RunLength
from bertfast.training.step_results import DivergedError
from bertfast.training.successive_halving import better_half, fractions, recorded_score, run_until
from bertfast.training.sweep_plan import SweepPlan
from bertfast.training.sweep_results import Combination, Score, best_of, exactly, metric_of, read_score, table, tie

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


def sweep(settings: SweepSettings) -> dict[str, Any]:
    """Fine-tune with every combination of hyperparameters, each run in a folder of its own under `output_dir`.

    Finished runs in these folders are not repeated. The means and standard deviations over the seeds are written to
    sweep.json and sweep.md, best first.

    A run fails if it diverges or exhausts the memory; the sweep goes on. Of runs and combinations with the same score,
    that with the lower validation loss is better, and of equal losses the first of the grid.

    Returns:
        The content of sweep.json: "metric", "best" (folder of the best run) and "combinations" (fields of
        `Combination`, with None for what is not finite).

    Raises:
        OriginError: The folder has runs with another model, other data or other settings.
        ValueError: A run of the grid is impossible, which is found out before the first one.
        RunStopped: All runs failed, or after Ctrl-C.
    """
    refuse_several("bertfast sweep")
    origin = finetune_origin(settings, "sweep")
    values = {name: value for name, value in origin.settings.items() if name not in map(flag, settings.grid.flat())}
    origin = Origin(origin.inputs, values, origin.command)
    folder = Path(settings.output_dir)
    with locked_folder(folder):
        begin = check_contents(folder, origin, _CONTENTS, overwrite=settings.overwrite_output_dir)
        planned = _planned(settings)
        _check_runs([*itertools.chain.from_iterable(planned.values())], overwrite=settings.overwrite_output_dir)
        begin()
        return _sweep(settings, planned)


def _planned(settings: SweepSettings) -> Planned:
    """Return the runs of the grid."""
    grid = settings.grid
    return {
        values: [_run_settings(settings, *values, seed) for seed in grid.seeds]
        for values in itertools.product(grid.learning_rates, grid.batch_sizes, grid.epochs)
    }


def _check_runs(runs: list[FinetuneSettings], *, overwrite: bool) -> None:
    """Raise ValueError if a run that is left is impossible, or one in the folder has another origin.

    Args:
        runs: All runs of the grid.
        overwrite: Whether those in the folder are to be replaced; then the model is built before they are removed.
    """
    if not overwrite:
        for run in runs:
            if has_begun(Path(run.output_dir)):
                require_origin(Path(run.output_dir), finetune_origin(run, "finetune"))
        runs = [run for run in runs if not Path(run.output_dir, SWEEP_SCORE).exists()]
    if not runs:
        return
    # The runs differ in learning rate, batch size, epochs and seed: their training data is the same.
    opened = Finetuning(runs[0]) if overwrite else RunData.open(runs[0])
    for run in runs:
        values = run.hyperparameters
        epochs = f"{exactly(values.num_train_epochs)} epoch{'s' * (values.num_train_epochs != 1)}"
        name = f"the run with batch {values.per_device_train_batch_size} and {epochs}"
        RunLength.of(run, len(opened.features["train"]), run=name, longer="--epochs")


def _run_settings(settings: SweepSettings, rate: float, size: int, epochs: float, seed: int) -> FinetuneSettings:
    """Return the settings of the run with a combination of hyperparameters."""
    folder = Path(settings.output_dir)
    shared = {name: value for name, value in settings.flat().items() if name not in settings.grid.flat()}
    if settings.feature_based.strategy == "feature-based" and settings.feature_based.features_dir is None:
        shared["features_dir"] = str(folder / "features")
    output = folder / f"rate-{exactly(rate)}-batch-{size}-epochs-{exactly(epochs)}-seed-{seed}"
    hyperparameters = Hyperparameters(
        learning_rate=rate, per_device_train_batch_size=size, num_train_epochs=epochs, seed=seed
    )
    changes = {"output_dir": str(output), "hyperparameters": hyperparameters, "overwrite_output_dir": False}
    return FinetuneSettings.of(**shared | changes)


def _sweep(settings: SweepSettings, planned: Planned) -> dict[str, Any]:
    """Run what is missing of a sweep in its locked folder."""
    folder = Path(settings.output_dir)
    combinations, results = _halved(planned) if settings.grid.successive_halving else _complete(planned)
    metric = metric_of([result for result, _ in results])
    combinations.sort(key=lambda row: _best_first(row, metric))
    best, equal = best_of(results)
    # JSON has neither NaN nor infinity.
    rows = [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(row).items()
        }
        for row in combinations
    ]
    results_of_all = {"metric": metric, "best": best, "combinations": rows}
    write_results(folder / "sweep.json", results_of_all)
    page = table(metric, best, equal, combinations)
    write_atomically(folder / "sweep.md", page)
    if best is None:
        failed = counted(len(results), "run")
        raise RunStopped(f"all {failed} failed, see {folder / 'sweep.md'}: {results[0][0].failed}")
    print(page)
    return results_of_all


def _best_first(row: Combination, metric: str) -> tuple[float, ...]:
    """Return the key by which combinations are sorted; those that failed are last."""
    if row.failed is not None:
        return (math.inf,)
    score, loss = row.quality(metric)
    return -row.trained, -score, -loss


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
        metric = metric_of([*itertools.chain.from_iterable(scores.values())])
        qualities = {values: row.quality(metric) for values, row in rows.items()}
        kept = better_half([*qualities.items()])
        others = [quality for values, quality in qualities.items() if values not in kept]
        if equal := tie([qualities[values] for values in kept], others, metric, "combinations"):
            logger.info(equal)
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


def _score(settings: FinetuneSettings, plan: SweepPlan, fraction: float = 1.0) -> Score:
    """Return the result of a run; one that is finished is not repeated, nor one that diverged.

    Args:
        settings: Settings of the run.
        plan: The plan.
        fraction: Fraction of its steps after which it is paused.
    """
    folder = Path(settings.output_dir)
    if saved := _known_score(folder, fraction):
        return saved
    metric, started = "", time.perf_counter()
    plan.begin(settings)
    try:
        with continued_by("sweep"), open_run(settings.replace(resume=has_begun(folder))) as run:
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
        if fraction < 1 and (paused := run_until(run, fraction)) is not None:
            return Score(run.metric, paused[0], loss=paused[1])
        results = run.run(lambda step: None)
        score = results.get(f"eval_{run.metric}")
        failed = f"{run.metric} cannot be measured, as all predictions are equal: lower --learning-rates"
        result = Score(run.metric, score, failed if score is None else None, results.get("eval_loss"))
    except DivergedError as error:
        remove(run.folder / CHECKPOINTS)  # the run is not continued
        result = Score(run.metric, None, f"{error.problem}; {remedy_for(error.any_step_taken, '--learning-rates')}")
    write_results(run.folder / SWEEP_SCORE, asdict(result))
    return result


def _known_score(folder: Path, fraction: float) -> Score | None:
    """Return the result of a run that is finished, or paused after a fraction of its steps; None: it is neither."""
    paused = None if fraction == 1 else recorded_score(folder, fraction)
    if paused is None:
        return read_score(folder / SWEEP_SCORE)
    metric, score, loss = paused
    return Score(metric, score, loss=loss)
