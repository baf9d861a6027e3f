"""The kernels of `gated_activation`, against the reference."""

import math

import pytest
import torch
from helpers import DEVICE, KERNELS, compare_with_torch, normal, with_half

from bertfast import ops

FLOAT, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
COLUMNS = [
    1,  # a block of one; the second half starts at an odd address
    50,  # one block, masked
    384,  # three blocks of 128, no mask
    1152,  # ModernBERT-base: nine blocks of 128
    1500,  # two blocks of 1,024, the second masked
]
of_each_activation = pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])


def inputs(columns, tokens=11):
    return [3 * normal(tokens, 2 * columns, device=DEVICE), normal(2 * columns, device=DEVICE)]


def kernel(x, bias=None, activation="gelu"):
    return ops.gated_activation(x, activation, bias, implementation=KERNELS)


def reference(x, bias=None, activation="gelu"):
    return ops.gated_activation(x, activation, bias, implementation="reference")


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtypes", [FLOAT, BF16, [BF16, FLOAT]], ids=["fp32", "bf16", "autocast"])
@of_each_activation
def test_is_as_accurate_as_the_reference(activation, dtypes, columns):
    compare_with_torch(lambda *x: kernel(*x, activation), lambda *x: reference(*x, activation), inputs(columns), dtypes)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["fp32", "bf16"])
@of_each_activation
def test_the_bias_is_optional(activation, dtype):
    x, _ = inputs(50)
    compare_with_torch(lambda x: kernel(x, None, activation), lambda x: reference(x, None, activation), [x], dtype)


@with_half
def test_half_precision_is_as_accurate_as_pytorch():
    compare_with_torch(kernel, reference, inputs(96), HALF)


@pytest.mark.parametrize("tokens", [1, 2, 3, 33])  # less than a tile of rows, a tile, more than one
def test_any_number_of_tokens(tokens):
    compare_with_torch(kernel, reference, inputs(256, tokens), FLOAT)


@of_each_activation
def test_every_argument(activation):
    """Function and derivative are within an ulp or two everywhere, relative to the value or to 1."""
    u = torch.cat([torch.linspace(-12, 12, 4096), torch.tensor([-1e4, -40.0, 0.0, 40.0, 1e4])])
    x = torch.cat([u, torch.ones_like(u)])
    results = []
    for function, dtype in ((kernel, FLOAT), (reference, torch.float64)):
        leaf = x.to(DEVICE, dtype)[None].requires_grad_()
        y = function(leaf, None, activation)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), leaf)])
    for actual, truth in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), truth, rtol=3e-7, atol=5e-7)


def test_an_empty_batch_has_zero_gradients():
    x, bias = (x.float().detach().requires_grad_() for x in inputs(96, 0))
    output = kernel(x, bias)
    output.sum().backward()
    assert output.shape == (0, 96)
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("has_bias", [False, True])
def test_nan_does_not_leak_between_rows(has_bias):
    others = torch.arange(11, device=DEVICE) != 3
    results = []
    for value in (0.5, math.nan):
        x, bias = (x.float().detach() for x in inputs(50))
        x[3] = value
        y = kernel(x.requires_grad_(), bias if has_bias else None)
        results.append([y, *torch.autograd.grad(y.sum(), x)])
    for whole, with_nan in zip(*results, strict=True):
        assert torch.equal(with_nan[others], whole[others])
        assert with_nan[3].isnan().all()


def test_rows_may_have_any_stride():
    x, bias = (x.float().detach() for x in inputs(96))
    apart = torch.stack([x, x], 1)[:, 0].requires_grad_()
    results = []
    for leaf in (apart, x.requires_grad_()):
        y = kernel(leaf, bias)
        results.append([y, *torch.autograd.grad(y, leaf, torch.stack([y, y], 1)[:, 0].detach())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_is_bitwise_reproducible():
    results = []
    for _ in range(2):
        arguments = [x.float().detach().requires_grad_() for x in inputs(384)]
        output = kernel(*arguments)
        results.append([output, *torch.autograd.grad(output.square().sum(), arguments)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
