"""`bertfast evaluate`: how good a model's answers are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bertfast.tasks.classification import Columns, encode_labels, featurize, label_numbers
from bertfast.tasks.metrics import measure, require_libraries
from bertfast.tasks.pretrained import sequence_length
from bertfast.tasks.tables import read_table
from bertfast.training.predict import TaskSettings, open_classifier, predict_logits, write_predictions
from bertfast.training.validation import evaluate_masked_lm


@dataclass(kw_only=True)
class EvaluateSettings(TaskSettings):
    """What to evaluate, and on what.

    Attributes:
        validation_file: A .tsv or .jsonl file with labels; with objective mlm, any text.
        label_column: Column of the label; none: label.
        objective: task judges the answers of a fine-tuned model, mlm how well a model fills blanks in a text.
        output_dir: Folder for eval_results.json and, of a task, predictions_validation.tsv; none: print only.
    """

    validation_file: str
    label_column: str | None = None
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


def write_results(path: Path, metrics: dict[str, float]) -> None:
    """Write metrics as JSON, in a folder that is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def _evaluate_task(settings: EvaluateSettings) -> dict[str, float]:
    require_libraries()
    table = read_table(settings.validation_file)
    columns = Columns.choose(table, settings.text_column, settings.text_pair_column, settings.label_column)
    model, tokenizer = open_classifier(settings)
    labels = encode_labels(table, columns.label, label_numbers(model.config))
    length = sequence_length(settings.max_seq_length, model.config)
    features = featurize(table, columns, tokenizer, length, labels)
    logits = predict_logits(model, features, settings.eval_tokens, settings.precision)
    metrics = measure(logits, labels)
    if settings.output_dir is not None:
        Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
        write_predictions(Path(settings.output_dir, "predictions_validation.tsv"), logits, model.config)
    return {f"eval_{name}": value for name, value in metrics.items()} | {"eval_samples": len(features)}


def _evaluate_text(settings: EvaluateSettings) -> dict[str, float]:
    return evaluate_masked_lm(
        settings.model_name_or_path,
        settings.validation_file,
        max_seq_length=settings.max_seq_length,
        tokens_per_batch=settings.eval_tokens,
        precision=settings.precision,
        device=settings.device,
    )
