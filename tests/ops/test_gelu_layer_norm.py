"""`gelu_layer_norm`: the transform of the masked-LM head."""

import pytest
import torch
import torch.nn.functional as F
from helpers import compare_with_torch, normal

from bertfast import ops


def inputs(hidden, rows=5):
    return [normal(rows, hidden), *(normal(hidden, seed=i) for i in (1, 2, 3))]


def gelu_layer_norm(x, bias, gamma, beta):
    return ops.gelu_layer_norm(x, bias, gamma, beta, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_accurate_as_torch(dtype):
    def composed(x, bias, gamma, beta):
        return F.layer_norm(F.gelu(x + bias), gamma.shape, gamma, beta, 1e-12)

    compare_with_torch(gelu_layer_norm, composed, inputs(48), dtype)


def test_gradient_is_the_derivative():
    x, bias, gamma, beta = inputs(6)
    assert torch.autograd.gradcheck(gelu_layer_norm, [x, bias, gamma, beta])
    assert torch.autograd.gradcheck(lambda x, gamma: gelu_layer_norm(x, None, gamma, None), [x, gamma])


def test_without_bias_and_beta_equals_zeros():
    x, bias, gamma, _ = (x.float().detach() for x in inputs(6))
    zeros = torch.zeros_like(bias)
    assert torch.equal(gelu_layer_norm(x, None, gamma, None), gelu_layer_norm(x, zeros, gamma, zeros))


def test_output_has_the_dtype_of_the_parameters():
    """Under autocast the output of a GEMM is in half precision and the hidden states are not."""
    x, *parameters = (x.float() for x in inputs(16))
    assert gelu_layer_norm(x.bfloat16(), *parameters).dtype == torch.float32


def test_no_rows_give_zero_gradients():
    arguments = inputs(6, rows=0)
    gelu_layer_norm(*arguments).sum().backward()
    assert torch.equal(arguments[2].grad, torch.zeros_like(arguments[2]))


def test_errors_name_the_wrong_argument():
    x, bias, gamma, beta = inputs(6)
    with pytest.raises(ValueError, match=r"gelu_layer_norm: beta must have shape \[6\], got \[5\]"):
        gelu_layer_norm(x, bias, gamma, beta[:5])
