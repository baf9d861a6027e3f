"""`linear_gelu` as one Triton kernel, against the reference."""

import importlib
import math

import pytest
import torch
from helpers import DEVICE, compare_with_torch, normal, tf32x3_factor, under_autocast

from bertfast import ops
from bertfast.kernels.linear_gelu import linear_gelu_forward

MODULE = importlib.import_module("bertfast.ops.bias_gelu")  # a plain import finds the function of that name
FLOAT, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [  # tokens, hidden, columns
    (1, 1, 1),  # the smallest
    (11, 24, 40),  # less than a tile in both dimensions
    (128, 64, 128),  # one tile in half precision, several in fp32
    (129, 65, 129),  # one more in both dimensions
    (1300, 8, 20),  # more tiles down than a group has
    (5, 200, 300),  # several steps, several tiles across
]


class EveryShape:
    def __contains__(self, shape):
        return True


@pytest.fixture(autouse=True)
def _always_fused(monkeypatch):
    monkeypatch.setattr(MODULE, "_FUSED", EveryShape())


def inputs(tokens, hidden, columns):
    return [normal(*shape, device=DEVICE) for shape in ((tokens, hidden), (columns, hidden), (columns,))]


def kernel(x, weight, bias, approximate="none"):
    return ops.linear_gelu(x, weight, bias, approximate, implementation="triton")


def reference(x, weight, bias, approximate="none"):
    return ops.linear_gelu(x, weight, bias, approximate, implementation="reference")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_is_as_accurate_as_the_reference(approximate, dtype, shape):
    compare_with_torch(
        lambda *x: kernel(*x, approximate),
        lambda *x: reference(*x, approximate),
        inputs(*shape),
        dtype,
        factor=tf32x3_factor(dtype),
    )


def test_half_precision_is_as_accurate_as_pytorch():
    compare_with_torch(kernel, reference, inputs(11, 24, 40), HALF)


@pytest.mark.parametrize("hidden", [FLOAT, BF16], ids=["fp32", "bf16"])
def test_under_autocast(hidden):
    actual, expected = under_autocast(kernel, BF16), under_autocast(reference, BF16)
    compare_with_torch(actual, expected, inputs(11, 24, 40), [hidden, FLOAT, FLOAT], gemm_dtype=BF16)


def test_stores_the_result_of_the_gemm():
    x, weight, bias = (x.detach().to(BF16) for x in inputs(33, 70, 50))
    _, gemm = linear_gelu_forward(x, weight, bias, "none")
    torch.testing.assert_close(gemm, x @ weight.mT, rtol=2**-7, atol=1e-2)


def test_an_empty_batch_has_zero_gradients():
    x, weight, bias = (x.float().detach().requires_grad_() for x in inputs(0, 24, 40))
    y = kernel(x, weight, bias)
    y.sum().backward()
    assert y.shape == (0, 40)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_rows_may_have_any_stride():
    x, weight, bias = (x.float().detach() for x in inputs(11, 24, 40))
    apart = [torch.stack([x, x], 1)[:, 0] for x in (x, weight)]
    assert torch.equal(kernel(*apart, bias), kernel(x, weight, bias))
    assert torch.equal(kernel(x.T.contiguous().T, weight, bias), kernel(x, weight, bias))


def test_nan_does_not_leak_between_rows():
    x, weight, bias = (x.float().detach() for x in inputs(11, 24, 40))
    whole = kernel(x, weight, bias)
    x[3] = math.nan
    others = torch.arange(11, device=DEVICE) != 3
    assert torch.equal(kernel(x, weight, bias)[others], whole[others])


def test_is_bitwise_reproducible():
    arguments = [x.to(BF16).detach().requires_grad_() for x in inputs(140, 24, 40)]
    results = [torch.autograd.grad(kernel(*arguments).float().square().sum(), arguments) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_is_used_for_the_shapes_of_the_table(monkeypatch):
    x, weight, bias = (x.float().detach() for x in inputs(11, 24, 40))
    monkeypatch.setattr(MODULE.LinearGelu, "apply", lambda *_: pytest.fail("was used"))
    for entry in [(FLOAT, 40, 24), (BF16, 24, 40)]:
        monkeypatch.setattr(MODULE, "_FUSED", {entry})
        kernel(x, weight, bias)
    monkeypatch.setattr(MODULE, "_FUSED", {(FLOAT, 24, 40)})
    with pytest.raises(pytest.fail.Exception, match="was used"):
        kernel(x, weight, bias)
