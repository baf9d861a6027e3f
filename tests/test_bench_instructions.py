"""The CPU kernels execute at most 5 % more instructions per token than when their counts were recorded."""

import json
import shutil
from pathlib import Path

import pytest

from bench import instructions
from bench.result_files import RESULTS

RECORD = RESULTS / "instructions.json"
GROWTH = 1.05


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    for tool in instructions.TOOLS:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    return instructions.build(tmp_path_factory.mktemp("instructions"))


def test_kernels_need_no_more_instructions_than_recorded(program):
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if record["compiler"] != instructions.compiler():
        pytest.skip(f"the counts are those of {record['compiler']}, this is {instructions.compiler()}")
    counts = instructions.per_token(program, instructions.TOKENS)
    assert counts.keys() == record["per_token"].keys()
    grown = {name: (record["per_token"][name], now) for name, now in counts.items()}
    grown = {name: pair for name, pair in grown.items() if pair[1] > GROWTH * pair[0]}
    assert not grown, f"instructions per token, before and now: {grown}; if that is intended, run bench.instructions"


@pytest.mark.parametrize("direction", ["forward", pytest.param("backward", marks=pytest.mark.exhaustive)])
def test_the_cost_of_a_window_does_not_depend_on_the_length(program, direction):
    """Full attention takes almost twice the instructions per token at twice the length."""
    short, long = (instructions.count(program, "attention_window", direction, n) / n for n in (512, 1024))
    assert long < 1.1 * short  # at the ends of a sequence a window is cut off
