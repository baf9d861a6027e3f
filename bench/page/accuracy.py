"""Accuracy of a fine-tuned model in int8 and bf16, compared with fp32."""

from __future__ import annotations

from typing import Any

from bench.end_to_end.int8_accuracy import MAX_LOSS, MIN_EQUAL, MIN_LOW_COSINE, MIN_MEAN_COSINE, main_metric
from bench.page.rows import TASKS, Result
from bench.page.text import table


def accuracy_text(result: Result) -> str:
    """Return the table of `bench.end_to_end.int8_accuracy`, "" for results of other programs."""
    if result.name != "int8_accuracy":
        return ""
    columns = ["development set", "precision", "metric", "equal predictions", "mean cosine", "first percentile"]
    tasks = result.values["tasks"].items()
    rows = [
        [TASKS[name], precision, *_cells(main_metric(task), found)]
        for name, task in tasks
        for precision, found in task["accuracy"].items()
    ]
    return (
        f"### Accuracy in int8\n\n"
        'The models of the rows "fine-tuned MiniLM" above, on whole development sets. In int8 they are calibrated on '
        f"the first {result.values['calibration_examples']} inputs, as in `bertfast predict`. Equal predictions have "
        "the same label as in fp32; cosines are between the vectors of texts, means over tokens, and those in fp32. "
        f"Goals of int8: {MIN_EQUAL:.1%} equal predictions, a Spearman correlation at most {MAX_LOSS} points lower, a "
        f"mean cosine of {MIN_MEAN_COSINE} and a first percentile of {MIN_LOW_COSINE} "
        f"(`bench/results/{result.file}`, measured by `bench/end_to_end/int8_accuracy.py`).\n\n{table(columns, rows)}\n"
    )


def _cells(metric: str, found: dict[str, Any]) -> list[str]:
    equal = f"{found['equal_predictions']:.2%}" if "equal_predictions" in found else ""
    title = {"spearmanr": "Spearman"}.get(metric, metric)
    cosines = [f"{found['cosine_mean']:.5f}", f"{found['cosine_p01']:.5f}"]
    return [f"{title} {100 * found['metrics'][metric]:.2f}", equal, *cosines]
