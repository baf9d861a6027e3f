"""Metrics on cases small enough to work out by hand."""

import sys

import numpy as np
import pytest

from bertfast.tasks.metrics import CLASSIFICATION, REGRESSION, measure, require_libraries


def logits_for(predictions: list[int], labels: int) -> np.ndarray:
    return np.eye(labels, dtype=np.float32)[predictions] * 30


def test_two_labels():
    # true positives 2, false positives 1, false negatives 1, true negatives 2
    metrics = measure(logits_for([1, 1, 1, 0, 0, 0], 2), np.array([1, 1, 0, 1, 0, 0]))
    assert tuple(metrics) == CLASSIFICATION
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metrics["matthews_correlation"] == pytest.approx((2 * 2 - 1 * 1) / 9)
    assert metrics["loss"] == pytest.approx(2 / 6 * 30)  # 30 nats for each of the two wrong ones


def test_f1_of_more_labels_is_the_mean_over_labels():
    metrics = measure(logits_for([0, 0, 1, 1], 3), np.array([0, 1, 1, 2]))
    # label 0: 2/3 ; label 1: 1/2 ; label 2: 0
    assert metrics["f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_the_loss_of_even_odds_is_the_entropy():
    assert measure(np.zeros((5, 4), dtype=np.float32), np.arange(5) % 4)["loss"] == pytest.approx(np.log(4))


def test_correlations():
    labels = np.array([1, 2, 3, 4], dtype=np.float32)
    metrics = measure(np.array([[2], [4], [6], [8]], dtype=np.float32), labels)
    assert tuple(metrics) == REGRESSION
    assert metrics["pearson"] == pytest.approx(1)
    assert metrics["spearmanr"] == pytest.approx(1)
    assert metrics["loss"] == pytest.approx((1 + 4 + 9 + 16) / 4)
    bent = measure(np.array([[1], [2], [3], [100]], dtype=np.float32), labels)
    assert bent["pearson"] < 0.9
    assert bent["spearmanr"] == pytest.approx(1)


def test_what_is_not_defined_is_zero():
    constant = measure(np.ones((3, 1), dtype=np.float32), np.array([1, 2, 3], dtype=np.float32))
    assert constant["pearson"] == constant["spearmanr"] == 0
    never = measure(logits_for([0, 0], 2), np.array([0, 1]))
    assert never["f1"] == never["matthews_correlation"] == 0


def test_a_missing_library_is_told_before_any_work(monkeypatch):
    require_libraries()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r'pip install "bertfast\[eval\]"'):
        require_libraries()
