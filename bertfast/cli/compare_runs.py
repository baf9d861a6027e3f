"""`bertfast compare`: the results of several runs, the inputs and settings that differ, and a plot of their curves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from bertfast.data.text_files import read_json
from bertfast.runtime.extras import install_command
from bertfast.runtime.output_folder import FileRecord, Record, read_record
from bertfast.runtime.plotting import require_png
from bertfast.runtime.settings import Settings, counted
from bertfast.training.checkpoint import CHECKPOINTS
from bertfast.training.finetune_folder import RUN, SWEEP_RUNGS
from bertfast.training.finetune_model import score_of
from bertfast.training.metrics_log import Entry, read_entries
from bertfast.training.pretrain_checkpointing import is_finished
from bertfast.training.report_plots import Curves, draw_curves

_LOSSES = {"finetune": "loss", "pretrain": "masked_lm_loss"}  # by command: entry with the training loss
_MACHINE = ("device", "precision", "processes")  # entries of run.json on how a run was computed
_HASH, _DIGITS = re.compile("[0-9a-f]{64}"), 8  # of SHA-256, of which this number of digits are shown


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
        finished: Whether it has come to its end.
        record: What it was made from.
        entries: Its metrics.
        metric: Name of the entry of metrics.jsonl that tells how good the model is; "": there is none yet.
        summary: Content of run.json, which a finished run of `bertfast finetune` has.
    """

    name: str
    command: str
    finished: bool
    record: Record
    entries: list[Entry]
    metric: str
    summary: dict[str, Any]

    @classmethod
    def open(cls, name: str) -> ComparedRun:
        """Read a run's folder.

        Raises:
            ValueError: It is not the folder of a run, or of one that has not logged a step yet.
        """
        folder = Path(name)
        record = read_record(folder)
        if record is None or record["command"] not in _LOSSES:
            raise ValueError(f"{name} is not the output folder of a run of `bertfast finetune` or `bertfast pretrain`")
        entries = [
            {key: value for key, value in entry.items() if isinstance(value, int | float)}
            for entry in read_entries(folder / "metrics.jsonl")
        ]
        metric, run, finetuned = "validation_loss", dict[str, Any](), record["command"] == "finetune"
        if finetuned:
            run = read_json(folder / RUN) if (folder / RUN).exists() else {}
            evaluated = (key for entry in entries for key in entry if key.startswith("eval_"))  # the deciding one first
            metric = f"eval_{run['metric_for_best_model']}" if "metric_for_best_model" in run else next(evaluated, "")
        finished = bool(run) if finetuned else is_finished(folder)
        if not entries and not finished:
            if (folder / SWEEP_RUNGS).exists() and not (folder / CHECKPOINTS).exists():
                raise ValueError(
                    f"{name} has no metrics: successive halving dropped it before a step was logged; its score is in "
                    "sweep.md of the sweep, leave it out here"
                )
            raise ValueError(f"{name} has no metrics yet: wait until a step has been logged, or lower --logging-steps")
        return cls(name, record["command"], finished, record, entries, metric, run)

    @property
    def decides(self) -> str:
        """The metric that tells how good the model is, as it is shown."""
        return self.metric.removeprefix("eval_")

    def row(self) -> tuple[object, ...]:
        """Return its folder, steps, last training loss, best value of its metric, and the step of the saved model."""
        loss, results = _LOSSES[self.command], self.summary.get("results", {})
        losses = [entry[loss] for entry in self.entries if loss in entry]
        if not losses and "train_loss" in results:  # an earlier version did not log the last step
            losses = [results["train_loss"]]
        step = self.entries[-1]["step"] if self.entries else results.get("best_step", "")
        value, at = self._best() or ("", "")
        return self.name, f"{step}{' (unfinished)' * (not self.finished)}", losses[-1] if losses else "", value, at

    def _best(self) -> tuple[float, float] | None:
        """Return the metric of the saved model and its step; None: nothing has been measured."""
        measured = [entry for entry in self.entries if self.metric in entry]
        if not measured:
            return None
        saved = self.summary.get("results", {}).get("best_step")
        if at_saved := [entry for entry in measured if entry["step"] == saved]:
            best = at_saved[-1]
        elif self.command == "finetune":  # the rule by which a run chooses, in which the loss decides between equals
            best = max(measured, key=lambda entry: score_of(entry, self.decides))
        else:
            best = min(measured, key=lambda entry: entry[self.metric])
        return best[self.metric], best["step"]

    def settings(self) -> dict[str, object]:
        """Return its settings by flag, without a number of epochs that --max-steps overrides."""
        settings = self.record["settings"]
        unused = ["--num-train-epochs"] if settings.get("--max-steps") else []
        return {name: value for name, value in settings.items() if name not in unused}


