"""Offsets beyond 2**31 elements, on views with a large row stride in memory that is hardly touched."""

import mmap

import pytest
import torch
from helpers import DEVICE, KERNELS, WITHOUT_CUDA_KERNEL, dropout_over, normal
from torch import Tensor

from bertfast import ops
from bertfast.ops.sequences import Sequences

DTYPE = torch.bfloat16
_NORESERVE = 0x4000  # of Linux; the module has no name for it in Python 3.11


def far_apart(dense: Tensor, stride: int) -> Tensor:
    """Return the rows of `dense`, `stride` elements apart: on a CPU in memory that is committed only where written."""
    elements = (len(dense) - 1) * stride + dense[0].numel()
    assert elements > 2**31
    if DEVICE.type == "cpu":
        memory = mmap.mmap(-1, elements * DTYPE.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        whole = torch.frombuffer(memory, dtype=DTYPE)
    else:
        whole = torch.empty(elements, dtype=DTYPE, device=DEVICE)
    return whole.as_strided(dense.shape, (stride, *dense.stride()[1:])).copy_(dense)


def gradients(function, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    return [y.detach(), torch.autograd.grad(y, x, normal(*y.shape, dtype=DTYPE, device=DEVICE))[0]]


def vector(seed: int) -> Tensor:
    return normal(32, seed=seed, dtype=DTYPE, device=DEVICE).detach()


SEQUENCES = Sequences.from_lengths([3], device=DEVICE)
CASES = {
    "add_layer_norm": lambda x: ops.add_layer_norm(
        x, x, vector(1), vector(2), vector(3), 1e-12, dropout_over(SEQUENCES), implementation=KERNELS
    ),
    "bias_gelu": lambda x: ops.bias_gelu(x, vector(1), implementation=KERNELS),
    "gelu_layer_norm": lambda x: ops.gelu_layer_norm(
        x, vector(1), vector(2), vector(3), 1e-12, implementation=KERNELS
    ),
    "embeddings": lambda table: ops.embeddings(
        *[torch.tensor([2, 0, 2], device=DEVICE)] * 3, table, table, table, vector(2), vector(3), 1e-12,
        implementation=KERNELS,
    ),
}  # fmt: skip
CASES |= {
    "gated_activation": lambda x: ops.gated_activation(
        x, "gelu", vector(1), implementation=KERNELS
    ),
    "pre_norm": lambda x: sum(
        ops.pre_norm(
            x, x, vector(1), vector(2), vector(3), 1e-12, dropout_over(SEQUENCES), implementation=KERNELS
        )
    ),
}  # fmt: skip
for name in WITHOUT_CUDA_KERNEL:
    CASES.pop(name, None)


@pytest.mark.parametrize("operation", CASES)
def test_rows(operation):
    dense = normal(3, 32, dtype=DTYPE, device=DEVICE).detach()
    far = far_apart(dense, 2**30)
    for a, b in zip(gradients(CASES[operation], far), gradients(CASES[operation], dense), strict=True):
        assert torch.equal(a, b)


LONG = Sequences.from_lengths([140, 120], device=DEVICE)
TABLE = normal(260, 32, dtype=torch.float32, device=DEVICE).detach()
OF_TOKENS = {
    "attention": lambda qkv: ops.attention(qkv, LONG, dropout=dropout_over(LONG), implementation=KERNELS),
    "rotary": lambda qkv: ops.rotary(qkv, TABLE, implementation=KERNELS),
}
if KERNELS == "cuda":
    del OF_TOKENS["rotary"]


@pytest.mark.parametrize("operation", OF_TOKENS)
def test_tokens(operation):
    dense = normal(260, 3, 1, 32, dtype=DTYPE, device=DEVICE).detach()
    far = far_apart(dense, 9_000_000)
    for a, b in zip(gradients(OF_TOKENS[operation], far), gradients(OF_TOKENS[operation], dense), strict=True):
        assert torch.equal(a, b)
