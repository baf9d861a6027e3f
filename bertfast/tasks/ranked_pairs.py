"""Pairs of a query and a document, one or a list of them per row, from the files that train rerankers."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bertfast.runtime.settings import counted
from bertfast.tasks.rows import Rows
from bertfast.tasks.settings import ColumnSettings
from bertfast.tasks.tables import BLANK, Table
from bertfast.tasks.text_groups import FIRST_COLUMNS, NEGATIVE, SCORE_COLUMNS, SECOND_COLUMNS, read_scores

POSITIVES = ("positive", "pos")
DOCUMENT_LISTS, LIST_LABELS = ("docs", "documents"), ("labels", "scores")  # columns of lists
_LARGEST = float(np.finfo(np.float32).max)  # label
NEEDED = "query, document and label; query, positive and negative; or in JSON query, docs and labels"
"""The columns that rerankers need, for messages."""

logger = logging.getLogger("bertfast")


@dataclass(frozen=True, eq=False)
class RankedPairs:
    """Pairs of a query and a document.

    Attributes:
        pairs: The pairs of all rows.
        sizes: Number of pairs of each row.
        rows: The rows.
        labels: How well the document of each pair answers its query; None: unknown.
        lists: Whether rows are lists of documents.
    """

    pairs: list[tuple[str, str]]
    sizes: list[int]
    rows: Rows
    labels: list[float] | None = None
    lists: bool = False

    def __len__(self) -> int:
        return len(self.pairs)

    def row_of_pair(self) -> list[int]:
        """Return the index of the row that each pair comes from."""
        return [row for row, size in enumerate(self.sizes) for _ in range(size)]

    def select(self, indices: Sequence[int]) -> RankedPairs:
        """Return the pairs at `indices`, in ascending order, and the rows of which there are any."""
        row_of_pair = self.row_of_pair()
        sizes = Counter(row_of_pair[i] for i in indices)
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        pairs = [self.pairs[i] for i in indices]
        return RankedPairs(pairs, [*sizes.values()], self.rows.select(sizes), labels, self.lists)


def read_ranked_pairs(table: Table, columns: ColumnSettings, *, labelled: bool) -> RankedPairs:
    """Return the pairs of a table.

    Args:
        table: The table.
        columns: Columns that are named.
        labelled: Whether each pair must have a label; else labels may be missing.

    Raises:
        ValueError: Columns are missing, or a row cannot be used and `on_bad_rows` is "stop".
    """
    query = columns.text_column or next((name for name in FIRST_COLUMNS if name in table.columns), None)
    if query is None:
        raise ValueError(
            f"{table.path} has no columns {NEEDED}, {table.found}: name those of the two texts with --text-column and "
            "--text-pair-column"
        )
    documents = next((name for name in DOCUMENT_LISTS if name in table.columns), None)
    if (positive := positive_column(table, columns)) is not None:
        table = table.with_texts(query, blank=False)
        return _from_rows(table, query, [*_positives_and_negatives(table, positive)])
    if columns.text_pair_column is None and documents is not None and _holds_lists(table, documents):
        table = table.with_texts(query, blank=False)
        return _from_rows(table, query, [*_documents_and_labels(table, documents, labelled)])
    return _single_pairs(table, query, columns, labelled=labelled)


def positive_column(table: Table, columns: ColumnSettings) -> str | None:
    """Return the column of the documents labelled 1 of a table in which columns say that; None: labels say it."""
    names = POSITIVES if columns.text_pair_column is None else ()
    return next((name for name in names if name in table.columns), None)


_Row = tuple[list[str], list[float] | None] | str
"""The documents of a row and their labels, or why it cannot be used."""


def _from_rows(table: Table, query: str, rows: list[_Row]) -> RankedPairs:
    """Return the pairs of rows that are lists."""
    pairs: list[tuple[str, str]] = []
    labels: list[float] = []
    sizes, usable, known = [], [], True
    for index, (text, row) in enumerate(zip(table.column(query), rows, strict=True)):
        if isinstance(row, str):
            table.rows.reject(index, row)
            continue
        documents, of_documents = row
        pairs += [(text, document) for document in documents]
        labels += of_documents or []
        known &= of_documents is not None
        sizes.append(len(documents))
        usable.append(index)
    if labels and not known:
        logger.warning("no metrics of %s, as not all labels are known", table.path)
    return RankedPairs(pairs, sizes, table.rows.select(usable), labels if known else None, lists=True)


def _positives_and_negatives(table: Table, positive: str) -> Iterator[_Row]:
    """Yield the documents of rows with a column of positives and perhaps negatives: texts or lists of texts."""
    negatives = [name for name in table.columns if NEGATIVE.fullmatch(name)]
    for index in range(len(table)):
        found: dict[str, list[str]] = {}
        problem = None
        for name in (positive, *negatives):
            value = table.columns[name][index]
            texts = [value] if isinstance(value, str) else [] if value is None else value
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                problem = f"column {name!r} holds {_shown(value)}, not a text or a list of texts"
                break
            if not all(map(str.strip, texts)):
                problem = f"column {name!r} {BLANK}"
                break
            found[name] = texts
        if problem is None and not found[positive]:
            problem = f"column {positive!r} is missing or empty"
        if problem is not None:
            yield problem
            continue
        others = [text for name in negatives for text in found[name]]
        yield [*found[positive], *others], [1.0] * len(found[positive]) + [0.0] * len(others)


def _documents_and_labels(table: Table, column: str, labelled: bool) -> Iterator[_Row]:
    """Yield the documents of rows with a column of lists, and the labels in another column of lists."""
    labels = next((name for name in LIST_LABELS if name in table.columns), None)
    if labels is None and labelled:
        raise ValueError(f"{table.path} has the column {column!r} of lists, and no column 'labels' of as many labels")
    for index, documents in enumerate(table.column(column)):
        values = None if labels is None else table.columns[labels][index]
        if not isinstance(documents, list) or not documents or not all(isinstance(x, str) for x in documents):
            yield f"column {column!r} holds {_shown(documents)}, not a list of texts"
        elif not all(map(str.strip, documents)):
            yield f"column {column!r} {BLANK}"
        else:
            found = _labels_of(values, labels, len(documents))
            if isinstance(found, str) and labelled:
                yield found
            else:
                yield documents, None if isinstance(found, str) else found


def _labels_of(values: Any, column: str | None, count: int) -> list[float] | str:
    """Return the labels of `count` documents in a column of lists, or what is wrong with them."""
    if not isinstance(values, list) or not all(type(x) in (int, float) for x in values):
        return f"column {column!r} holds {_shown(values)}, not a list of numbers"
    if (wrong := next((x for x in values if not abs(x) <= _LARGEST), None)) is not None:
        return f"the label {wrong!r:.60} in column {column!r} is not a finite number"
    if len(values) != count:
        return f"{counted(len(values), 'number')} in column {column!r} and {counted(count, 'document')}"
    return [float(x) for x in values]


def _holds_lists(table: Table, column: str) -> bool:
    return any(isinstance(value, list) for value in table.column(column))


def _shown(value: Any) -> str:
    return f"{json.dumps(value, ensure_ascii=False):.60}"


def _single_pairs(table: Table, query: str, columns: ColumnSettings, *, labelled: bool) -> RankedPairs:
    """Return the pairs of rows that are one pair each."""
    second = columns.text_pair_column or next((name for name in SECOND_COLUMNS if name in table.columns), None)
    if second is None:
        raise ValueError(
            f"{table.path} has no columns {NEEDED}, {table.found}: name that of the documents with --text-pair-column"
        )
    table.require_different(query, second)
    table = table.with_texts(query, second, blank=False)
    texts = [*zip(table.column(query), table.column(second), strict=True)]
    pairs = RankedPairs(texts, [1] * len(texts), table.rows)
    label = columns.label_column or next((name for name in SCORE_COLUMNS if name in table.columns), SCORE_COLUMNS[-1])
    if not labelled and label not in table.columns:
        return pairs
    found = read_scores(table, label, "label", labelled=labelled)
    if found is None:
        return pairs
    labels, usable = found
    return replace(pairs.select(usable), labels=labels)
