"""`gated_activation`: GeGLU and SwiGLU after a GEMM."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from helpers import compare_with_torch, normal

from bertfast import ops
from bertfast.ops.gated_activation import Activation

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}
of_each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def composed(activation):
    def function(x, bias):
        hidden, gate = (x + bias).chunk(2, 1)
        return ACTIVATIONS[activation](hidden) * gate

    return function


def test_all_activations_are_tested():
    assert set(ACTIVATIONS) == set(get_args(Activation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@of_each_activation
def test_is_as_accurate_as_torch(activation, dtype):
    inputs = [normal(7, 48), normal(48)]
    compare_with_torch(lambda x, bias: ops.gated_activation(x, activation, bias), composed(activation), inputs, dtype)


@of_each_activation
def test_gradient_is_the_derivative(activation):
    assert torch.autograd.gradcheck(
        lambda x, bias: ops.gated_activation(x, activation, bias), [normal(4, 6), normal(6)]
    )
    assert torch.autograd.gradcheck(lambda x: ops.gated_activation(x, activation), [normal(4, 6)])


def test_the_first_half_is_activated_and_the_second_half_multiplies_it():
    x = torch.tensor([[-50.0, 3.0, 7.0, 2.0]])
    expected = torch.tensor([[0.0, 2 * F.gelu(torch.tensor(3.0))]])
    torch.testing.assert_close(ops.gated_activation(x, "gelu"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_a_bias_equals_a_bias_of_zeros(dtype):
    x = normal(5, 48, dtype=dtype)
    results = []
    for bias in (None, torch.zeros(48, dtype=dtype)):
        y = ops.gated_activation(x, "gelu", bias)
        results.append([y, *torch.autograd.grad(y.square().sum(), x)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_output_has_the_dtype_of_x():
    x, bias = normal(3, 8, dtype=torch.bfloat16), normal(8, dtype=torch.float32)
    y = ops.gated_activation(x, "silu", bias)
    assert (y.shape, y.dtype) == ((3, 4), torch.bfloat16)


def test_an_empty_batch_has_zero_gradients():
    bias = normal(6)
    y = ops.gated_activation(normal(0, 6), "silu", bias)
    y.sum().backward()
    assert y.shape == (0, 3)
    assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_errors_name_the_wrong_argument():
    x, bias = normal(4, 6), normal(6)
    with pytest.raises(ValueError, match=r"gated_activation: bias must have shape \[6\], got \[3\]"):
        ops.gated_activation(x, "gelu", bias[:3])
    with pytest.raises(ValueError, match=r"x must have an even number of columns, two halves, got \[4, 5\]"):
        ops.gated_activation(x[:, :5], "gelu")
    for activation in ("relu", None, ["gelu"]):
        with pytest.raises(ValueError, match="activation must be one of 'gelu', 'gelu_tanh', 'silu', got"):
            ops.gated_activation(x, activation)
    with pytest.raises(TypeError, match="x must be floating point, got torch"):
        ops.gated_activation(x.long(), "gelu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_reference_runs_if_the_kernels_do_not_support_the_bias(dtype):
    x, bias = normal(4, 6, dtype=torch.float32).detach(), normal(6, dtype=dtype).detach()
    expected = ops.gated_activation(x, "gelu", bias, implementation="reference")
    assert torch.equal(ops.gated_activation(x, "gelu", bias), expected)
    with pytest.raises(ValueError, match=r"implementation 'cpu' is not available"):
        ops.gated_activation(x, "gelu", bias, implementation="cpu")
