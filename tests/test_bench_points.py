"""Points of a sweep: the peak memory of a call, also after larger ones were freed."""

import json
import subprocess
import sys

import pytest
import torch

from bench.end_to_end.long_sequences import checked
from bench.figures import fingerprint, inputs_of
from bench.page.memory import memory_table, sweep_of
from bench.page.rows import Result
from bench.points import CLEAR_REFS, importing_bench, in_a_process, timed
from bertfast.architectures import FAMILIES

PEAK = """
import json, numpy
from bench.points import importing_bench, peak_memory, restart_peak
numpy.ones(25_000_000)  # 200 MB, freed at once
before = restart_peak()
numpy.ones(5_000_000)
print(json.dumps(peak_memory() - before))
"""


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="this system does not let a process restart its peak")
def test_the_peak_of_a_call_is_not_hidden_by_an_earlier_one():
    command = [sys.executable, "-c", PEAK]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=importing_bench())
    assert 35e6 < json.loads(ran.stdout) < 100e6


RUNS = """
from bench.end_to_end.real_runs import run
import sys
large, small = (run([sys.executable, "-c", f"b'1' * {size}"]) for size in (900 << 20, 1))
assert large[1] > 900 > 700 > small[1], (large, small)
"""


def test_the_peak_of_a_whole_program_is_not_that_of_a_larger_one_before():
    ran = subprocess.run([sys.executable, "-c", RUNS], capture_output=True, text=True, env=importing_bench())
    assert ran.returncode == 0, ran.stderr


def test_a_point_that_fails_gets_its_last_line_as_reason():
    found = in_a_process("end_to_end.growth", ["--point", "bertfast", "1", "none"])
    assert found == {"reason": "ValueError: invalid literal for int() with base 10: 'none'"}


@pytest.mark.slow
@pytest.mark.skipif("modernbert" not in FAMILIES, reason="this transformers has another ModernBERT, or none")
def test_long_sequences_are_compared_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--lengths", "64", "96", "--preset", "tiny", "--seconds", "0.01", "--results", str(tmp_path)]
    ran = subprocess.run(
        [sys.executable, "-m", "bench.end_to_end.long_sequences", *options],
        capture_output=True,
        text=True,
        env=importing_bench(),
    )
    assert ran.returncode == 0, ran.stderr
    values = json.loads((tmp_path / "long_sequences.json").read_text())
    fp32 = [point for point in values["points"] if point["precision"] == "fp32"]
    assert [(point["implementation"], point["length"]) for point in fp32] == [
        (name, length) for length in (64, 96) for name in ("transformers", "bertfast")
    ]
    assert all(point["relative_error"] < 1e-4 for point in fp32)
    assert all(point["peak_bytes"] > point["bound_bytes"] > 0 and point["bound_s"] > 0 for point in fp32)
    assert inputs_of(tmp_path / "long_sequences.png") == [fingerprint(values)]
    sweep = sweep_of(Result("long_sequences.json", values))
    assert list(sweep.points)[:2] == ["fp32, 64 tokens", "fp32, 96 tokens"]
    assert "| lower bound |" in memory_table(sweep)


def test_a_point_with_wrong_outputs_is_not_timed(tmp_path):
    torch.save(torch.ones(4), tmp_path / "expected.pt")
    torch.save(torch.tensor([1.0, 1.0, 1.0, float("nan")]), tmp_path / "wrong.pt")
    found = checked({"seconds": 1.0}, tmp_path / "wrong.pt", tmp_path / "expected.pt", 0.1)
    assert found == {"reason": "not timed because its outputs are wrong: the relative error is nan"}
    assert "no outputs" in checked({}, tmp_path / "wrong.pt", tmp_path / "missing.pt", 0.1)["reason"]
    assert checked({}, tmp_path / "expected.pt", tmp_path / "expected.pt", 0.1) == {"relative_error": 0.0}


def test_a_call_is_timed_five_times_after_an_untimed_one():
    calls = []
    found = timed(lambda: calls.append(None))
    assert len(calls) > len(found["seconds_samples"]) >= 2
    assert min(found["seconds_samples"]) <= found["seconds"] <= max(found["seconds_samples"])
    assert 1 <= len(timed(lambda: calls.append(None), 1, warm=True)["seconds_samples"]) <= 2
