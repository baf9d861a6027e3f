"""The benchmark of several processes: its arithmetic, its table in docs/BENCHMARKS.md, and a run of it."""

import json
import sys

import pytest

from bench.end_to_end import scaling
from bench.page.rows import Result
from bench.page.scaling import scaling_text

CASES = [(1, False), (2, False), (4, True)]
ROUNDS = [[1000.0, 1500.0, 1200.0], [2000.0, 3200.0, 1800.0]]


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(scaling.os, "sched_getaffinity", lambda process: {3, 7})


def test_the_efficiency_is_that_of_a_round_and_of_the_cores_in_use(two_cores):
    found = scaling.compared(CASES, ROUNDS)
    assert found["cores"] == 2
    assert [run["parallel_efficiency"] for run in found["runs"]] == [[1, 1], [0.75, 0.8], [0.6, 0.45]]
    assert found["runs"][2]["tokens_per_second"] == (1200, 1800)


def test_the_page_has_medians_and_ranges(two_cores):
    values = {"preset": "mini", "precision": "fp32", "tokens_per_process": 2048} | scaling.compared(CASES, ROUNDS)
    rows = scaling_text(Result("machine/scaling.json", values)).splitlines()
    assert "2 cores, 2,048 tokens of each process per step" in rows[0]
    assert rows[-3:] == [
        "| 1 |  | 1,500 | 1,000 to 2,000 | 100% | 100% to 100% |",
        "| 2 | replicated | 2,350 | 1,500 to 3,200 | 78% | 75% to 80% |",
        "| 4 | sharded | 1,500 | 1,200 to 1,800 | 52% | 45% to 60% |",
    ]
    assert scaling_text(Result("machine/growth.json", values)) == ""


@pytest.mark.slow
def test_processes_are_started_and_measured(data, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "STEPS", 3)
    monkeypatch.setattr(scaling, "WARMUP", 1)
    monkeypatch.setattr(scaling, "require_clean_tree", lambda folder: None)
    arguments = [str(data), "--preset", "tiny", "--processes", "2", "--rounds", "1", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["scaling", *arguments])
    scaling.main()
    values = json.loads((tmp_path / "scaling.json").read_text())
    runs = values["runs"]
    assert [(run["processes"], run["sharded"]) for run in runs] == [(1, False), (2, False), (2, True)]
    assert all(run["tokens_per_second"][0] > 0 for run in runs)
    assert runs[0]["parallel_efficiency"] == [1]
