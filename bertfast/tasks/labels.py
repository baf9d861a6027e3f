"""Labels of sequence classification: as written in files, and as targets of single-label, multi-label or regression."""

from __future__ import annotations

import json
import logging
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# Values of `problem_type` in a model's configuration.
SINGLE_LABEL, REGRESSION, MULTI_LABEL = "single_label_classification", "regression", "multi_label_classification"
PROBLEM_TYPES = {"sequence-classification": SINGLE_LABEL, "regression": REGRESSION, "multi-label": MULTI_LABEL}
LABEL_SEPARATOR = ","  # of several labels in one field
LONGEST_LABEL = 1000  # characters; a longer one is a text or damage
_MAX_LABELS_SHOWN = 10  # in messages
_MISSING = {"na", "n/a", "#n/a", "<na>", "null", "none"}  # among numbers; nan is a number

logger = logging.getLogger("bertfast")

Label = str | list[str]
"""A label as written in the file, or the list of an example's labels if there may be several."""


def read_label(value: Any, problem_type: str | None) -> Label:
    """Return the label in a field without surrounding white space, "" if there is none; a list if multi-label.

    A list without labels is that of an example to which no label applies; [""] is that of a field that has no list.
    """
    if problem_type == MULTI_LABEL:
        names = (
            value.split(LABEL_SEPARATOR) if isinstance(value, str) else value if isinstance(value, list) else [value]
        )
        if any(name is None or isinstance(name, (list, dict)) for name in names):
            return [""]
        return [text for name in names if (text := _text_of(name))]
    return "" if value is None else _text_of(value)


def _text_of(value: Any) -> str:
    """Return the label that a value of JSON stands for."""
    return value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def names_of(label: Label) -> list[str]:
    """Return the names in a label."""
    return label if isinstance(label, list) else [label]


def shown(names: Sequence[str]) -> str:
    """Return the first names, separated by commas, for messages."""
    return ", ".join(names[:_MAX_LABELS_SHOWN]) + (", …" if len(names) > _MAX_LABELS_SHOWN else "")


def sorted_labels(labels: Sequence[str]) -> list[str]:
    """Return the distinct labels, sorted by value if all are integers, else alphabetically.

    Of spellings of one integer, such as 1 and 1.0, the shortest is returned; nan, inf and what stands for a missing
    value, such as n/a, are no labels among numbers.
    """
    spellings: dict[str, str] = {}
    for label in sorted({*labels}, key=len, reverse=True):
        spellings[canonical(label)] = label
    names = {*spellings.values()}
    if _numbers(names) is not None:
        names = {name for name in names if _is_finite(name)} or names
    integers = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name) if integers else 0, name))


def sorted_numbers(labels: Sequence[str]) -> list[str]:
    """Return the distinct labels of a regression that can be used, which are finite numbers, sorted by value."""
    return sorted(filter(_is_finite, {*labels}), key=float)


def require_classes(names: Sequence[str], file: str) -> None:
    """Warn of classes whose names differ in case, form of characters, sign or leading zeros only.

    Args:
        names: Names of the classes.
        file: The file that they come from.

    Raises:
        ValueError: There are fewer than two classes.
    """
    if len(names) < 2:
        every = f"every label is {names[0]!r}" if names else "there are no labels"
        raise ValueError(f"{file}: {every}; classification needs at least two different labels")
    alike: dict[str, list[str]] = {}
    for name in names:
        key = unicodedata.normalize("NFKC", name).casefold()
        alike.setdefault(re.sub(r"^\+?0*(?=\d)", "", key), []).append(name)
    for spellings in alike.values():
        if len(spellings) > 1:
            logger.warning(
                "%s: the labels %s are different classes: write them alike if they are one",
                file,
                " and ".join(map(repr, spellings)),
            )


def has_fractions(labels: Iterable[str]) -> bool:
    """Return whether all labels are numbers, and at least one is finite and not an integer."""
    return any(math.isfinite(value) and not value.is_integer() for value in _numbers(labels) or [])


class LabelEncoder:
    """Encodes labels as the targets of a model.

    Args:
        ids: Id of each label by its name.
        problem_type: Problem type of the model.
    """

    def __init__(self, ids: Mapping[str, int], problem_type: str | None):
        self.ids, self.problem_type = ids, problem_type
        self.canonical_ids = {canonical(name): i for name, i in ids.items()}
        self.num_labels = max(ids.values()) + 1

    def target(self, label: Label) -> float | np.ndarray:
        """Return the target of an example: a number, an id, or float32 [labels] of 0 and 1 if multi-label.

        Raises:
            ValueError: A label is unknown, or not a number.
        """
        names = names_of(label)
        if self.problem_type == REGRESSION:
            if not _is_finite(names[0]):
                raise ValueError(
                    f"the label {names[0]!r:.60} is not a finite number in fp32, which regression requires"
                )
            return float(names[0])
        targets = [self._id(name) for name in names]
        if self.problem_type != MULTI_LABEL:
            return targets[0]
        multi_hot = np.zeros(self.num_labels, np.float32)
        multi_hot[targets] = 1
        return multi_hot

    def _id(self, name: str) -> int:
        if not name:
            raise ValueError("no label")
        found = self.ids.get(name, self.canonical_ids.get(canonical(name)))
        if found is None and name.casefold() in _MISSING:
            raise ValueError(f"the label {name!r} stands for a missing value; if it is a class, rename it")
        if found is None:
            raise ValueError(f"unknown label {name!r:.60}; known labels: {shown([*self.ids])}")
        return found


def undefined_metrics(targets: np.ndarray, problem_type: str | None, names: Sequence[str]) -> dict[str, str]:
    """Return the metrics that labels leave undefined for any predictions, and why each is.

    Args:
        targets: The labels, encoded.
        problem_type: Problem type of the model.
        names: Names of its labels.
    """
    if problem_type == MULTI_LABEL:
        return {} if targets.any() else dict.fromkeys(("f1_micro", "f1_macro"), "no example has a label")
    constant = not np.ptp(targets)
    if problem_type == REGRESSION:
        return dict.fromkeys(("pearson", "spearmanr"), f"every label is {targets[0]:g}") if constant else {}
    found = {"f1": f"no label is {names[1]!r}"} if len(names) == 2 and not targets.any() else {}
    return found | ({"matthews_correlation": f"every label is {names[targets[0]]!r}"} if constant else {})


def canonical(label: str) -> str:
    """Return a label without the decimals of an integer: 1.0, as pandas writes it, is the label 1."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", label)


def _numbers(labels: Iterable[str]) -> list[float] | None:
    """Return the values of labels, of which some may be nan or missing; None if another is not a number."""
    labels = ["nan" if label.casefold() in _MISSING else label for label in labels]
    if any("_" in label for label in labels):  # float reads 1_0 as 10
        return None
    try:
        return list(map(float, labels))
    except ValueError:
        return None


def _is_finite(label: str) -> bool:
    [value] = _numbers([label]) or [math.nan]
    return abs(value) <= float(np.finfo(np.float32).max)  # false for NaN
