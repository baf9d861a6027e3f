"""Output folder of a fine-tuning run: what its results depend on, and which of its files a new run replaces."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bertfast.data.text_files import require_file
from bertfast.models.files import model_files, resolve
from bertfast.runtime.atomic_write import remove
from bertfast.runtime.output_folder import Origin, check_contents, locked_folder
from bertfast.runtime.settings import counted, flag
from bertfast.tasks.rows import BadRows
from bertfast.tasks.settings import TaskSettings
from bertfast.tasks.task import write_rows
from bertfast.training.finetune_settings import FinetuneSettings

logger = logging.getLogger("bertfast")

SCRATCH = ".features"  # hidden states of a feature-based run, removed at its end
SKIPPED_ROWS = "skipped_rows.tsv"
PREDICTIONS = ("predictions_*", "nbest_*", "null_odds_*", "skipped_*")  # what `Task.write_predictions` writes
# What a run writes, except for metrics.jsonl, of which a run that was killed early leaves a part.
_CONTENTS = ("config.json", "model*.safetensors*", "all_results.json", "sweep_score.json", *PREDICTIONS)
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
)


@contextmanager
def finetune_folder(settings: FinetuneSettings) -> Iterator[Callable[[], None]]:
    """Lock the output folder of a run, and refuse it if it has results that are not to be overwritten.

    Yields:
        A function to call before the first write: it removes results that are to be overwritten, and records what the
        run is made from.

    Raises:
        OriginError: The folder has results.
        ValueError: Another process writes to it, or the initial model or the data is in it.
    """
    folder = Path(settings.output_dir)
    with locked_folder(folder):
        origin = finetune_origin(settings, "finetune")
        begin = check_contents(folder, origin, _CONTENTS, overwrite=settings.overwrite_output_dir, continues=False)
        remove(folder / SCRATCH)  # of a run that was killed
        try:
            yield begin
        finally:
            remove(folder / SCRATCH)


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
