"""`bertfast sweep`: fine-tune with every combination of settings and several seeds, and keep the best."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from bertfast.runtime.settings import Count, NonNegative, Positive, Seed, Settings, flag
from bertfast.tasks.task import write_atomically
from bertfast.training.evaluate import write_results
from bertfast.training.finetune import Finetuning
from bertfast.training.finetune_settings import FinetuneBase, FinetuneSettings, Hyperparameters


@dataclass(frozen=True, kw_only=True)
class Grid(Settings):
    """Hyperparameters to combine: by default those of the BERT paper, with one seed.

    Attributes:
        learning_rates: Peak learning rates.
        batch_sizes: Examples per forward and backward pass.
        epochs: Numbers of passes over the training data.
        seeds: Random seeds; on small training sets, results vary considerably between seeds.
    """

    learning_rates: list[NonNegative] = field(default_factory=lambda: [5e-5, 3e-5, 2e-5])
    batch_sizes: list[Count] = field(default_factory=lambda: [16, 32])
    epochs: list[Positive] = field(default_factory=lambda: [2, 3, 4])
    seeds: list[Seed] = field(default_factory=lambda: [42])

    def validate(self) -> None:
        for name, values in self.flat().items():
            if not values:
                raise ValueError(f"{flag(name)} requires at least one value")


@dataclass(frozen=True, kw_only=True)
class SweepSettings(FinetuneBase):
    """Settings of a sweep: those of a fine-tuning run, and the hyperparameters to combine.

    Attributes:
        grid: Hyperparameters to combine.
    """

    grid: Grid = field(default_factory=Grid)

    def validate(self) -> None:
        super().validate()
        if self.validation_file is None:
            raise ValueError("a sweep requires --validation-file, on which the best run is chosen")


def sweep(settings: SweepSettings) -> dict:
    """Do all runs, each in a folder of its own under `output_dir`; those that are finished there are not done again.

    Leaves sweep.json and sweep.md: of each combination the mean and the spread over the seeds, the best first. Returns
    what sweep.json holds: "metric", "best" (the folder of the best run) and "combinations".
    """
    folder, combinations, runs = Path(settings.output_dir), [], []
    grid, shared = settings.grid, {name: x for name, x in settings.flat().items() if name not in settings.grid.flat()}
    if settings.feature_based.strategy == "feature-based" and settings.feature_based.features_dir is None:
        shared["features_dir"] = str(folder / "features")
    metric = ""
    for rate, size, epochs in itertools.product(grid.learning_rates, grid.batch_sizes, grid.epochs):
        scores = []
        for seed in grid.seeds:
            own = folder / f"rate-{rate:g}-batch-{size}-epochs-{epochs:g}-seed-{seed}"
            hyperparameters = Hyperparameters(
                learning_rate=rate, per_device_train_batch_size=size, num_train_epochs=epochs, seed=seed
            )
            changes = {"output_dir": str(own), "hyperparameters": hyperparameters, "overwrite_output_dir": True}
            metric, score = _score(FinetuneSettings.of(**shared | changes))
            scores.append(score)
            runs.append((score, str(own)))
        combinations.append(
            {
                "learning_rate": rate,
                "batch_size": size,
                "epochs": epochs,
                "scores": scores,
                "mean": statistics.mean(scores),
                "spread": statistics.stdev(scores) if len(scores) > 1 else math.nan,
            }
        )
    sign = -1 if metric == "loss" else 1
    combinations.sort(key=lambda one: -sign * one["mean"])
    best = max(runs, key=lambda run: sign * run[0])[1]
    results = {"metric": metric, "best": best, "combinations": combinations}
    write_results(folder / "sweep.json", results)
    write_atomically(folder / "sweep.md", table(results))
    print(table(results))
    return results


def table(results: dict) -> str:
    """The combinations as Markdown."""
    lines = [f"| learning rate | batch | epochs | {results['metric']}, mean | spread |", "|---|---|---|---|---|"]
    for one in results["combinations"]:
        spread = "" if math.isnan(one["spread"]) else f"{one['spread']:.4f}"
        lines.append(
            f"| {one['learning_rate']:g} | {one['batch_size']} | {one['epochs']:g} | {one['mean']:.4f} | {spread} |"
        )
    return "\n".join([*lines, "", f"The best run is in {results['best']}.", ""])


def _score(settings: FinetuneSettings) -> tuple[str, float]:
    """(the metric that decides, its value) of a run, done now or before."""
    finished = Path(settings.output_dir, "sweep_score.json")
    if not finished.exists():
        run = Finetuning(settings)
        results = run.run(lambda step: None)
        write_results(finished, {"metric": run.metric, "score": results[f"eval_{run.metric}"]})
    found = json.loads(finished.read_text(encoding="utf-8"))
    return found["metric"], found["score"]
