"""Metrics of named entities, which count whole entities as conlleval does."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from bertfast.tasks.class_report import class_scores
from bertfast.tasks.tag_schemes import entities


def entity_metrics(gold: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """Compute precision, recall and F1 of whole entities, given the true and the predicted tags of each sentence.

    All are NaN if there is no true entity; a precision of no predicted ones is 0.
    """
    correct, found, actual = (counter.total() for counter in _count(gold, predicted))
    if not actual:
        return dict.fromkeys(("precision", "recall", "f1"), math.nan)
    precision, recall = correct / max(found, 1), correct / actual
    f1 = 2 * precision * recall / (precision + recall) if correct else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def entity_scores(gold: list[list[str]], predicted: list[list[str]]) -> dict[str, dict[str, float]]:
    """Compute the scores of whole entities by type; see `class_scores`."""
    counters = _count(gold, predicted)
    _, found, actual = counters
    names = sorted({*actual, *found})
    return class_scores(names, *(np.array([counter[name] for name in names], np.int64) for counter in counters))


def _count(gold: list[list[str]], predicted: list[list[str]]) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Return the numbers of correct, of predicted and of true entities, by type."""
    correct, found, actual = Counter[str](), Counter[str](), Counter[str]()
    for tags, other_tags in zip(gold, predicted, strict=True):
        true_entities, predicted_entities = {*entities(tags)}, {*entities(other_tags)}
        actual.update(kind for kind, *_ in true_entities)
        found.update(kind for kind, *_ in predicted_entities)
        correct.update(kind for kind, *_ in true_entities & predicted_entities)
    return correct, found, actual
