"""Inference copies no weights, and reuses freed memory."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bertfast
from bertfast.ops import matmul

CONFIG = bertfast.BertConfig(
    vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96
)
IDS = torch.arange(24).view(2, 12)


class Concatenated(TorchDispatchMode):
    """Records the addresses of all tensors that are concatenated."""

    def __init__(self):
        super().__init__()
        self.addresses = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket is torch.ops.aten.cat:
            self.addresses |= {tensor.data_ptr() for tensor in arguments[0]}
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("gradient", [False, True])
def test_weights_are_concatenated_only_for_a_gradient(gradient, monkeypatch):
    monkeypatch.setattr(matmul, "onednn_depth", lambda: 0)  # it cannot write to a part of a tensor
    model = bertfast.BertModel(CONFIG).eval()
    with torch.set_grad_enabled(gradient), Concatenated() as concatenated:
        model(torch.arange(96).view(-1, 12) % 50)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    assert bool(concatenated.addresses & weights) == gradient


@pytest.mark.parametrize("tokens", [24, 96])  # fewer and more than the hidden width
def test_inference_equals_the_forward_pass_of_training(tokens):
    model = bertfast.BertModel(CONFIG).eval()
    ids = torch.arange(tokens).view(-1, 12) % 50
    with torch.inference_mode():
        inferred = model(ids).last_hidden_state
    torch.testing.assert_close(inferred, model(ids).last_hidden_state, rtol=1e-5, atol=1e-6)


def test_packed_input_gives_the_same_rows():
    model = bertfast.BertModel(CONFIG).eval()
    with torch.inference_mode():
        padded = model(IDS).last_hidden_state
        starts = torch.tensor([0, 12, 24], dtype=torch.int32)
        packed = model(IDS.view(1, -1), cu_seq_lens_q=starts).last_hidden_state
    assert torch.equal(packed.view_as(padded), padded)


@pytest.mark.slow
def test_freed_memory_is_kept():
    """A freed tensor of 48 MB stays with the process; a new process, as this changes the allocator."""
    code = """
import sys, torch
from bertfast.runtime.malloc import give_freed_memory_back, keep_freed_memory
kept = sys.argv[1] != "given back" and keep_freed_memory()
def pages():
    return int(open("/proc/self/statm").read().split()[1])
before = pages()
torch.ones(12 << 20)
if sys.argv[1] == "kept for a while":
    give_freed_memory_back()
print(kept, (pages() - before) * 4096 >> 20)
"""
    for name in ("kept", "given back", "kept for a while"):
        ran = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True)
        done, megabytes = ran.stdout.split()
        assert (int(megabytes) > 40) == (done == "True" and name == "kept")  # False, too, with another allocator
