"""`bertfast evaluate`: how good a model's answers are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bertfast.inference.predict import open_finetuned, predict_outputs
from bertfast.runtime.plotting import draw
from bertfast.tasks.metrics import require_libraries
from bertfast.tasks.pretrained import sequence_length
from bertfast.tasks.settings import TaskSettings
from bertfast.tasks.task import ConfusionMatrix, write_atomically
from bertfast.training.validation import evaluate_masked_lm

_LABELS_SHOWN = 30  # in a picture of which are taken for which


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(TaskSettings):
    """What to evaluate, and on what.

    Attributes:
        validation_file: A labelled file as in fine-tuning; with objective mlm, any text.
        objective: task judges the answers of a fine-tuned model, mlm how well a model fills blanks in a text.
        output_dir: Folder for eval_results.json and, of a task, the predictions and confusion.png; none: print only.
    """

    validation_file: str
    objective: Literal["task", "mlm"] = "task"
    output_dir: str | None = None


def evaluate(settings: EvaluateSettings) -> dict[str, float]:
    """Print the metrics as a table, write them where `settings` say, and return them."""
    metrics = _evaluate_task(settings) if settings.objective == "task" else _evaluate_text(settings)
    for name, value in metrics.items():
        print(f"{name:<28}{value:>12.6g}")
    if settings.output_dir is not None:
        write_results(Path(settings.output_dir, "eval_results.json"), metrics)
    return metrics


def write_results(path: Path, metrics: dict) -> None:
    """Write metrics as JSON, in a folder that is made if it is missing."""
    write_atomically(path, json.dumps(metrics, indent=2) + "\n")


def _evaluate_task(settings: EvaluateSettings) -> dict[str, float]:
    require_libraries()
    task, model, tokenizer = open_finetuned(settings)
    examples = task.read(settings.validation_file, labelled=True)
    length = sequence_length(settings.max_seq_length, model.config)
    examples, features = task.featurize(examples, tokenizer, length)
    outputs = predict_outputs(task, model, features)
    metrics = task.compute_metrics(examples, features, outputs)
    if settings.output_dir is not None:
        folder = Path(settings.output_dir)
        task.write_predictions(folder, "validation", examples, features, outputs)
        table = task.confusion_matrix(examples, features, outputs)
        if table is not None and len(table[0]) <= _LABELS_SHOWN and not draw_confusion(table, folder / "confusion.png"):
            print("No confusion.png: that wants `pip install bertfast[plots]`.")
    left_out = {"bad_rows": task.bad_rows.count} if task.bad_rows.count else {}
    return {f"eval_{name}": value for name, value in metrics.items()} | {"eval_samples": len(examples)} | left_out


def draw_confusion(table: ConfusionMatrix, path: Path) -> bool:
    """Draw which labels are taken for which, as shares of each row; False where matplotlib is not installed."""
    names, counts = table
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    side = 2.5 + 0.45 * len(names)

    def paint(axes) -> None:
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row, column in zip(*counts.nonzero(), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=color, fontsize=8)
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="predicted", ylabel="label")

    return draw(path, (side, side), paint)


def _evaluate_text(settings: EvaluateSettings) -> dict[str, float]:
    return evaluate_masked_lm(
        settings.model_name_or_path,
        settings.validation_file,
        max_seq_length=settings.max_seq_length,
        tokens_per_batch=settings.compute.eval_tokens,
        precision=settings.compute.precision,
        device=settings.compute.device,
    )
