"""`bias_gelu` and `linear_gelu`: the activation after a bias, or after a GEMM with a bias."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import compare_with_torch, normal

from bertfast import ops

APPROXIMATE = ["none", "tanh"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_are_as_accurate_as_torch(approximate, dtype):
    x, weight = normal(7, 24), normal(40, 24)
    compare_with_torch(
        lambda x, bias: ops.bias_gelu(x, bias, approximate),
        lambda x, bias: F.gelu(x + bias, approximate=approximate),
        [x, normal(24)],
        dtype,
    )
    compare_with_torch(
        lambda *inputs: ops.linear_gelu(*inputs, approximate),
        lambda *inputs: F.gelu(F.linear(*inputs), approximate=approximate),
        [x, weight, normal(40)],
        dtype,
    )


@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_gradients_are_the_derivatives(approximate):
    x, weight = normal(4, 3), normal(5, 3)
    assert torch.autograd.gradcheck(lambda *x: ops.bias_gelu(*x, approximate), [x, normal(3)])
    assert torch.autograd.gradcheck(lambda *x: ops.linear_gelu(*x, approximate), [x, weight, normal(5)])


def test_exact_is_x_times_the_normal_distribution():
    points = [-6.0, -1.5, -0.1, 0.0, 0.3, 2.0, 9.0]
    expected = [x * math.erfc(-x / math.sqrt(2)) / 2 for x in points]
    output = ops.bias_gelu(torch.tensor([points], dtype=torch.float64), torch.zeros(7, dtype=torch.float64))
    torch.testing.assert_close(output, torch.tensor([expected], dtype=torch.float64))


def test_an_empty_batch_has_zero_gradients():
    bias = normal(3)
    ops.bias_gelu(normal(0, 3), bias).sum().backward()
    assert torch.equal(bias.grad, torch.zeros_like(bias))
    assert ops.linear_gelu(normal(0, 3), normal(5, 3), normal(5)).shape == (0, 5)


def test_errors_name_the_wrong_argument():
    x, bias = normal(4, 3), normal(3)
    with pytest.raises(ValueError, match=r"bias_gelu: bias must have shape \[3\], got \[2\]"):
        ops.bias_gelu(x, bias[:2])
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', got 'erf'"):
        ops.bias_gelu(x, bias, "erf")
    with pytest.raises(ValueError, match=r"linear_gelu: weight must have shape \[5, 3\], got \[5, 4\]"):
        ops.linear_gelu(x, normal(5, 4), normal(5))
