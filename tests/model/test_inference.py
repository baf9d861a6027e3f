"""What inference keeps: weights made once, made again when a parameter changes, and pages."""

import subprocess
import sys

import torch

import bertfast

CONFIG = bertfast.BertConfig(
    vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96
)
IDS = torch.arange(24).view(2, 12)


def concatenations(model) -> int:
    """How many tensors a forward pass in inference mode concatenates."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.inference_mode():
        model(IDS)
    return sum(event.name == "aten::cat" for event in profile.events())


def test_the_weights_of_a_projection_are_put_together_once():
    model = bertfast.BertModel(CONFIG).eval()
    first = concatenations(model)
    assert first - concatenations(model) == 2 * CONFIG.num_hidden_layers  # weights and biases


def test_a_changed_parameter_is_noticed():
    model = bertfast.BertModel(CONFIG).eval()
    with torch.inference_mode():
        model(IDS)
    query = model.encoder.layer[0].attention.self.query
    with torch.no_grad():
        query.weight.mul_(2)  # in place
    model.encoder.layer[1].attention.self.key.bias = torch.nn.Parameter(torch.ones(64))  # another tensor
    with torch.inference_mode():
        kept = model(IDS).last_hidden_state
    with torch.no_grad():
        assert torch.equal(kept, model(IDS).last_hidden_state)


def test_packed_input_gives_the_same_rows():
    model = bertfast.BertModel(CONFIG).eval()
    with torch.inference_mode():
        padded = model(IDS).last_hidden_state
        starts = torch.tensor([0, 12, 24], dtype=torch.int32)
        packed = model(IDS.view(1, -1), cu_seq_lens_q=starts).last_hidden_state
    assert torch.equal(packed.view_as(padded), padded)


def test_freed_memory_is_kept():
    """What a process still holds of a tensor of 48 MB that it has freed; in one of its own, which this changes."""
    code = """
import sys, torch
from bertfast.memory import keep_freed_memory
kept = sys.argv[1] == "kept" and keep_freed_memory()
def pages():
    return int(open("/proc/self/statm").read().split()[1])
before = pages()
torch.ones(12 << 20)
print(kept, (pages() - before) * 4096 >> 20)
"""
    for name in ("kept", "given back"):
        ran = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True)
        done, megabytes = ran.stdout.split()
        assert (int(megabytes) > 40) == (done == "True")  # False, too, where the allocator is another
