"""Metrics on examples computed by hand."""

import warnings

import numpy as np
import pytest

from bertfast.tasks.entity_metrics import entity_metrics
from bertfast.tasks.metrics import (
    CLASSIFICATION,
    MULTI_LABEL,
    REGRESSION,
    classification_metrics,
    confusion_matrix,
    multi_label_metrics,
    regression_metrics,
)


def logits_for(predictions: list[int], labels: int) -> np.ndarray:
    return np.eye(labels, dtype=np.float32)[predictions] * 30


def test_binary_classification_metrics():
    # true positives 2, false positives 1, false negatives 1, true negatives 2
    metrics = classification_metrics(logits_for([1, 1, 1, 0, 0, 0], 2), np.array([1, 1, 0, 1, 0, 0]))
    assert tuple(metrics) == CLASSIFICATION
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metrics["matthews_correlation"] == pytest.approx((2 * 2 - 1 * 1) / 9)
    assert metrics["loss"] == pytest.approx(2 / 6 * 30)  # 30 nats for each of the two wrong ones


def test_f1_of_three_labels_is_the_macro_average():
    metrics = classification_metrics(logits_for([0, 0, 1, 1], 3), np.array([0, 1, 1, 2]))
    # label 0: 2/3 ; label 1: 1/2 ; label 2: 0
    assert metrics["f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_loss_of_uniform_logits_is_the_entropy():
    assert classification_metrics(np.zeros((5, 4), dtype=np.float32), np.arange(5) % 4)["loss"] == pytest.approx(
        np.log(4)
    )


def test_regression_metrics():
    labels = np.array([1, 2, 3, 4], dtype=np.float32)
    metrics = regression_metrics(np.array([2, 4, 6, 8], dtype=np.float32), labels)
    assert tuple(metrics) == REGRESSION
    assert metrics["pearson"] == pytest.approx(1)
    assert metrics["spearmanr"] == pytest.approx(1)
    assert metrics["loss"] == pytest.approx((1 + 4 + 9 + 16) / 4)
    nonlinear = regression_metrics(np.array([1, 2, 3, 100], dtype=np.float32), labels)
    assert nonlinear["pearson"] < 0.9
    assert nonlinear["spearmanr"] == pytest.approx(1)


def test_what_predictions_alone_leave_undefined_is_zero():
    one_class = classification_metrics(logits_for([0, 0], 2), np.array([0, 1]))
    assert one_class["f1"] == one_class["matthews_correlation"] == 0


def undefined(metrics: dict) -> set[str]:
    return {name for name, value in metrics.items() if np.isnan(value)}


def test_metrics_that_labels_leave_undefined_are_nan():
    numbers, ones = np.array([1, 2, 3], dtype=np.float32), np.ones(3, dtype=np.float32)
    assert undefined(regression_metrics(ones, numbers)) == undefined(regression_metrics(numbers, ones))
    assert undefined(regression_metrics(ones, numbers)) == {"pearson", "spearmanr"}
    classes = classification_metrics(logits_for([0, 1], 2), np.array([0, 0]))
    assert undefined(classes) == {"f1", "matthews_correlation"}
    assert undefined(classification_metrics(logits_for([0, 1], 2), np.array([1, 1]))) == {"matthews_correlation"}
    several = multi_label_metrics(np.array([[2.0, -1.0], [-1.0, -1.0]]), np.zeros((2, 2)))
    assert undefined(several) == {"f1_micro", "f1_macro"}
    assert undefined(entity_metrics([["O", "O"]], [["O", "B-PER"]])) == {"precision", "recall", "f1"}
    assert entity_metrics([["O", "B-PER"]], [["O", "O"]]) == {"precision": 0, "recall": 0, "f1": 0}


def test_multi_label_metrics():
    metrics = multi_label_metrics(np.array([[2.0, -1.0], [1.0, 1.0]]), np.array([[1, 0], [1, 0]]))
    assert tuple(metrics) == MULTI_LABEL
    assert metrics["accuracy"] == 0.5
    assert metrics["f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 1))
    assert metrics["f1_macro"] == pytest.approx((1 + 0) / 2)
    assert metrics["loss"] == pytest.approx(np.log1p(np.exp([-2.0, -1.0, -1.0, 1.0])).mean())


def test_confusion_matrix_has_labels_in_rows_and_predictions_in_columns():
    assert confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 2, 1, 2]), 3).tolist() == [
        [1, 0, 1],
        [0, 1, 0],
        [0, 0, 1],
    ]


@pytest.mark.parametrize("label", [0, 1])
def test_a_single_label_warns_of_nothing(label):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = classification_metrics(logits_for([label] * 3, 2), np.full(3, label))
    assert np.isnan(metrics["matthews_correlation"])
    assert np.isnan(metrics["f1"]) == (label == 0)
    assert metrics["accuracy"] == 1
