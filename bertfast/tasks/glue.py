"""File layouts, metrics and submission files of GLUE (Wang et al., 2019) and SNLI, as published."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """File layout, metrics and submission format of a benchmark.

    Attributes:
        text: Column of the text.
        pair: Column of the second text; None: single texts.
        label: Column of the label.
        metrics: Names of metrics; the first selects the best model.
        submission: Name of the file that the evaluation server accepts (columns index and prediction), without .tsv.
        unlabelled: Label of rows without a gold label, which are dropped.
        regression: Whether labels are real numbers.
    """

    text: str
    pair: str | None = None
    label: str = "label"
    metrics: Sequence[str] = ("accuracy", "loss")
    submission: str | None = None
    unlabelled: str | None = None
    regression: bool = False


_PAIR = ("sentence1", "sentence2")
_F1 = ("f1", "accuracy", "loss")

BENCHMARKS = {
    "cola": Benchmark(
        "sentence",
        metrics=("matthews_correlation", "accuracy", "loss"),
        submission="CoLA",
    ),
    "sst-2": Benchmark("sentence", submission="SST-2"),
    "mrpc": Benchmark("#1 String", "#2 String", "Quality", metrics=_F1, submission="MRPC"),
    "sts-b": Benchmark(*_PAIR, "score", metrics=("spearmanr", "pearson", "loss"), submission="STS-B", regression=True),
    "qqp": Benchmark("question1", "question2", "is_duplicate", metrics=_F1, submission="QQP"),
    "mnli": Benchmark(*_PAIR, "gold_label", submission="MNLI-m", unlabelled="-"),
    "mnli-mm": Benchmark(*_PAIR, "gold_label", submission="MNLI-mm", unlabelled="-"),
    "ax": Benchmark(*_PAIR, submission="AX"),
    "qnli": Benchmark("question", "sentence", submission="QNLI"),
    "rte": Benchmark(*_PAIR, submission="RTE"),
    "wnli": Benchmark(*_PAIR, submission="WNLI"),
    "snli": Benchmark(*_PAIR, "gold_label", unlabelled="-"),
}

# Columns that tell a benchmark's files from others, labelled or not; the first that matches counts.
_COLUMNS = {
    "mrpc": {"#1 String", "#2 String"},
    "qqp": {"question1", "question2"},
    "qnli": {"question", "sentence"},
    "sts-b": {"sentence1", "sentence2", "score"},
    "snli": {"sentence1", "sentence2", "gold_label", "captionID"},
    "mnli": {"sentence1", "sentence2", "gold_label"},
    "cola": {"source", "label", "star", "sentence"},
}


def infer_benchmark(columns: Collection[str]) -> str | None:
    """Return the benchmark whose files have these columns; None for other files and where default names suffice."""
    return next((name for name, own in _COLUMNS.items() if own.issubset(columns)), None)


def columns_without_header(first_row: Sequence[str]) -> Sequence[str] | None:
    """Return the names of the columns of CoLA's labelled files, which have no header line; None for other files."""
    if len(first_row) == 4 and first_row[1] in ("0", "1") and first_row[2] in ("", "*"):
        return ("source", "label", "star", "sentence")
    return None
