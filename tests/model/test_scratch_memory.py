"""A frozen model keeps the memory for intermediate results of recent calls, not that of its largest batch for good."""

import subprocess
import sys
from pathlib import Path

import pytest

MEMORY = """
import sys, torch, bertfast
from transformers import BertConfig
from bertfast.runtime.malloc import give_freed_memory_back, resident_memory

torch.set_num_threads(1)
sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 1}
model = bertfast.BertModel(BertConfig(vocab_size=64, **sizes)).eval()
bertfast.quantize(model) if sys.argv[1] == "int8" else bertfast.freeze(model, sys.argv[1])
small, large = (torch.ones(shape, dtype=torch.long) for shape in ((1, 8), (32, 512)))
memory = []
with torch.no_grad():
    for batch, calls in ((small, 2), (large, 1), (small, 600)):
        for _ in range(calls):
            expected = model(batch).last_hidden_state[0, :8].clone()
        give_freed_memory_back()
        memory.append(resident_memory() >> 20)
print(*memory)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the memory of a process")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_memory_of_a_large_batch_is_given_back(precision):
    run = subprocess.run([sys.executable, "-c", MEMORY, precision], capture_output=True, text=True, check=True)
    before, largest, after = map(int, run.stdout.split())
    assert largest - before > 50  # MB: it is measured
    assert after - before < 0.25 * (largest - before)
