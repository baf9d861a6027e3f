"""The kernels of `bias_gelu`, alone and after a GEMM, against the reference."""

import math

import pytest
import torch
from helpers import DEVICE, KERNELS, compare_with_torch, normal, with_half

from bertfast import ops

FLOAT, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
COLUMNS = [
    1,  # a block of one
    50,  # one block, masked
    384,  # three blocks of 128, no mask
    1500,  # two blocks of 1,024, the second masked
    3072,  # three blocks of 1,024, no mask
]


def inputs(columns, tokens=11):
    return [3 * normal(tokens, columns, device=DEVICE), normal(columns, device=DEVICE)]


def kernel(x, bias, approximate="none"):
    return ops.bias_gelu(x, bias, approximate, implementation=KERNELS)


def reference(x, bias, approximate="none"):
    return ops.bias_gelu(x, bias, approximate, implementation="reference")


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtypes", [FLOAT, BF16, [BF16, FLOAT]], ids=["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_is_as_accurate_as_the_reference(approximate, dtypes, columns):
    compare_with_torch(
        lambda *x: kernel(*x, approximate), lambda *x: reference(*x, approximate), inputs(columns), dtypes
    )


@with_half
def test_half_precision_is_as_accurate_as_pytorch():
    compare_with_torch(kernel, reference, inputs(96), HALF)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 33])  # less than a tile of rows, a tile, more than one
def test_any_number_of_tokens(tokens):
    compare_with_torch(kernel, reference, inputs(256, tokens), FLOAT)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_every_argument(approximate):
    """Function and derivative are within an ulp or two everywhere, relative to the value or to 1."""
    x = torch.cat([torch.linspace(-12, 12, 4096), torch.tensor([-1e4, -40.0, 0.0, 40.0, 1e4])])
    results = []
    for function, dtype in ((kernel, FLOAT), (reference, torch.float64)):
        leaf = x.to(DEVICE, dtype)[None].requires_grad_()
        y = function(leaf, torch.zeros_like(leaf[0]), approximate)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), leaf)])
    for actual, truth in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), truth, rtol=3e-7, atol=5e-7)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtypes", [FLOAT, BF16], ids=["fp32", "bf16"])
def test_after_a_gemm(dtypes, approximate):
    def linear_gelu(implementation):
        return lambda *inputs: ops.linear_gelu(*inputs, approximate, implementation=implementation)

    inputs = [normal(*shape, device=DEVICE) for shape in ((11, 24), (40, 24), (40,))]
    compare_with_torch(linear_gelu(KERNELS), linear_gelu("reference"), inputs, dtypes)


def test_after_a_gemm_under_autocast():
    x, weight, bias = (normal(*shape, dtype=FLOAT, device=DEVICE) for shape in ((11, 24), (40, 24), (40,)))
    with torch.autocast(DEVICE.type, BF16):
        actual, expected = (ops.linear_gelu(x, weight, bias, implementation=name) for name in (KERNELS, "reference"))
    assert actual.dtype == expected.dtype == BF16
    gradients = torch.autograd.grad(actual.float().sum(), [x, weight, bias])
    assert {gradient.dtype for gradient in gradients} == {FLOAT}


def test_an_empty_batch_has_zero_gradients():
    x, bias = (x.float().detach().requires_grad_() for x in inputs(96, 0))
    output = kernel(x, bias)
    output.sum().backward()
    assert output.shape == (0, 96)
    assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_nan_does_not_leak_between_rows():
    x, bias = (x.float().detach() for x in inputs(96))
    whole = kernel(x, bias)
    x[3] = math.nan
    others = torch.arange(11, device=DEVICE) != 3
    assert torch.equal(kernel(x, bias)[others], whole[others])


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
