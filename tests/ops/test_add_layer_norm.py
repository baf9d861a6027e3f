"""`add_layer_norm`: bias, dropout, residual and LayerNorm in one."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import compare_with_torch, dropout_over, normal

from bertfast import ops
from bertfast.dropout import hidden_keep
from bertfast.sequences import Sequences

SEQUENCES = Sequences.from_lengths([3, 0, 1], capacity=5)


def inputs(hidden=6, tokens=5):
    return [normal(tokens, hidden, seed=i) for i in (1, 2)] + [normal(hidden, seed=i) for i in (3, 4, 5)]


def ours(x, residual, bias, gamma, beta, dropout=None):
    return ops.add_layer_norm(x, residual, bias, gamma, beta, 1e-12, dropout)


def composed(x, residual, bias, gamma, beta):
    return F.layer_norm(x + bias + residual, gamma.shape, gamma, beta, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_accurate_as_torch(dtype):
    compare_with_torch(ours, composed, inputs(48), dtype)


@pytest.mark.parametrize("p", [0, 0.4])
def test_gradient_is_the_derivative(p):
    dropout = dropout_over(SEQUENCES, p) if p else None
    assert torch.autograd.gradcheck(lambda *x: ours(*x, dropout), inputs())
    x, residual, _, gamma, beta = inputs()
    assert torch.autograd.gradcheck(lambda *x: ours(x[0], x[1], None, *x[2:], dropout), [x, residual, gamma, beta])


def test_dropout_is_its_mask():
    x, residual, bias, gamma, beta = inputs(20)
    dropout = dropout_over(SEQUENCES)
    dropped = (x + bias) * hidden_keep(dropout, 20) * dropout.scale
    torch.testing.assert_close(
        ours(x, residual, bias, gamma, beta, dropout), composed(dropped, residual, 0, gamma, beta)
    )


def test_residual_decides_the_dtype_and_is_not_rounded():
    """Under autocast the product is half precision and the residual stream is not."""
    x, residual, bias, gamma, beta = (x.float() for x in inputs(48))
    output = ours(x.bfloat16(), residual, bias, gamma, beta)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, composed(x.bfloat16().float(), residual, bias, gamma, beta))


def test_eps_is_used_in_fp32():
    """1e-12 is 0 in half precision, where a row without variance would be 0 / 0."""
    row = torch.ones(2, 8, dtype=torch.float16)
    weight = torch.ones(8, dtype=torch.float16)
    assert torch.equal(ours(row, row, None, weight, weight), row)


def test_a_row_does_not_depend_on_the_others_even_if_they_are_not_numbers():
    x, residual, *rest = (x.detach() for x in inputs())
    whole = ours(x, residual, *rest)
    spoilt = x.clone()
    spoilt[0] = math.nan
    assert torch.equal(ours(spoilt, residual, *rest)[1:], whole[1:])


def test_no_tokens():
    arguments = inputs(tokens=0)
    output = ours(*arguments)
    output.sum().backward()
    assert output.shape == (0, 6)
    assert torch.equal(arguments[3].grad, torch.zeros(6, dtype=torch.float64))


def test_wrong_arguments_are_refused():
    x, residual, bias, gamma, beta = inputs()
    with pytest.raises(ValueError, match=r"add_layer_norm: residual must have shape \[5, 6\], got \[4, 6\]"):
        ours(x, residual[:4], bias, gamma, beta)
    with pytest.raises(ValueError, match=r"gamma must have shape \[6\], got \[5\]"):
        ours(x, residual, bias, gamma[:5], beta)
    with pytest.raises(TypeError, match="x must be floating point, got torch"):
        ours(x.long(), residual, bias, gamma, beta)
    with pytest.raises(ValueError, match="beta is on meta, the other tensors are on cpu"):
        ours(x, residual, bias, gamma, beta.to("meta"))
    with pytest.raises(ValueError, match=r"dropout.sequence_number must have shape \[5\], got \[7\]"):
        ours(x, residual, bias, gamma, beta, dropout_over(Sequences.from_lengths([7])))
