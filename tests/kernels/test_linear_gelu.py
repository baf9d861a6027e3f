"""`linear_gelu` as one Triton kernel, against the definition."""

import importlib
import math

import pytest
import torch
from helpers import DEVICE, compare_with_torch, normal, tf32x3_factor, under_autocast

from bertfast import ops
from bertfast.kernels.linear_gelu import linear_gelu_forward

MODULE = importlib.import_module("bertfast.ops.bias_gelu")  # a plain import finds the function of that name
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
SHAPES = [  # tokens, hidden, columns
    (1, 1, 1),  # the smallest
    (11, 24, 40),  # less than a tile each way
    (128, 64, 128),  # one tile in half precision, several in fp32
    (129, 65, 129),  # one more each way
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


def definition(x, weight, bias, approximate="none"):
    return ops.linear_gelu(x, weight, bias, approximate, implementation="reference")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN], ids=["fp32", "bf16"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_is_as_accurate_as_the_definition(approximate, dtype, shape):
    compare_with_torch(
        lambda *x: kernel(*x, approximate),
        lambda *x: definition(*x, approximate),
        inputs(*shape),
        dtype,
        factor=tf32x3_factor(dtype),
    )


def test_half_precision():
    compare_with_torch(kernel, definition, inputs(11, 24, 40), HALF)


@pytest.mark.parametrize("hidden", [FLOAT, BRAIN], ids=["fp32", "bf16"])
def test_under_autocast(hidden):
    ours, theirs = under_autocast(kernel, BRAIN), under_autocast(definition, BRAIN)
    compare_with_torch(ours, theirs, inputs(11, 24, 40), [hidden, FLOAT, FLOAT], products=BRAIN)


def test_keeps_the_bare_product():
    x, weight, bias = (x.detach().to(BRAIN) for x in inputs(33, 70, 50))
    _, product = linear_gelu_forward(x, weight, bias, "none")
    torch.testing.assert_close(product, x @ weight.mT, rtol=2**-7, atol=1e-2)


def test_no_tokens():
    x, weight, bias = (x.float().detach().requires_grad_() for x in inputs(0, 24, 40))
    y = kernel(x, weight, bias)
    y.sum().backward()
    assert y.shape == (0, 40)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_rows_may_lie_apart():
    x, weight, bias = (x.float().detach() for x in inputs(11, 24, 40))
    apart = [torch.stack([x, x], 1)[:, 0] for x in (x, weight)]
    assert torch.equal(kernel(*apart, bias), kernel(x, weight, bias))
    assert torch.equal(kernel(x.T.contiguous().T, weight, bias), kernel(x, weight, bias))


def test_a_row_that_is_no_number_spoils_no_other():
    x, weight, bias = (x.float().detach() for x in inputs(11, 24, 40))
    whole = kernel(x, weight, bias)
    x[3] = math.nan
    others = torch.arange(11, device=DEVICE) != 3
    assert torch.equal(kernel(x, weight, bias)[others], whole[others])


def test_is_the_same_every_time():
    arguments = [x.to(BRAIN).detach().requires_grad_() for x in inputs(140, 24, 40)]
    results = [torch.autograd.grad(kernel(*arguments).float().square().sum(), arguments) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_is_chosen_where_the_table_says_so(monkeypatch):
    x, weight, bias = (x.float().detach() for x in inputs(11, 24, 40))
    monkeypatch.setattr(MODULE.LinearGelu, "apply", lambda *_: pytest.fail("was chosen"))
    for entry in [(FLOAT, 40, 24), (BRAIN, 24, 40)]:
        monkeypatch.setattr(MODULE, "_FUSED", {entry})
        kernel(x, weight, bias)
    monkeypatch.setattr(MODULE, "_FUSED", {(FLOAT, 24, 40)})
    with pytest.raises(pytest.fail.Exception, match="was chosen"):
        kernel(x, weight, bias)
