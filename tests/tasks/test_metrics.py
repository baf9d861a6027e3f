"""Metrics on cases small enough to work out by hand."""

import sys

import numpy as np
import pytest

from bertfast.tasks.metrics import (
    CLASSIFICATION,
    MULTI_LABEL,
    REGRESSION,
    confusion,
    measure_classes,
    measure_numbers,
    measure_sets,
    require_libraries,
)


def logits_for(predictions: list[int], labels: int) -> np.ndarray:
    return np.eye(labels, dtype=np.float32)[predictions] * 30


def test_two_labels():
    # true positives 2, false positives 1, false negatives 1, true negatives 2
    metrics = measure_classes(logits_for([1, 1, 1, 0, 0, 0], 2), np.array([1, 1, 0, 1, 0, 0]))
    assert tuple(metrics) == CLASSIFICATION
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metrics["matthews_correlation"] == pytest.approx((2 * 2 - 1 * 1) / 9)
    assert metrics["loss"] == pytest.approx(2 / 6 * 30)  # 30 nats for each of the two wrong ones


def test_f1_of_more_labels_is_the_mean_over_labels():
    metrics = measure_classes(logits_for([0, 0, 1, 1], 3), np.array([0, 1, 1, 2]))
    # label 0: 2/3 ; label 1: 1/2 ; label 2: 0
    assert metrics["f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_the_loss_of_even_odds_is_the_entropy():
    assert measure_classes(np.zeros((5, 4), dtype=np.float32), np.arange(5) % 4)["loss"] == pytest.approx(np.log(4))


def test_correlations():
    labels = np.array([1, 2, 3, 4], dtype=np.float32)
    metrics = measure_numbers(np.array([2, 4, 6, 8], dtype=np.float32), labels)
    assert tuple(metrics) == REGRESSION
    assert metrics["pearson"] == pytest.approx(1)
    assert metrics["spearmanr"] == pytest.approx(1)
    assert metrics["loss"] == pytest.approx((1 + 4 + 9 + 16) / 4)
    bent = measure_numbers(np.array([1, 2, 3, 100], dtype=np.float32), labels)
    assert bent["pearson"] < 0.9
    assert bent["spearmanr"] == pytest.approx(1)


def test_what_is_not_defined_is_zero():
    constant = measure_numbers(np.ones(3, dtype=np.float32), np.array([1, 2, 3], dtype=np.float32))
    assert constant["pearson"] == constant["spearmanr"] == 0
    never = measure_classes(logits_for([0, 0], 2), np.array([0, 1]))
    assert never["f1"] == never["matthews_correlation"] == 0


def test_a_missing_library_is_told_before_any_work(monkeypatch):
    require_libraries()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r'pip install "bertfast\[eval\]"'):
        require_libraries()


def test_sets_of_labels():
    metrics = measure_sets(np.array([[2.0, -1.0], [1.0, 1.0]]), np.array([[1, 0], [1, 0]]))
    assert tuple(metrics) == MULTI_LABEL
    assert metrics["accuracy"] == 0.5
    assert metrics["f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 1))
    assert metrics["f1_macro"] == pytest.approx((1 + 0) / 2)
    assert metrics["loss"] == pytest.approx(np.log1p(np.exp([-2.0, -1.0, -1.0, 1.0])).mean())


def test_which_is_taken_for_which():
    assert confusion(np.array([0, 0, 1, 2]), np.array([0, 2, 1, 2]), 3).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
