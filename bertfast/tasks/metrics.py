"""How good answers are, by the measures of GLUE (Wang et al., 2019), which scikit-learn and SciPy compute."""

from __future__ import annotations

import importlib

import numpy as np

CLASSIFICATION = ("accuracy", "f1", "matthews_correlation", "loss")
REGRESSION = ("pearson", "spearmanr", "loss")


def require_libraries() -> None:
    """Raise ImportError, with what to do, where scikit-learn or SciPy is missing: before any work rather than after."""
    for library in ("sklearn", "scipy"):
        try:
            importlib.import_module(library)
        except ImportError:
            raise ImportError('metrics need scikit-learn and SciPy; run pip install "bertfast[eval]"') from None


def measure(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of logits [S, labels] against classes (int [S]) or, to judge a regression, numbers (float [S]).

    f1 is label 1's where there are two labels, else the mean over labels. A measure that is not defined, such as the
    correlation with a constant, is 0. The loss is the mean of cross entropies (natural logarithms) or of squares.
    """
    if np.issubdtype(labels.dtype, np.floating):
        return _regression(logits[:, 0].astype(np.float64), labels.astype(np.float64))
    return _classification(logits.astype(np.float64), labels)


def _classification(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from scipy.special import log_softmax
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predictions = logits.argmax(1)
    average = "binary" if logits.shape[1] == 2 else "macro"
    losses = -log_softmax(logits, axis=1)[np.arange(len(labels)), labels]
    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "f1": float(f1_score(labels, predictions, average=average, zero_division=0.0)),
        "matthews_correlation": float(matthews_corrcoef(labels, predictions)),
        "loss": float(losses.mean()),
    }


def _regression(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    defined = np.ptp(scores) > 0 and np.ptp(labels) > 0
    return {
        "pearson": float(pearsonr(scores, labels).statistic) if defined else 0.0,
        "spearmanr": float(spearmanr(scores, labels).statistic) if defined else 0.0,
        "loss": float(np.square(scores - labels).mean()),
    }
