"""Pairs and triplets of texts, with or without scores, from the files that train embeddings.

Shapes: E examples, C texts of each.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bertfast.runtime.settings import counted
from bertfast.tasks.glue import BENCHMARKS, infer_benchmark
from bertfast.tasks.labels import REGRESSION, read_label, sorted_numbers
from bertfast.tasks.rows import BadRows, Rows
from bertfast.tasks.settings import ColumnSettings
from bertfast.tasks.tables import BLANK, Table, not_text
from bertfast.tasks.task import usable_labels

FIRST_COLUMNS = ("anchor", "query", "question", "sentence1")
SECOND_COLUMNS = ("positive", "pos", "answer", "passage", "document", "context", "sentence2")
SCORE_COLUMNS = ("score", "label")
NEGATIVE = re.compile(r"neg(?:atives?)?[ _]?\d*")
NEEDED = "anchor and positive, optionally negative, or sentence1, sentence2 and score"
"""The columns that embeddings need, for messages."""


@dataclass(frozen=True, eq=False)
class TextGroups:
    """Groups of texts that belong together, or do not.

    Attributes:
        texts: C texts per example: an anchor and its positive, or the two texts of a pair; then negatives.
        rows: The rows that they come from.
        scores: How similar the two texts of each pair are; None: the second is similar to the first.
    """

    texts: list[tuple[str, ...]]
    rows: Rows
    scores: list[float] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Sequence[int]) -> TextGroups:
        """Return the examples at `indices`."""
        scores = None if self.scores is None else [self.scores[i] for i in indices]
        return TextGroups([self.texts[i] for i in indices], self.rows.select(indices), scores)

    def has_negatives(self) -> bool:
        """Return whether an anchor has a negative: a text after an anchor that is not one of its own positives."""
        candidates = {text for _, *others in self.texts for text in others}
        positives: dict[str, set[str]] = {}
        for anchor, positive, *_ in self.texts:
            positives.setdefault(anchor, set()).add(positive)
        return any(len(of_anchor) < len(candidates) for of_anchor in positives.values())


@dataclass(frozen=True)
class GroupColumns:
    """Names of the columns of a table: those of the texts, and that of the score if there is one."""

    texts: tuple[str, ...]
    score: str | None

    @classmethod
    def choose(cls, table: Table, columns: ColumnSettings) -> GroupColumns:
        """Return the named columns; for those that are not named, the default names if the table has them.

        Raises:
            ValueError: There are no two columns of texts, or scores besides negatives.
        """
        known = infer_benchmark(table.columns)
        of_benchmark = [] if known is None else [BENCHMARKS[known].text, BENCHMARKS[known].pair]
        chosen = [
            named or next((name for name in (*names, default) if name in table.columns), None)
            for named, names, default in zip(
                (columns.text_column, columns.text_pair_column),
                (FIRST_COLUMNS, SECOND_COLUMNS),
                of_benchmark or [None, None],
                strict=True,
            )
        ]
        texts = [name for name in chosen if name is not None]
        if len(texts) < 2:
            raise ValueError(
                f"{table.path} has no columns {NEEDED}, {table.found}: name those of the two texts with --text-column "
                "and --text-pair-column"
            )
        table.require_different(*texts)
        negatives = [name for name in table.columns if NEGATIVE.fullmatch(name) and name not in texts]
        names = (*SCORE_COLUMNS, *([] if known is None else [BENCHMARKS[known].label]))
        score = columns.label_column or next((name for name in names if name in table.columns), None)
        if negatives and columns.label_column is not None:
            raise ValueError(
                f"{table.path} has the column {negatives[0]!r}, and examples with negatives have no scores: leave "
                "--label-column out, or rename that column"
            )
        return cls((*texts, *negatives), None if negatives else score)


def read_groups(table: Table, columns: ColumnSettings, *, labelled: bool) -> TextGroups:
    """Return the examples of a table.

    Args:
        table: The table.
        columns: Columns that are named.
        labelled: Whether each pair must have a score if any has one; else scores may be missing.

    Raises:
        ValueError: Columns are missing, or a row cannot be used and `on_bad_rows` is "stop".
    """
    chosen = GroupColumns.choose(table, columns)
    texts: list[tuple[str, ...]] = []
    complete = []
    groups_of_rows = [
        _texts_of_row(chosen.texts, values) for values in zip(*map(table.column, chosen.texts), strict=True)
    ]
    counts = Counter(len(group) for group in groups_of_rows if isinstance(group, tuple))
    usual = max(counts, key=counts.__getitem__, default=0)  # of equally frequent ones, that of the first row
    for index, group in enumerate(groups_of_rows):
        if isinstance(group, tuple) and len(group) != usual:
            negatives = counted(len(group) - 2, "negative")
            group = f"{negatives} where other rows have {usual - 2}: give as many in each row"
        if isinstance(group, str):
            table.rows.reject(index, group)
        else:
            texts.append(group)
            complete.append(index)
    table = table.select(complete)
    groups = TextGroups(texts, table.rows)
    if chosen.score is None or (not labelled and chosen.score not in table.columns):
        return groups
    found = read_scores(table, chosen.score, "score", labelled=labelled)
    if found is None:
        return groups
    scores, usable = found
    return replace(groups.select(usable), scores=scores)


def _texts_of_row(names: Sequence[str], values: Sequence[Any]) -> tuple[str, ...] | str:
    """Return the texts of a row, or why it cannot be used.

    Args:
        names: Names of the columns of the anchor, the positive and negatives.
        values: Their values in the row: texts, in JSON also lists of texts, of which a positive has one. A shorter list
            than others has no value in the last columns.
    """
    texts: list[str] = []
    while len(values) > 2 and values[-1] is None:
        values = values[:-1]
    for column, (name, value) in enumerate(zip(names, values, strict=False)):
        found = value if column and isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in found):
            return f"column {name!r} {not_text(value)}"
        if not all(map(str.strip, found)):
            return f"column {name!r} {BLANK}"
        if column == 1 and len(found) != 1:
            return f"column {name!r} holds {counted(len(found), 'text')}: write a row for each positive"
        texts += found
    return tuple(texts)


def read_scores(table: Table, column: str, noun: str, *, labelled: bool) -> tuple[list[float], list[int]] | None:
    """Return the numbers of a column, and the indices of their rows; see `usable_labels`.

    Args:
        table: The table.
        column: The column.
        noun: What a number is called in messages.
        labelled: Whether each row needs one.

    Raises:
        ValueError: Rows need a number, and none has a usable one.
    """

    def parse(value: Any) -> float:
        text = read_label(value, REGRESSION)
        if not (isinstance(text, str) and sorted_numbers([text])):
            raise ValueError(f"the {noun} {value!r:.60} in column {column!r} is not a finite number")
        return float(text)

    found = usable_labels(table.column(column), parse, table.rows, labelled=labelled)
    if labelled and found is not None and not found[1]:
        raise ValueError(f"{table.path}: no row has a usable {noun}")
    return found


def parse_pairs(lines: Sequence[str], first_row: int, bad: BadRows, remedy: str) -> tuple[list[tuple[str, str]], Rows]:
    """Return the pairs of texts in lines of two that a tab separates, and their rows; reject other lines.

    Args:
        lines: The lines.
        first_row: Number of the first line.
        bad: Collects the lines that are rejected.
        remedy: What to give instead of such a line, for messages.
    """
    rows = Rows.of_input(len(lines), first_row, bad)
    pairs: list[tuple[str, str]] = []
    usable = []
    for index, line in enumerate(lines):
        texts = line.split("\t")
        if len(texts) == 2 and all(map(str.strip, texts)):
            pairs.append((texts[0], texts[1]))
            usable.append(index)
        else:
            found = f"{len(texts)} texts separated by tabs" if len(texts) > 2 else "one text"
            found = "a blank text" if len(texts) == 2 else found
            rows.reject(index, f"{found}: give {remedy}")
    return pairs, rows.select(usable)
