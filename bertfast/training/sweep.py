"""`bertfast sweep`: fine-tune with every combination of hyperparameters and several seeds, and name the best run."""

from __future__ import annotations

import itertools
import logging
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bertfast.data.text_files import read_json
from bertfast.runtime.atomic_write import write_atomically
from bertfast.runtime.output_folder import Origin, check_contents, locked_folder, require_origin
from bertfast.runtime.settings import Count, LearningRate, Positive, Seed, Settings, flag, refuse_repeated
from bertfast.training.evaluate import write_results
from bertfast.training.finetune import Finetuning, open_run
from bertfast.training.finetune_folder import finetune_origin
from bertfast.training.finetune_settings import FinetuneBase, FinetuneSettings, Hyperparameters

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
    epochs: list[Positive] = field(default_factory=lambda: [2, 3, 4])
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
class Combination:
    """Results of one combination of hyperparameters.

    Attributes:
        learning_rate, batch_size, epochs: The hyperparameters.
        scores: Best validation score of each seed.
        mean: Mean of the scores.
        spread: Standard deviation of the scores; NaN for one seed.
    """

    learning_rate: float
    batch_size: int
    epochs: float
    scores: list[float]
    mean: float
    spread: float


def sweep(settings: SweepSettings) -> dict[str, Any]:
    """Fine-tune with every combination of hyperparameters, each run in a folder of its own under `output_dir`.

    Finished runs in these folders are not repeated. The means and standard deviations over the seeds are written to
    sweep.json and sweep.md, best first.

    Returns:
        The content of sweep.json: "metric", "best" (folder of the best run) and "combinations" (fields of
        `Combination`, with None for NaN).

    Raises:
        OriginError: The folder has runs with another model, other data or other settings.
    """
    origin = finetune_origin(settings, "sweep")
    values = {name: value for name, value in origin.settings.items() if name not in map(flag, settings.grid.flat())}
    origin = Origin(origin.inputs, values, origin.command)
    folder, grid = Path(settings.output_dir), settings.grid
    with locked_folder(folder):
        begin = check_contents(folder, origin, _CONTENTS, overwrite=settings.overwrite_output_dir)
        if settings.overwrite_output_dir:  # check model, data and settings before earlier runs are removed
            first = next(itertools.product(grid.learning_rates, grid.batch_sizes, grid.epochs, grid.seeds))
            Finetuning(_run_settings(settings, *first))
        begin()
        return _sweep(settings)


def _run_settings(settings: SweepSettings, rate: float, size: int, epochs: float, seed: int) -> FinetuneSettings:
    """Return the settings of the run with a combination of hyperparameters."""
    folder = Path(settings.output_dir)
    shared = {name: value for name, value in settings.flat().items() if name not in settings.grid.flat()}
    if settings.feature_based.strategy == "feature-based" and settings.feature_based.features_dir is None:
        shared["features_dir"] = str(folder / "features")
    output = folder / f"rate-{rate:g}-batch-{size}-epochs-{epochs:g}-seed-{seed}"
    hyperparameters = Hyperparameters(
        learning_rate=rate, per_device_train_batch_size=size, num_train_epochs=epochs, seed=seed
    )
    changes = {"output_dir": str(output), "hyperparameters": hyperparameters, "overwrite_output_dir": True}
    return FinetuneSettings.of(**shared | changes)


def _sweep(settings: SweepSettings) -> dict[str, Any]:
    """Run what is missing of a sweep in its locked folder."""
    folder, grid = Path(settings.output_dir), settings.grid
    metric = ""
    combinations: list[Combination] = []
    runs: list[tuple[float, str]] = []
    for rate, size, epochs in itertools.product(grid.learning_rates, grid.batch_sizes, grid.epochs):
        scores = []
        for seed in grid.seeds:
            run = _run_settings(settings, rate, size, epochs, seed)
            metric, score = _score(run)
            scores.append(score)
            runs.append((score, run.output_dir))
        spread = statistics.stdev(scores) if len(scores) > 1 else math.nan
        combinations.append(Combination(rate, size, epochs, scores, statistics.mean(scores), spread))
    sign = -1 if metric == "loss" else 1
    combinations.sort(key=lambda combination: -sign * combination.mean)
    best = max(runs, key=lambda run: sign * run[0])[1]
    # JSON has no NaN.
    rows = [asdict(row) | ({"spread": None} if math.isnan(row.spread) else {}) for row in combinations]
    results = {"metric": metric, "best": best, "combinations": rows}
    write_results(folder / "sweep.json", results)
    page = table(metric, best, combinations)
    write_atomically(folder / "sweep.md", page)
    print(page)
    return results


def table(metric: str, best: str, combinations: list[Combination]) -> str:
    """Return the results as a Markdown table."""
    lines = [f"| learning rate | batch | epochs | {metric}, mean | spread |", "|---|---|---|---|---|"]
    for row in combinations:
        spread = "" if math.isnan(row.spread) else f"{row.spread:.4f}"
        lines.append(f"| {row.learning_rate:g} | {row.batch_size} | {row.epochs:g} | {row.mean:.4f} | {spread} |")
    return "\n".join([*lines, "", f"The best run is in {best}.", ""])


def _score(settings: FinetuneSettings) -> tuple[str, float]:
    """Return the metric that selects the best model, and its best value in a run; a finished run is not repeated."""
    folder = Path(settings.output_dir)
    finished = folder / "sweep_score.json"
    if saved := _read_score(finished):
        require_origin(folder, finetune_origin(settings, "finetune"))
        return saved
    with open_run(settings) as run:
        score = run.run(lambda step: None)[f"eval_{run.metric}"]
        write_results(finished, {"metric": run.metric, "score": score})
        return run.metric, score


def _read_score(path: Path) -> tuple[str, float] | None:
    """Return the metric and the score of a finished run; None: there is none, or its file is damaged."""
    if not path.exists():
        return None
    try:
        saved = read_json(path)
        return str(saved["metric"]), float(saved["score"])
    except (KeyError, TypeError, ValueError):
        logger.warning("%s is damaged: the run is repeated", path)
        return None
