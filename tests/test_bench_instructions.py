"""The CPU kernels execute at most 5 % more instructions per token than when their counts were recorded."""

import json
import shutil

import pytest

from bench import instructions
from bench.harness import RESULTS

RECORD = RESULTS / "instructions.json"
GROWTH = 1.05


@pytest.mark.slow
def test_kernels_need_no_more_instructions_than_recorded():
    for tool in instructions.TOOLS:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if record["compiler"] != instructions.compiler():
        pytest.skip(f"the counts are those of {record['compiler']}, this is {instructions.compiler()}")
    counts = instructions.per_token(instructions.TOKENS)
    assert counts.keys() == record["per_token"].keys()
    grown = {name: (record["per_token"][name], now) for name, now in counts.items()}
    grown = {name: pair for name, pair in grown.items() if pair[1] > GROWTH * pair[0]}
    assert not grown, f"instructions per token, before and now: {grown}; if that is intended, run bench.instructions"
