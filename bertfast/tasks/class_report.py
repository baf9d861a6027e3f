"""Scores of each class, and the precision-recall curve of two classes, as JSON.

Shapes: C classes, E examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_POINTS = 200  # of a precision-recall curve


def class_scores(
    names: Sequence[str], correct: np.ndarray, predicted: np.ndarray, actual: np.ndarray
) -> dict[str, dict[str, float]]:
    """Return precision, recall and F1 of each class, and its number of examples; an undefined score is 0.

    Args:
        names: Names of the classes.
        correct: int [C], examples of the class that are predicted to be in the class.
        predicted: int [C], examples that are predicted to be of the class.
        actual: int [C], examples of the class.
    """
    precision, recall = correct / np.maximum(predicted, 1), correct / np.maximum(actual, 1)
    f1 = 2 * correct / np.maximum(predicted + actual, 1)
    columns = zip(names, precision.tolist(), recall.tolist(), f1.tolist(), actual.tolist(), strict=True)
    return {name: {"precision": p, "recall": r, "f1": f, "examples": n} for name, p, r, f, n in columns}


def confusion_report(names: Sequence[str], counts: np.ndarray) -> dict[str, Any]:
    """Return the scores of each class and the confusion matrix, int [C, C] by true and predicted class."""
    scores = class_scores(names, counts.diagonal(), counts.sum(0), counts.sum(1))
    return {"classes": scores, "confusion_matrix": {"labels": [*names], "counts": counts.tolist()}}


def precision_recall(name: str, scores: np.ndarray, positive: np.ndarray) -> dict[str, Any]:
    """Return the precision-recall curve of a class, and its average precision.

    Args:
        name: Name of the class.
        scores: float [E], probability of the class.
        positive: bool [E], whether an example is of the class; at least one must be.
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve

    precision, recall, _ = precision_recall_curve(positive, scores)
    kept = np.unique(np.linspace(0, len(precision) - 1, _POINTS).round().astype(np.int64))
    return {
        "label": name,
        "average_precision": float(average_precision_score(positive, scores)),
        "precision": precision[kept].tolist(),
        "recall": recall[kept].tolist(),
    }
