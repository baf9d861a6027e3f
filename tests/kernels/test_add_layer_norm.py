"""The kernels of `add_layer_norm`, against the definition."""

import math

import pytest
import torch
from helpers import DEVICE, KERNELS, compare_with_torch, dropout_over, normal, with_half

from bertfast import ops
from bertfast.dropout import hidden_keep
from bertfast.sequences import Sequences

SEQUENCES = Sequences.from_lengths([3, 0, 1, 5], capacity=11, device=DEVICE)
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
WIDTHS = [
    1,  # a chunk of one
    50,  # one chunk, masked
    128,  # several rows a warp
    384,  # three chunks of 128
    768,  # three of 256
    1024,  # the widest that one warp takes
    1500,  # an odd width of several warps
    4096,  # the widest that is promised
]


def inputs(hidden, tokens=11):
    rows = [normal(tokens, hidden, seed=i, device=DEVICE) for i in (1, 2)]
    return rows + [normal(hidden, seed=i, device=DEVICE) for i in (3, 4, 5)]


def kernel(x, residual, bias, gamma, beta, dropout=None):
    return ops.add_layer_norm(x, residual, bias, gamma, beta, 1e-12, dropout, implementation=KERNELS)


def definition(x, residual, bias, gamma, beta, dropout=None):
    return ops.add_layer_norm(x, residual, bias, gamma, beta, 1e-12, dropout, implementation="reference")


def compare(inputs, dtypes, dropout=None):
    compare_with_torch(lambda *x: kernel(*x, dropout), lambda *x: definition(*x, dropout), inputs, dtypes)


@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize(
    "dtypes",
    [FLOAT, BRAIN, [BRAIN, FLOAT, FLOAT, FLOAT, FLOAT]],
    ids=["fp32", "bf16", "autocast"],
)
@pytest.mark.parametrize("p", [0, 0.3])
def test_is_as_accurate_as_the_definition(hidden, dtypes, p):
    compare(inputs(hidden), dtypes, dropout_over(SEQUENCES, p) if p else None)


@with_half
def test_half_precision():
    compare(inputs(96), HALF, dropout_over(SEQUENCES))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 33])  # less than a tile of rows, a tile, more than one
def test_any_number_of_tokens(tokens):
    sequences = Sequences.from_lengths([tokens], device=DEVICE)
    compare(inputs(256, tokens), FLOAT, dropout_over(sequences))


def test_no_bias():
    x, residual, _, gamma, beta = inputs(96)
    dropout = dropout_over(SEQUENCES)
    compare_with_torch(
        lambda x, residual, gamma, beta: kernel(x, residual, None, gamma, beta, dropout),
        lambda x, residual, gamma, beta: definition(x, residual, None, gamma, beta, dropout),
        [x, residual, gamma, beta],
        FLOAT,
    )


def test_no_tokens():
    arguments = [x.float().detach().requires_grad_() for x in inputs(96, 0)]
    output = kernel(*arguments)
    output.sum().backward()
    assert output.shape == (0, 96)
    assert torch.equal(arguments[3].grad, torch.zeros_like(arguments[3]))


def test_mask_is_the_definition_bit_for_bit():
    """The gradient of x is zero exactly where x is dropped."""
    x, residual, bias, gamma, beta = (x.float().detach() for x in inputs(768))
    x.requires_grad_()
    dropout = dropout_over(SEQUENCES)
    kernel(x, residual, bias, gamma, beta, dropout).backward(normal(11, 768, dtype=FLOAT, device=DEVICE))
    assert torch.equal(x.grad != 0, hidden_keep(dropout, 768))


def test_a_row_that_is_no_number_spoils_no_other():
    x, residual, *rest = (x.float().detach() for x in inputs(96))
    whole = kernel(x, residual, *rest)
    x[3] = math.nan
    others = torch.arange(11, device=DEVICE) != 3
    assert torch.equal(kernel(x, residual, *rest)[others], whole[others])


def test_rows_may_lie_apart():
    arguments = inputs(96)
    apart = [torch.stack([x, x], 1)[:, 0].float() for x in arguments[:2]]
    vectors = [x.float() for x in arguments[2:]]
    assert torch.equal(kernel(*apart, *vectors), kernel(*(x.contiguous() for x in apart), *vectors))


def test_vectors_may_have_gaps():
    x, residual, *vectors = (x.float().detach() for x in inputs(96))
    spread = [torch.stack([x, x], 1)[:, 0] for x in vectors]
    assert torch.equal(kernel(x, residual, *spread), kernel(x, residual, *vectors))


def test_is_the_same_every_time():
    results = []
    for _ in range(2):
        arguments = [x.float().detach().requires_grad_() for x in inputs(384)]
        output = kernel(*arguments, dropout_over(SEQUENCES))
        results.append([output, *torch.autograd.grad(output.square().sum(), arguments)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
