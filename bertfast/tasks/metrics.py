"""Metrics of GLUE (Wang et al., 2019), computed by scikit-learn and SciPy, and of retrieval.

Shapes: E examples, C texts of each, D embedding size, Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from bertfast.tasks.most_similar import most_similar

CLASSIFICATION = ("accuracy", "f1", "matthews_correlation", "loss")
REGRESSION = ("pearson", "spearmanr", "loss")
CORRELATIONS = ("spearmanr", "pearson")
MULTI_LABEL = ("f1_micro", "f1_macro", "accuracy", "loss")
RETRIEVAL = ("ndcg_at_10", "mrr_at_10", "accuracy_at_1")
CUTOFF = 10  # of the results of a query
_QUERIES, _DOCUMENTS = 512, 8192  # that are compared at a time


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute the metrics of single-label classification.

    Args:
        logits: float [E, labels].
        labels: int [E].

    Returns:
        The values of `CLASSIFICATION`. f1 is that of label 1 if there are two labels, else the macro average. Where no
        example has label 1, f1 is NaN, and where all have the same label, matthews_correlation is; what predictions
        alone leave undefined is 0. The loss is the mean cross-entropy in nats.
    """
    from scipy.special import log_softmax
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    logits = logits.astype(np.float64)
    predictions = logits.argmax(1)
    binary = logits.shape[1] == 2
    f1 = f1_score(labels, predictions, average="binary" if binary else "macro", zero_division=0.0)
    losses = -log_softmax(logits, axis=1)[np.arange(len(labels)), labels]
    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "f1": math.nan if binary and not (labels == 1).any() else float(f1),
        "matthews_correlation": float(matthews_corrcoef(labels, predictions)) if np.ptp(labels) else math.nan,
        "loss": float(losses.mean()),
    }


def regression_metrics(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute the metrics of regression.

    Args:
        predictions: float [E].
        labels: float [E].

    Returns:
        The values of `REGRESSION`. A correlation with a constant is NaN; the loss is the mean squared error.
    """
    from scipy.stats import pearsonr, spearmanr

    predictions, labels = predictions.astype(np.float64), labels.astype(np.float64)
    defined = np.ptp(predictions) > 0 and np.ptp(labels) > 0
    return {
        "pearson": float(pearsonr(predictions, labels).statistic) if defined else math.nan,
        "spearmanr": float(spearmanr(predictions, labels).statistic) if defined else math.nan,
        "loss": float(np.square(predictions - labels).mean()),
    }


def correlations(similarities: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Compute the values of `CORRELATIONS`, of similarities and scores, float [E]; see `regression_metrics`."""
    values = regression_metrics(similarities, scores)
    return {name: values[name] for name in CORRELATIONS}


def multi_label_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute the metrics of multi-label classification, where a label is predicted if its logit is above 0.

    Args:
        logits: float [E, labels].
        labels: [E, labels] of 0 and 1.

    Returns:
        The values of `MULTI_LABEL`. accuracy is the share of examples whose label sets match exactly; the loss is the
        mean binary cross-entropy in nats. Both values of F1 are NaN if no example has a label.
    """
    from sklearn.metrics import f1_score

    logits, labels = logits.astype(np.float64), labels.astype(np.int64)
    predictions = (logits > 0).astype(np.int64)
    losses = np.logaddexp(0, logits) - labels * logits
    averages = ("micro", "macro")
    f1 = {f"f1_{name}": float(f1_score(labels, predictions, average=name, zero_division=0.0)) for name in averages}
    return {
        **(f1 if labels.any() else dict.fromkeys(f1, math.nan)),
        "accuracy": float((predictions == labels).all(1).mean()),
        "loss": float(losses.mean()),
    }


def mean_cross_entropy(logits: Iterable[np.ndarray], labels: Iterable[np.ndarray]) -> float:
    """Compute the mean cross-entropy in nats of the labels that are not negative.

    Args:
        logits: Logits of each sequence, float [rows, classes].
        labels: Labels of each sequence, int [rows].
    """
    from scipy.special import log_softmax

    total, count = 0.0, 0
    for scores, targets in zip(logits, labels, strict=True):
        rows = np.flatnonzero(targets >= 0)
        total -= float(log_softmax(scores[rows].astype(np.float64), axis=1)[np.arange(len(rows)), targets[rows]].sum())
        count += len(rows)
    return total / max(count, 1)


def ranking_metrics(relevant: np.ndarray, num_relevant: np.ndarray) -> dict[str, float]:
    """Compute the metrics of rankings, of which at least one document each is relevant.

    Args:
        relevant: bool [Q, K], whether the document at each rank is relevant; only the first 10 count.
        num_relevant: int [Q], how many relevant documents each query has in all.

    Returns:
        The values of `RETRIEVAL`, means over the queries: normalised discounted cumulative gain, the reciprocal rank of
        the first relevant document, and whether the first document is relevant.
    """
    gains = relevant[:, :CUTOFF].astype(np.float64)
    ranks = np.arange(1, CUTOFF + 1)
    ideal = np.cumsum(1 / np.log2(ranks + 1))[num_relevant.clip(max=CUTOFF) - 1]
    reciprocal = gains / ranks[: gains.shape[1]]
    return {
        "ndcg_at_10": float(((gains / np.log2(ranks[: gains.shape[1]] + 1)).sum(1) / ideal).mean()),
        "mrr_at_10": float(reciprocal.max(1).mean()),
        "accuracy_at_1": float(gains[:, 0].mean()),
    }


def retrieval_metrics(embeddings: np.ndarray, text_ids: np.ndarray, source: str) -> dict[str, float]:
    """Compute the metrics of finding each anchor's positives among all positives and negatives by their cosines.

    Args:
        embeddings: fp32 [E, C, D]: an anchor, a positive and negatives of each example.
        text_ids: int64 [E, C], equal where texts are; equal anchors are one query, with all of their positives.
        source: The file, for messages.

    Returns:
        The values of `RETRIEVAL`.
    """
    anchors, first_rows, query_of_row = np.unique(text_ids[:, 0], return_index=True, return_inverse=True)
    documents, first_of_text = np.unique(text_ids[:, 1:], return_index=True)
    positives: list[set[int]] = [set() for _ in anchors]
    for query, document in zip(query_of_row.ravel(), np.searchsorted(documents, text_ids[:, 1]), strict=True):
        positives[query].add(int(document))
    size = embeddings.shape[2]
    queries = torch.from_numpy(embeddings[first_rows, 0])
    corpus = torch.from_numpy(embeddings[:, 1:].reshape(-1, size)[first_of_text])
    relevant: list[list[bool]] = []
    for start in range(0, len(queries), _QUERIES):
        found = most_similar(queries[start : start + _QUERIES], corpus.split(_DOCUMENTS), CUTOFF, "cosine", source)[1]
        relevant += [[i in positives[start + q] for i in row] for q, row in enumerate(found.tolist())]
    return ranking_metrics(np.array(relevant), np.array([len(x) for x in positives]))


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_labels: int) -> np.ndarray:
    """Return int64 [num_labels, num_labels]: how many examples have the row's label and the column's prediction."""
    return np.bincount(labels * num_labels + predictions, minlength=num_labels**2).reshape(num_labels, num_labels)
