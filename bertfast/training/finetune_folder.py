"""Output folder of a fine-tuning run: what its results depend on, and which of its files a new run replaces."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bertfast.data.text_files import read_json, require_file
from bertfast.models.files import model_files, resolve
from bertfast.models.sentence_folder import CONTENTS
from bertfast.runtime.atomic_write import remove
from bertfast.runtime.output_folder import Origin, OriginError, check_contents, locked_folder, read_record
from bertfast.runtime.settings import counted, flag, settings_of
from bertfast.tasks.rows import BadRows
from bertfast.tasks.settings import TaskSettings
from bertfast.tasks.task import write_rows
from bertfast.training.checkpoint import CHECKPOINTS, checkpoints, holds
from bertfast.training.checkpoint_settings import CheckpointSettings
from bertfast.training.finetune_settings import FinetuneSettings
from bertfast.training.report_plots import PLOTS
from bertfast.training.report_settings import MetricsWriterSettings

logger = logging.getLogger("bertfast")

RESULTS = "all_results.json"  # written at the end of a run
RUN = "run.json"  # settings, versions and results
SCRATCH = ".features"  # hidden states of a feature-based run, removed at its end
SKIPPED_ROWS = "skipped_rows.tsv"
SWEEP_SCORE = "sweep_score.json"  # result of a finished run of a sweep
SWEEP_RUNGS = "sweep_rungs.json"  # scores of a run of a sweep at the steps at which it was paused
# What `Task.write_predictions` writes, and what `Task.report` returns.
PREDICTIONS = ("predictions_*", "nbest_*", "null_odds_*", "skipped_*", "report_*")
# What a run writes, except for metrics.jsonl, of which a run that was killed early leaves a part.
_CONTENTS = (
    CHECKPOINTS,
    "config.json",
    "model*.safetensors*",
    "adapter_*",
    RESULTS,
    RUN,
    *PLOTS,
    SWEEP_SCORE,
    SWEEP_RUNGS,
    "tensorboard/events.out.tfevents.*",
    *PREDICTIONS,
    *CONTENTS,
)
_MODELS = ("model_name_or_path", "init_from_task")
_DATA = ("train_file", "validation_file", "test_file")
# Settings that results do not depend on: where and how fast they are computed, and where they are written.
_NO_INFLUENCE = (
    "output_dir",
    "overwrite_output_dir",
    "features_dir",
    "device",
    "cuda_graph",
    "eval_tokens",
    "logging_steps",
    *settings_of(CheckpointSettings),
    *settings_of(MetricsWriterSettings),
)


@contextmanager
def finetune_folder(settings: FinetuneSettings) -> Iterator[Callable[[], None]]:
    """Lock the output folder of a run, and refuse it if it has results that are neither replaced nor continued.

    Yields:
        A function to call before the first write: it removes results that are to be overwritten, and records what the
        run is made from.

    Raises:
        OriginError: The folder has results.
        ValueError: Another process writes to it, the initial model or the data is in it, or the run to resume had other
            inputs or settings.
    """
    folder = Path(settings.output_dir)
    with locked_folder(folder):
        begin = _check_folder(settings, folder)
        remove(folder / SCRATCH)  # of a run that was killed
        try:
            yield begin
        finally:
            remove(folder / SCRATCH)


def _check_folder(settings: FinetuneSettings, folder: Path) -> Callable[[], None]:
    """Compare a run with the record in its locked output folder; return the function that begins it."""
    resume, overwrite = settings.checkpoint.resume, settings.overwrite_output_dir
    saved, origin = checkpoints(folder / CHECKPOINTS), finetune_origin(settings, "finetune")
    try:
        begin = check_contents(folder, origin, _CONTENTS, overwrite=overwrite, continues=resume or bool(saved))
    except OriginError as error:
        if not resume or read_record(folder) is None:  # there is no run to resume
            raise
        raise ValueError(
            f"{error.problem}: repeat the command of that run with --resume added, or choose another --output-dir"
        ) from None
    if saved and not (resume or overwrite):
        raise holds(folder, "run: add --resume to continue it")
    return begin


def read_results(folder: Path) -> dict[str, Any] | None:
    """Return the results of a finished run; None: it is not finished, or its results are damaged, which is logged."""
    path = folder / RESULTS
    if not path.exists():
        return None
    try:
        return read_json(path)
    except ValueError as error:
        logger.warning("the run is repeated: %s", error)
        return None


def write_skipped_rows(folder: Path, bad: BadRows) -> None:
    """Write `SKIPPED_ROWS`: file, number, id and reason of each row of any split that has no example; say how many."""
    rows = [
        (file, number, "" if skipped.id is None else skipped.id, skipped.problem)
        for file, of_file in bad.skipped.items()
        for number, skipped in sorted(of_file.items())
    ]
    if rows:
        write_rows(folder / SKIPPED_ROWS, ("file", "row", "id", "skipped"), rows)
    if bad.count:
        logger.warning("%s skipped, see %s", counted(bad.count, "invalid row"), folder / SKIPPED_ROWS)


def finetune_origin(settings: TaskSettings, command: str) -> Origin:
    """Return what the results of a run, a sweep or an evaluation depend on.

    Raises:
        FileNotFoundError: There is no such model or file.
    """
    values = settings.flat()
    inputs: dict[str, list[Path]] = {}
    for name in _DATA:
        if values.get(name) is not None:
            require_file(values[name], flag(name))
            inputs[flag(name)] = [Path(values[name])]
    for name in _MODELS:
        if values.get(name) is not None:
            inputs[flag(name)] = model_files(resolve(values[name]))
    left_out = {*_MODELS, *_DATA, *_NO_INFLUENCE}
    return Origin(inputs, {flag(name): value for name, value in values.items() if name not in left_out}, command)
