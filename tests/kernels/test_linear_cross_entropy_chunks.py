"""The chunks of rows in which `linear_cross_entropy` computes logits: results do not depend on their number."""

import pytest
import torch
from helpers import DEVICE, KERNELS, LargestTensor, compare_with_torch, normal

from bertfast import ops
from bertfast.kernels.logits_in_chunks import equal_chunk, max_rows_on_gpu

if KERNELS == "triton":
    from bertfast.kernels import linear_cross_entropy as kernels
else:
    from bertfast.ops import linear_cross_entropy_native as kernels

OPTIONS = {} if KERNELS == "triton" else {"implementation": KERNELS}

FLOAT, BF16 = torch.float32, torch.bfloat16


def inputs(vocab_size, tokens=8, hidden=24):
    return [normal(*shape, device=DEVICE) for shape in ((tokens, hidden), (vocab_size, hidden), (vocab_size,))]


def loss(implementation, count):
    """Return the operation on `count` rows as a function of its parameters; the last row has no label."""
    index = torch.arange(count, device=DEVICE)
    rows, labels = index * 5 % 8, torch.where(index < count - 1, index % 7, -100)
    return lambda hidden, weight, bias: ops.linear_cross_entropy(
        hidden, rows, weight, bias, labels, implementation=implementation
    )


@pytest.fixture
def in_chunks(monkeypatch):
    """A function that sets the maximum rows of a chunk."""
    name = "max_rows_on_gpu" if KERNELS == "triton" else "_max_rows"
    return lambda rows: monkeypatch.setattr(kernels, name, lambda *_: rows)


@pytest.mark.parametrize("chunk", [1, 3, 8])  # eight chunks; a smaller last chunk; one chunk
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["fp32", "bf16"])
def test_any_number_of_chunks(chunk, dtype, in_chunks):
    in_chunks(chunk)
    compare_with_torch(loss(KERNELS, 8), loss("reference", 8), inputs(100), dtype)


@pytest.mark.parametrize(("chunks", "factor"), [(8, 2.1), (40, 1.1)])  # each chunk rounded; summed in fp32
def test_chunks_lose_no_precision(chunks, factor, in_chunks):
    arguments = [x.to(BF16).detach().requires_grad_() for x in inputs(90)]
    exact = [x.detach().double().requires_grad_() for x in arguments]
    truth = torch.autograd.grad(loss("reference", 80)(*exact)[0], exact[1])[0]
    errors = []
    for rows in (80, 80 // chunks):
        in_chunks(rows)
        d_weight = torch.autograd.grad(loss(KERNELS, 80)(*arguments)[0], arguments[1])[0]
        errors.append((d_weight.double() - truth).norm())
    assert errors[1] < factor * errors[0]


@pytest.mark.parametrize("needs_grad", [True, False])
def test_full_logits_are_never_materialised(needs_grad, in_chunks):
    rows, vocab_size, chunk = 64, 512, 12
    in_chunks(chunk)
    arguments = [x.float().detach() for x in inputs(vocab_size, rows, 8)]
    with LargestTensor() as largest:  # which does not see tensors inside an operation
        kernels._in_chunks(*arguments, torch.arange(rows, device=DEVICE), [needs_grad] * 3, **OPTIONS)
    assert (chunk - 1) * vocab_size <= largest.elements <= chunk * vocab_size


@pytest.mark.parametrize(
    ("vocab_size", "size", "rows"),
    [
        (1024, 2, 4096),
        (30_528, 2, 4096),
        (30_528, 4, 2176),
        (250_048, 2, 1024),
    ],  # 8, 239 and 254 MiB; the minimum, 1,024
)
def test_chunks_on_a_gpu_bound_their_memory(vocab_size, size, rows):
    assert max_rows_on_gpu(vocab_size * size) == rows
    assert rows * vocab_size * size <= 256 << 20 or rows == 1024


@pytest.mark.parametrize(("rows", "chunk"), [(0, 128), (5, 128), (4096, 4096), (5000, 2560), (8193, 2816)])
def test_chunks_are_of_equal_size(rows, chunk):
    assert equal_chunk(rows, 4096) == chunk
