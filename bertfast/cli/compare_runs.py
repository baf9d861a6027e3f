"""`bertfast compare`: the results of several runs, the settings in which they differ, and a plot of their curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from bertfast.data.text_files import read_json
from bertfast.runtime.extras import install_command
from bertfast.runtime.output_folder import read_record
from bertfast.runtime.plotting import require_png
from bertfast.runtime.settings import Settings
from bertfast.training.finetune_folder import RUN
from bertfast.training.metrics_log import Entry, read_entries
from bertfast.training.report_plots import draw_curves

_LOSSES = {"finetune": "loss", "pretrain": "masked_lm_loss"}  # by command: entry with the training loss


@dataclass(frozen=True)
class CompareSettings(Settings):
    """Runs to compare.

    Attributes:
        runs: Output folders of runs of `bertfast finetune`, or of `bertfast pretrain`.
        plot: PNG file for the curves.
    """

    runs: Positional[list[str]]
    plot: str = "compare.png"

    def validate(self) -> None:
        require_png("--plot", self.plot)
        if not self.runs:
            raise ValueError("RUNS is empty: name the output folders of runs, as in `bertfast compare tuned-a tuned-b`")
        for index, name in enumerate(self.runs):
            if name in self.runs[:index]:
                raise ValueError(f"{name} is given more than once: name different runs")


@dataclass(frozen=True)
class ComparedRun:
    """What is compared of a run.

    Attributes:
        name: Its output folder.
        command: finetune or pretrain.
        settings: Values of settings by flag.
        entries: Its metrics.
        metric: Name of the entry of metrics.jsonl that tells how good the model is.
    """

    name: str
    command: str
    settings: dict[str, Any]
    entries: list[Entry]
    metric: str

    @classmethod
    def open(cls, name: str) -> ComparedRun:
        """Read a run's folder.

        Raises:
            ValueError: It is not the folder of a run, or has no metrics yet.
        """
        folder = Path(name)
        record = read_record(folder)
        if record is None or record["command"] not in _LOSSES:
            raise ValueError(f"{name} is not the output folder of a run of `bertfast finetune` or `bertfast pretrain`")
        entries = [
            {key: value for key, value in entry.items() if isinstance(value, int | float)}
            for entry in read_entries(folder / "metrics.jsonl")
        ]
        if not entries:
            raise ValueError(f"{name} has no metrics yet: wait until a step has been logged, or lower --logging-steps")
        metric = "validation_loss"
        if record["command"] == "finetune":
            run = read_json(folder / RUN) if (folder / RUN).exists() else {}
            evaluated = (key for entry in entries for key in entry if key.startswith("eval_"))
            metric = f"eval_{run['metric_for_best_model']}" if "metric_for_best_model" in run else next(evaluated, "")
        return cls(name, record["command"], record["settings"], entries, metric)

    def row(self, metric: str) -> tuple[object, ...]:
        """Return its folder, steps, last training loss, best value of a metric, and the step of that value."""
        loss = _LOSSES[self.command]
        losses = [entry[loss] for entry in self.entries if loss in entry]
        values = [(entry[metric], entry["step"]) for entry in self.entries if metric in entry]
        best = min if metric.endswith("loss") else max
        value, step = best(values, key=lambda pair: pair[0]) if values else ("", "")
        return self.name, self.entries[-1]["step"], losses[-1] if losses else "", value, step


def compare(settings: CompareSettings) -> None:
    """Print a table of the runs and one of the settings in which they differ, and plot their curves.

    Raises:
        ValueError: A folder is not that of a run, or the runs are of different commands.
    """
    runs = [ComparedRun.open(name) for name in settings.runs]
    first = runs[0]
    for run in runs:
        if run.command != first.command:
            raise ValueError(
                f"{first.name} is a run of `bertfast {first.command}`, and {run.name} one of `bertfast {run.command}`: "
                "compare runs of the same command"
            )
    metric = next((run.metric for run in runs if run.metric), "")
    shown = metric.removeprefix("eval_") or "metric"
    print(_table(["run", "steps", "training loss", f"best {shown}", "at step"], [run.row(metric) for run in runs]))
    different = _different_settings(runs)
    if different:
        print(_table(["setting", *settings.runs], different))
    curves = {run.name: run.entries for run in runs}
    if draw_curves(Path(settings.plot), f"{len(runs)} runs", curves, loss=_LOSSES[first.command], metric=metric):
        print(f"plot written to {settings.plot}")
    else:
        print(f"no plot: it requires matplotlib: {install_command('plots')}")


def _different_settings(runs: Sequence[ComparedRun]) -> list[tuple[object, ...]]:
    """Return the flags whose values differ, and the value of each run."""
    flags = sorted({flag for run in runs for flag in run.settings})
    rows = [(flag, *(json.dumps(run.settings.get(flag), ensure_ascii=False) for run in runs)) for flag in flags]
    return [row for row in rows if len({*row[1:]}) > 1]


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table whose columns are aligned."""
    cells = [[f"{value:.6g}" if isinstance(value, float) else str(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells) + "\n"