def compare(settings: CompareSettings) -> None:
    """Print a table of the runs and one of the inputs and settings in which they differ, and plot their curves.

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
    print(_results(runs))
    if different := _differences(runs):
        print(_table(["input or setting", *settings.runs], different))
    loss = _LOSSES[first.command]
    if not any(key in entry for run in runs for entry in run.entries for key in (loss, run.metric)):
        print("no plot: there is neither a loss nor a metric yet")
        return
    curves = {run.name: Curves(run.entries, run.metric) for run in runs}
    if draw_curves(Path(settings.plot), counted(len(runs), "run"), curves, loss=loss):
        print(f"plot written to {settings.plot}")
    else:
        print(f"no plot: it requires matplotlib: {install_command('plots')}")


def _results(runs: Sequence[ComparedRun]) -> str:
    """Return the table of results; each run shows the metric that decides for it."""
    metrics = list(dict.fromkeys(run.decides for run in runs if run.metric))
    rows = [run.row() for run in runs]
    if len(metrics) <= 1:
        return _table(["run", "steps", "training loss", f"best {(*metrics, 'metric')[0]}", "at step"], rows)
    with_metrics = [(*row[:3], run.decides, *row[3:]) for run, row in zip(runs, rows, strict=True)]
    table = _table(["run", "steps", "training loss", "metric", "best value", "at step"], with_metrics)
    return f"{table}The runs have different metrics, {', '.join(metrics)}: compare only values of the same one.\n"


def _differences(runs: Sequence[ComparedRun]) -> list[tuple[str, ...]]:
    """Return what differs in inputs, settings and devices: its name, and the value of each run."""
    settings = [{name: _cell(value) for name, value in run.settings().items()} for run in runs]
    machines = [{name: str(run.summary[name]) for name in _MACHINE if name in run.summary} for run in runs]
    return [*_different_inputs(runs), *_different(settings, "null"), *_different(machines, "unknown")]


def _different_inputs(runs: Sequence[ComparedRun]) -> Iterator[tuple[str, ...]]:
    """Yield the flag of each input whose contents differ, wherever its files are, and the input of each run."""
    for name in sorted({name for run in runs for name in run.record["inputs"]}):
        inputs = [run.record["inputs"].get(name, []) for run in runs]
        hashes = [[file["sha256"] for file in files] for files in inputs]
        if any(of_run != hashes[0] or "" in of_run for of_run in hashes[1:]):
            shared = {*hashes[0]}.intersection(*hashes[1:])
            yield name, *(_described(files, shared) for files in inputs)


def _different(values: Sequence[Mapping[str, str]], absent: str) -> Iterator[tuple[str, ...]]:
    """Yield the name of each value that differs between runs, and the value of each run.

    Args:
        values: Values of each run by name.
        absent: What is shown for a run that lacks the value.
    """
    for name in sorted({name for of_run in values for name in of_run}):
        row = [of_run.get(name, absent) for of_run in values]
        if len({*row}) > 1:
            yield name, *row


def _described(files: Sequence[FileRecord], shared: set[str]) -> str:
    """Return an input for the table: its name, and the first digits of the SHA-256 of a file that tells it from others.

    Args:
        files: Its files, several if it is a model's folder.
        shared: Hashes of files that all runs have.
    """
    if not files:
        return "none"
    changed = [file for file in files if file["sha256"] not in shared] or list(files)
    path, digest = Path(changed[0]["path"]), changed[0]["sha256"][:_DIGITS] or "unknown"
    if len(files) == 1:
        return f"{path.name} {digest}"
    more = f" and {len(changed) - 1} more" * (len(changed) > 1)
    return f"{_name_of_model(path.parent)}: {path.name} {digest}{more}"


def _name_of_model(folder: Path) -> str:
    """Return the name of a model's folder; of one in the cache of the Hugging Face hub, the model's id."""
    if folder.parent.name == "snapshots":
        return folder.parents[1].name.removeprefix("models--").replace("--", "/")
    return folder.name


def _cell(value: object) -> str:
    """Return a value of a setting for the table, in JSON; of a hash, the first digits."""
    if isinstance(value, str) and _HASH.fullmatch(value):
        return value[:_DIGITS]
    return json.dumps(value, ensure_ascii=False)


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table whose columns are aligned."""
    cells = [[f"{value:.6g}" if isinstance(value, float) else str(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells) + "\n"
