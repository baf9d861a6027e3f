"""`bertfast sweep`: fine-tune with every combination of settings and several seeds, and keep the best."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from bertfast.tasks.task import write_atomically
from bertfast.training.evaluate import write_results
from bertfast.training.finetune import FinetuneSettings, Finetuning


@dataclass(kw_only=True)
class SweepSettings(FinetuneSettings):
    """What to fine-tune, as `bertfast finetune` does, and what to vary: as in the paper, unless said otherwise.

    Attributes:
        learning_rates: Instead of learning_rate.
        batch_sizes: Instead of per_device_train_batch_size.
        epochs: Instead of num_train_epochs.
        seeds: Instead of seed: small training sets are worth several restarts.
    """

    learning_rates: list[float] = field(default_factory=lambda: [5e-5, 3e-5, 2e-5])
    batch_sizes: list[int] = field(default_factory=lambda: [16, 32])
    epochs: list[float] = field(default_factory=lambda: [2, 3, 4])
    seeds: list[int] = field(default_factory=lambda: [42])

    def __post_init__(self):
        super().__post_init__()
        if self.validation_file is None:
            raise ValueError("a sweep needs a validation_file, by which the best is known")
        for name in ("learning_rates", "batch_sizes", "epochs", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} holds nothing to try")


def sweep(settings: SweepSettings) -> dict:
    """Do all runs, each in a folder of its own under `output_dir`; those that are finished there are not done again.

    Leaves sweep.json and sweep.md: of each combination the mean and the spread over the seeds, the best first. Returns
    what sweep.json holds: "metric", "best" (the folder of the best run) and "combinations".
    """
    folder, combinations, runs = Path(settings.output_dir), [], []
    plain = {entry.name: getattr(settings, entry.name) for entry in dataclasses.fields(FinetuneSettings)}
    if settings.strategy == "feature-based" and settings.features_dir is None:
        plain["features_dir"] = str(folder / "features")
    metric = ""
    for rate, size, epochs in itertools.product(settings.learning_rates, settings.batch_sizes, settings.epochs):
        scores = []
        for seed in settings.seeds:
            own = folder / f"rate-{rate:g}-batch-{size}-epochs-{epochs:g}-seed-{seed}"
            changes = {
                "output_dir": str(own),
                "learning_rate": rate,
                "per_device_train_batch_size": size,
                "num_train_epochs": epochs,
                "seed": seed,
                "overwrite_output_dir": True,
            }
            metric, score = _score(FinetuneSettings(**plain | changes))
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
