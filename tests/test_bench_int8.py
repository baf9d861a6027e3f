"""`bench.end_to_end.int8_accuracy`: how close outputs are, which goals are missed, and the page."""

import numpy as np
import pytest
import torch

from bench.end_to_end.int8_accuracy import (
    Evaluated,
    build_workloads,
    comparison,
    main_metric,
    missed_goals,
)
from bench.page.accuracy import accuracy_text
from bench.page.rows import Result, rows_of
from bertfast.tasks.features import Features


def evaluated(logits, vectors, **metrics: float) -> Evaluated:
    return Evaluated(None, None, metrics, np.array(logits, np.float32), torch.tensor(vectors))


def task(int8: dict, fp32: dict | None = None) -> dict:
    """Return the results of a task, with the metrics and the closeness of int8."""
    exact = {"cosine_mean": 1.0, "cosine_p01": 1.0}
    exact |= {"equal_predictions": 1.0} if "equal_predictions" in int8 else {}
    times = {key: {"seconds": [seconds] * 3, "median_s": seconds} for key, seconds in (("fp32", 0.4), ("int8", 0.1))}
    workload = {"lengths": [5] * 40, "batch": 32, "lower_bound_s": {"fp32": 0.2}, "precisions": times}
    accuracy = {"fp32": {"metrics": fp32 or int8["metrics"], **exact}, "int8": int8}
    ceilings = {"fp32": 4e11, "bytes": 3e10}
    return {"accuracy": accuracy, "ceilings": ceilings, "workloads": {"file order": workload, "sorted": workload}}


CLOSE = {"cosine_mean": 0.9995, "cosine_p01": 0.995}


def test_outputs_are_compared_with_those_in_fp32():
    reference = evaluated([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 3.0]], [[1.0, 0.0]] * 4, accuracy=0.75)
    other = evaluated([[9.0, 0.0], [0.6, 0.5], [2.0, 1.9], [0.0, 3.0]], [[2.0, 0.0]] * 3 + [[3.0, 4.0]], accuracy=0.5)
    found = comparison(other, reference)
    assert found["metrics"] == {"accuracy": 0.5}
    assert found["equal_predictions"] == 0.75
    assert found["cosine_mean"] == pytest.approx((3 + 0.6) / 4)
    assert found["cosine_p01"] == pytest.approx(0.6 + 0.03 * 0.4)  # 3 % of the way from the smallest to the next
    assert comparison(reference, reference)["cosine_p01"] == 1


def test_a_regression_has_no_equal_predictions():
    scores = evaluated([[1.0], [2.0]], [[1.0, 0.0]] * 2, spearmanr=0.9)
    assert "equal_predictions" not in comparison(scores, scores)


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, None),
        ({"equal_predictions": 0.9949}, "equal predictions of at least 0.995: 0.99490"),
        ({"cosine_mean": 0.9989}, "mean cosine of at least 0.999: 0.99890"),
        ({"cosine_p01": 0.989}, "first percentile of the cosine of at least 0.99: 0.98900"),
        ({"cosine_mean": float("nan")}, "mean cosine of at least 0.999: nan"),
    ],
)
def test_goals_of_predictions_and_cosines(changes, missed):
    found = missed_goals("sst-2", task({"metrics": {"accuracy": 0.9}, "equal_predictions": 0.996, **CLOSE, **changes}))
    assert found == ([] if missed is None else [f"sst-2: int8 misses a goal, {missed}"])


@pytest.mark.parametrize(("spearman", "count"), [(0.9, 0), (0.8971, 0), (0.8969, 1), (0.93, 0)])
def test_the_goal_of_a_regression_is_its_loss_in_points(spearman, count):
    results = task({"metrics": {"pearson": 0.1, "spearmanr": spearman}, **CLOSE}, {"pearson": 0.9, "spearmanr": 0.9})
    assert main_metric(results) == "spearmanr"
    found = missed_goals("sts-b", results)
    assert len(found) == count
    assert all("points of spearmanr of at least -0.3: -0.31" in sentence for sentence in found)


def test_workloads_are_all_examples_in_both_orders_without_labels():
    lengths = np.array(([3] * 14 + [9]) * 3)
    tokens = np.arange(lengths.sum(), dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    features = Features(tokens, np.zeros(len(tokens), np.uint8), starts, labels={"labels": np.zeros(45, np.int64)})
    found = build_workloads(features)
    assert found["file order"].lengths == lengths.tolist()
    assert found["sorted"].lengths == sorted(lengths.tolist())
    for workload in found.values():
        assert [len(batch["input_ids"]) for batch in workload.batches] == [32, 13]
        ids = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in workload.batches])
        assert sorted(ids.tolist()) == tokens.tolist()
        assert not any("labels" in batch for batch in workload.batches)
    assert found["sorted"].padded_tokens < found["file order"].padded_tokens


def test_the_page_has_times_and_accuracy():
    tasks = {
        "sst-2": task({"metrics": {"accuracy": 0.9012}, "equal_predictions": 0.9954, **CLOSE}),
        "sts-b": task({"metrics": {"spearmanr": 0.8765}, **CLOSE}),
    }
    result = Result("a/int8_accuracy.json", {"origin": {"threads": 2}, "calibration_examples": 32, "tasks": tasks})
    rows = rows_of(result)
    assert len(rows) == 8
    assert {row.system for row in rows} == {"bertfast"}
    first = rows[0]
    assert first.workload == "fine-tuned MiniLM, 40 sentences of SST-2 in batches of 32, file order"
    assert (first.precision, first.seconds, first.lower_bound, first.gemm_gflops) == ("fp32", 0.4, 0.2, 400)
    assert (rows[1].precision, rows[1].lower_bound) == ("int8", None)
    text = accuracy_text(result)
    assert "| SST-2 | int8 | accuracy 90.12 | 99.54% | 0.99950 | 0.99500 |" in text
    assert "| STS-B | int8 | Spearman 87.65 |  | 0.99950 | 0.99500 |" in text
    assert accuracy_text(Result("embed.json", result.values)) == ""
