"""The kernels of `gelu_layer_norm`, against the reference."""

import math

import pytest
import torch
from helpers import DEVICE, KERNELS, compare_with_torch, normal, with_half

from bertfast import ops

FLOAT, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
WIDTHS = [
    1,  # a chunk of one
    50,  # one chunk, masked
    384,  # three chunks of 128
    768,  # three of 256
    1024,  # the widest row of one warp
    1500,  # an odd width of several warps
    4096,  # the widest that is guaranteed
]


def inputs(hidden, rows=11):
    return [normal(rows, hidden, seed=1, device=DEVICE)] + [normal(hidden, seed=i, device=DEVICE) for i in (2, 3, 4)]


def kernel(x, bias, gamma, beta):
    return ops.gelu_layer_norm(x, bias, gamma, beta, 1e-12, implementation=KERNELS)


def reference(x, bias, gamma, beta):
    return ops.gelu_layer_norm(x, bias, gamma, beta, 1e-12, implementation="reference")


@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize("dtypes", [FLOAT, BF16, [BF16, FLOAT, FLOAT, FLOAT]], ids=["fp32", "bf16", "autocast"])
def test_is_as_accurate_as_the_reference(hidden, dtypes):
    compare_with_torch(kernel, reference, inputs(hidden), dtypes)


@pytest.mark.parametrize("dtypes", [FLOAT, BF16, [BF16, FLOAT]], ids=["fp32", "bf16", "autocast"])
def test_bias_and_beta_are_optional(dtypes):
    """ModernBERT's masked-LM head has neither."""
    x, bias, gamma, beta = inputs(50)
    functions = [lambda x, gamma, f=f: f(x, None, gamma, None) for f in (kernel, reference)]
    compare_with_torch(*functions, [x, gamma], dtypes)
    dtypes = dtypes if isinstance(dtypes, torch.dtype) else [*dtypes, FLOAT]
    functions = [lambda x, gamma, bias, f=f: f(x, bias, gamma, None) for f in (kernel, reference)]
    compare_with_torch(*functions, [x, gamma, bias], dtypes)
    functions = [lambda x, gamma, beta, f=f: f(x, None, gamma, beta) for f in (kernel, reference)]
    compare_with_torch(*functions, [x, gamma, beta], dtypes)


@with_half
def test_half_precision_is_as_accurate_as_pytorch():
    compare_with_torch(kernel, reference, inputs(96), HALF)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 33])  # less than a tile of rows, a tile, more than one
def test_any_number_of_rows(rows):
    compare_with_torch(kernel, reference, inputs(256, rows), FLOAT)


def test_no_rows_give_zero_gradients():
    arguments = [x.float().detach().requires_grad_() for x in inputs(96, 0)]
    output = kernel(*arguments)
    output.sum().backward()
    assert output.shape == (0, 96)
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in arguments)


def test_nan_does_not_leak_between_rows():
    x, *vectors = (x.float().detach() for x in inputs(96))
    whole = kernel(x, *vectors)
    x[3] = math.nan
    others = torch.arange(11, device=DEVICE) != 3
    assert torch.equal(kernel(x, *vectors)[others], whole[others])


def test_rows_may_have_any_stride():
    x, *vectors = (x.float().detach() for x in inputs(96))
    apart = torch.stack([x, x], 1)[:, 0]
    results = []
    for leaf in (apart.requires_grad_(), x.requires_grad_()):
        y = kernel(leaf, *vectors)
        results.append([y, *torch.autograd.grad(y, leaf, torch.stack([y, y], 1)[:, 0].detach())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_is_bitwise_reproducible():
    results = []
    for _ in range(2):
        arguments = [x.float().detach().requires_grad_() for x in inputs(384)]
        output = kernel(*arguments)
        results.append([output, *torch.autograd.grad(output.square().sum(), arguments)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
