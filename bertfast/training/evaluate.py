"""`bertfast evaluate`: metrics of a fine-tuned model on labelled data, or of a masked LM on text."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from bertfast.data.corpus import find_files
from bertfast.data.text_files import copy_stream, is_stream, named_stream
from bertfast.inference.frozen import freeze_on_cpu, require_own_precision
from bertfast.inference.predict import open_finetuned, predict_outputs
from bertfast.models.files import model_files, resolve
from bertfast.runtime.atomic_write import write_atomically
from bertfast.runtime.extras import install_command
from bertfast.runtime.output_folder import Origin, check_contents, locked_folder
from bertfast.runtime.plotting import plot_title
from bertfast.runtime.precision import choose_precision
from bertfast.runtime.settings import flag, given, refuse_without_effect
from bertfast.tasks.features import CutTexts
from bertfast.tasks.settings import MANY_TOKENS, TaskSettings
from bertfast.training.finetune_folder import PREDICTIONS, finetune_origin
from bertfast.training.report_plots import PLOTS, draw_report, report_file
from bertfast.training.validation import evaluate_masked_lm

logger = logging.getLogger("bertfast")

_CONTENTS = ("eval_results.json", *PLOTS, *PREDICTIONS)


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(TaskSettings):
    """Settings of an evaluation.

    Attributes:
        validation_file: Labelled data as for fine-tuning; with --objective mlm, a text file or folder. "-" is standard
            input; it, and a pipe, are copied to a temporary file.
        objective: task: metrics of the predictions of a fine-tuned model; mlm: masked-LM metrics of a model on text.
        output_dir: Output folder for eval_results.json and, with --objective task, predictions, report_validation.json
            (scores of each class), confusion.png and precision_recall.png. If not given: print only.
        overwrite_output_dir: Replace the results of another evaluation in --output-dir.
    """

    unused = ("embedding",)

    validation_file: str
    objective: Literal["task", "mlm"] = "task"
    output_dir: str | None = None
    overwrite_output_dir: bool = False

    def validate(self) -> None:
        super().validate()
        if self.output_dir is None:
            flags = {"--overwrite-output-dir"}.intersection(given(self))
            refuse_without_effect(flags, "there is no --output-dir")
        if self.objective == "mlm":
            flags = {"--task"}.intersection(given(self)).union(given(self.columns), given(self.question_answering))
            refuse_without_effect(sorted(flags), "--objective mlm evaluates on plain text")
            if self.compute.precision == "int8":
                raise ValueError("--precision int8 is for --objective task: choose another --precision")


def evaluate(settings: EvaluateSettings) -> dict[str, float]:
    """Evaluate a model: print its metrics, write them to `output_dir`, and return them.

    Raises:
        OriginError: The folder has results of another model, other data or other settings.
        ValueError: Another process writes to the folder, or model, data and settings do not fit together.
    """
    with _with_file(settings) as settings:
        return _evaluate_file(settings)


@contextmanager
def _with_file(settings: EvaluateSettings) -> Iterator[EvaluateSettings]:
    """Yield settings whose text is a file: standard input and pipes, which can be read only once, are copied to one."""
    name = settings.validation_file
    if not is_stream(name):
        yield settings
        return
    suffix = Path(name).suffix or (".txt" if settings.objective == "mlm" else "")
    with TemporaryDirectory() as folder:
        copy = Path(folder, f"standard-input{suffix}")
        with named_stream(name, copy):
            copy_stream(name, copy)
            yield settings.replace(validation_file=str(copy))


def _evaluate_file(settings: EvaluateSettings) -> dict[str, float]:
    if settings.output_dir is None:
        return _evaluate(settings)[0]
    folder = Path(settings.output_dir)
    with locked_folder(folder):
        begin = check_contents(folder, _origin(settings), _CONTENTS, overwrite=settings.overwrite_output_dir)
        metrics, write_predictions = _evaluate(settings)
        begin()
        write_predictions(folder)
        write_results(folder / "eval_results.json", metrics)
    return metrics


def _origin(settings: EvaluateSettings) -> Origin:
    """Return what the results depend on."""
    if settings.objective == "task":
        return finetune_origin(settings, "evaluate")
    inputs = {
        "--model-name-or-path": model_files(resolve(settings.model_name_or_path)),
        "--validation-file": find_files([settings.validation_file]),
    }
    values = settings.flat()  # batches, and with them the masked tokens, depend on --eval-tokens
    names = ("objective", "max_seq_length", "precision", "eval_tokens")
    values["eval_tokens"] = _tokens_of_text(settings)
    return Origin(inputs, {flag(name): values[name] for name in names}, "evaluate")


def write_results(path: Path, metrics: Mapping[str, object]) -> None:
    """Write metrics as JSON; create the folder if necessary."""
    write_atomically(path, json.dumps(metrics, indent=2) + "\n")


def print_metrics(metrics: Mapping[str, float]) -> None:
    """Print one metric per line."""
    for name, value in metrics.items():
        print(f"{name:<28}{value:>12.6g}")


def _evaluate(settings: EvaluateSettings) -> tuple[dict[str, float], Callable[[Path], None]]:
    """Compute and print metrics; return them, and a function that writes predictions and plots to a folder."""
    if settings.objective == "task":
        metrics, write_predictions = _evaluate_task(settings)
    else:
        metrics, write_predictions = _evaluate_text(settings), lambda folder: None
    print_metrics(metrics)
    return metrics, write_predictions


def _evaluate_task(settings: EvaluateSettings) -> tuple[dict[str, float], Callable[[Path], None]]:
    task, model, tokenizer = open_finetuned(settings)
    require_own_precision(model, settings.compute.precision)
    with task.bad_rows.logged():
        examples = task.read(settings.validation_file, labelled=True)
        length = task.max_length()
        examples, features = task.featurize(examples, tokenizer, length)
    reasons = task.unmeasurable(examples, features)
    if reasons and {*task.metrics} <= {*reasons}:
        raise ValueError(
            f"{settings.validation_file}: {reasons[task.metrics[0]]}, so nothing can be measured: give other data"
        )
    cut = CutTexts(settings.validation_file, length)
    cut.add(features)
    precision = choose_precision(model.device, settings.compute.precision, model.config)
    if precision == "int8":
        freeze_on_cpu(model, precision, features, lambda inputs: task.logits(model, inputs))
    outputs = predict_outputs(task, model, features)
    cut.report()
    metrics = task.measure(examples, features, outputs)

    def write_predictions(folder: Path) -> None:
        task.write_predictions(folder, "validation", examples, features, outputs)
        report = task.report(examples, features, outputs)
        if report:
            write_results(folder / report_file("validation"), report)
            title = plot_title(settings.model_name_or_path, model.device, precision)
            if not draw_report(report, folder, title):
                logger.info("No confusion.png: plots require matplotlib: %s", install_command("plots"))

    skipped = {"bad_rows": task.bad_rows.count} if task.bad_rows.count else {}
    metrics = {f"eval_{name}": value for name, value in metrics.items()} | {"eval_samples": len(examples)} | skipped
    return metrics, write_predictions


def _evaluate_text(settings: EvaluateSettings) -> dict[str, float]:
    precision = settings.compute.precision
    assert precision != "int8"  # `validate` refuses it
    return evaluate_masked_lm(
        settings.model_name_or_path,
        settings.validation_file,
        max_seq_length=settings.max_seq_length,
        tokens_per_batch=_tokens_of_text(settings),
        precision=precision,
        device=settings.compute.device,
    )


def _tokens_of_text(settings: EvaluateSettings) -> int:
    """Return the tokens per batch of --objective mlm, on which the masked tokens depend, so not on the device."""
    return settings.compute.eval_tokens or MANY_TOKENS
