"""The columns, measures and submissions of the benchmarks of sentences and pairs (Wang et al., 2019), as published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark's files are laid out, and how answers to it are judged and sent in.

    Attributes:
        text, pair, label: names of columns.
        metrics: measures, the one that decides first.
        header: the columns of files of labelled rows whose first line is a row already.
        submission: the file that the server wants, with the columns index and prediction.
        unlabelled: a label that says that there is none: such rows are no part of the data.
        regression: labels are numbers.
    """

    text: str
    pair: str | None = None
    label: str = "label"
    metrics: Sequence[str] = ("accuracy", "loss")
    header: Sequence[str] | None = None
    submission: str | None = None
    unlabelled: str | None = None
    regression: bool = False


_PAIR = ("sentence1", "sentence2")
_F1 = ("f1", "accuracy", "loss")

BENCHMARKS = {
    "cola": Benchmark(
        "sentence",
        metrics=("matthews_correlation", "accuracy", "loss"),
        header=("source", "label", "star", "sentence"),
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
