"""`make bench-compare`: what it says about two commits."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from bench import compare, compare_cases

ROOT = compare.ROOT


def noise(scale: float, rounds: int = 10) -> np.ndarray:
    return np.random.default_rng(1).normal(1, scale, rounds)


def commit(name: str, seconds: dict[str, list[float]], **options) -> compare.Commit:
    return compare.Commit(name, "0" * 40, ROOT, seconds, **options)


def test_a_difference_is_reported_only_if_it_exceeds_the_noise():
    before = list(noise(0.01))
    for factor, start in ((1.0, "no difference"), (1.2, "slower by 20.0%"), (0.8, "faster by 20.0%")):
        after = [factor * seconds for seconds in reversed(before)]
        row = compare.compare("case", commit("old", {"case": before}), commit("new", {"case": after}))
        assert row["verdict"].startswith(start)
        assert row["low"] <= row["ratio"] <= row["high"]
    # Drift that affects both processes of a round cancels out.
    drift = np.linspace(1, 3, 10)
    old, new = commit("old", {"case": list(drift)}), commit("new", {"case": list(1.05 * drift * noise(0.005))})
    assert compare.compare("case", old, new)["verdict"].startswith("slower by ")


def test_intervals_of_equal_commits_contain_1():
    generator = np.random.default_rng(0)
    intervals = [compare.ratio_interval(list(generator.lognormal(0, 0.02, 10))) for _ in range(300)]
    assert sum(low <= 1 <= high for _, low, high in intervals) >= 294
    assert compare.ratio_interval([1.0, 2.0] * 4)[1:] == pytest.approx((1, 2))


def test_a_case_that_a_commit_lacks_and_outputs_that_differ_are_named():
    seconds = {"case": [1.0] * 8}
    lacks = commit("old", {"case": []}, reasons={"case": "AttributeError: no patch"})
    verdict = compare.compare("case", lacks, commit("new", seconds))["verdict"]
    assert verdict == "not compared: old lacks it or fails (AttributeError: no patch)"
    old, new = (commit(name, seconds, values={"case": value}) for name, value in (("old", 0.5), ("new", 0.6)))
    assert "THE OUTPUTS DIFFER: 0.5, 0.6" in compare.compare("case", old, new)["verdict"]
    few = commit("new", {"case": [1.0] * 7 + [float("nan")]})
    assert "7 complete rounds" in compare.compare("case", old, few)["verdict"]


def test_unknown_commits_and_too_few_rounds_are_refused(monkeypatch):
    with pytest.raises(SystemExit, match="there is no commit 'nowhere'"):
        compare.resolve("nowhere")
    monkeypatch.setattr(sys, "argv", ["compare", "HEAD", "--rounds", "3"])
    with pytest.raises(SystemExit):
        compare.parse_arguments()


@pytest.mark.slow
def test_cases_measure_the_package_on_the_path_and_say_what_it_lacks(tmp_path):
    assert set(compare_cases.CASES) == set(compare.IN_PROCESS)
    (tmp_path / "bertfast").mkdir()
    package = tmp_path / "bertfast" / "__init__.py"
    package.write_text("from transformers import BertForSequenceClassification\n")
    command = [sys.executable, str(ROOT / "bench" / "compare_cases.py"), "--seconds", "0"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    cases = ["patched model", "fine-tuning step"]
    ran = subprocess.run([*command, *cases], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    lacking, timed = map(json.loads, ran.stdout.splitlines())
    assert lacking["reason"] == "AttributeError: module 'bertfast' has no attribute 'patch'"
    assert timed["seconds"] > 0
    assert 0.4 < timed["value"] < 1  # the loss of two labels from random weights
    assert {lacking["package"], timed["package"]} == {str(package)}
