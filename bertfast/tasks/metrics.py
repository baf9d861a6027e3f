"""How good answers are, by the measures of GLUE (Wang et al., 2019), which scikit-learn and SciPy compute."""

from __future__ import annotations

import importlib

import numpy as np

CLASSIFICATION = ("accuracy", "f1", "matthews_correlation", "loss")
REGRESSION = ("pearson", "spearmanr", "loss")
MULTI_LABEL = ("f1_micro", "f1_macro", "accuracy", "loss")


def require_libraries() -> None:
    """Raise ImportError, with what to do, where scikit-learn or SciPy is missing: before any work rather than after."""
    for library in ("sklearn", "scipy"):
        try:
            importlib.import_module(library)
        except ImportError:
            raise ImportError('metrics need scikit-learn and SciPy; run pip install "bertfast[eval]"') from None


def measure_classes(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of logits [E, labels] against classes int [E].

    f1 is label 1's where there are two labels, else the mean over labels. A measure that is not defined is 0. The loss
    is the mean cross entropy in nats.
    """
    from scipy.special import log_softmax
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    logits = logits.astype(np.float64)
    predictions = logits.argmax(1)
    average = "binary" if logits.shape[1] == 2 else "macro"
    losses = -log_softmax(logits, axis=1)[np.arange(len(labels)), labels]
    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "f1": float(f1_score(labels, predictions, average=average, zero_division=0.0)),
        "matthews_correlation": float(matthews_corrcoef(labels, predictions)),
        "loss": float(losses.mean()),
    }


def measure_numbers(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of numbers [E] against numbers [E]; the correlation with a constant is 0, the loss a mean square."""
    from scipy.stats import pearsonr, spearmanr

    scores, labels = scores.astype(np.float64), labels.astype(np.float64)
    defined = np.ptp(scores) > 0 and np.ptp(labels) > 0
    return {
        "pearson": float(pearsonr(scores, labels).statistic) if defined else 0.0,
        "spearmanr": float(spearmanr(scores, labels).statistic) if defined else 0.0,
        "loss": float(np.square(scores - labels).mean()),
    }


def measure_sets(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of logits [E, labels], each above 0 or not, against 0 and 1; accuracy counts whole sets."""
    from sklearn.metrics import f1_score

    logits, labels = logits.astype(np.float64), labels.astype(np.int64)
    predictions = (logits > 0).astype(np.int64)
    losses = np.logaddexp(0, logits) - labels * logits
    return {
        "f1_micro": float(f1_score(labels, predictions, average="micro", zero_division=0.0)),
        "f1_macro": float(f1_score(labels, predictions, average="macro", zero_division=0.0)),
        "accuracy": float((predictions == labels).all(1).mean()),
        "loss": float(losses.mean()),
    }


def confusion(labels: np.ndarray, predictions: np.ndarray, count: int) -> np.ndarray:
    """int64 [count, count]: how often the row's label was taken for the column's."""
    return np.bincount(labels * count + predictions, minlength=count * count).reshape(count, count)
