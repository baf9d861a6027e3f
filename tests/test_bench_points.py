"""Points of a sweep: the peak memory of a call, also after larger ones were freed."""

import json
import subprocess
import sys

import pytest

from bench.points import CLEAR_REFS, in_a_process, timed

PEAK = """
import json, numpy
from bench.points import peak_memory, restart_peak
numpy.ones(25_000_000)  # 200 MB, freed at once
before = restart_peak()
numpy.ones(5_000_000)
print(json.dumps(peak_memory() - before))
"""


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="this system does not let a process restart its peak")
def test_the_peak_of_a_call_is_not_hidden_by_an_earlier_one():
    ran = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert 35e6 < json.loads(ran.stdout) < 100e6


def test_a_point_that_fails_gets_its_last_line_as_reason():
    found = in_a_process("end_to_end.growth", ["--point", "bertfast", "1", "none"])
    assert found == {"reason": "ValueError: invalid literal for int() with base 10: 'none'"}


def test_a_call_is_timed_five_times_after_an_untimed_one():
    calls = []
    found = timed(lambda: calls.append(None))
    assert len(calls) > len(found["seconds_samples"]) >= 2
    assert min(found["seconds_samples"]) <= found["seconds"] <= max(found["seconds_samples"])
