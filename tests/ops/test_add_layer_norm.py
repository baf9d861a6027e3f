"""`add_layer_norm`: bias, dropout, residual and LayerNorm in one operation."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import compare_with_torch, dropout_over, normal

from bertfast import ops
from bertfast.ops import native
from bertfast.ops.dropout import hidden_keep
from bertfast.ops.sequences import Sequences

SEQUENCES = Sequences.from_lengths([3, 0, 1], capacity=5)


def inputs(hidden=6, tokens=5):
    return [normal(tokens, hidden, seed=i) for i in (1, 2)] + [normal(hidden, seed=i) for i in (3, 4, 5)]


def add_layer_norm(x, residual, bias, gamma, beta, dropout=None):
    return ops.add_layer_norm(x, residual, bias, gamma, beta, 1e-12, dropout)


def composed(x, residual, bias, gamma, beta):
    return F.layer_norm(x + bias + residual, gamma.shape, gamma, beta, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_accurate_as_torch(dtype):
    compare_with_torch(add_layer_norm, composed, inputs(48), dtype)


@pytest.mark.parametrize("p", [0, 0.4])
def test_gradient_is_the_derivative(p):
    dropout = dropout_over(SEQUENCES, p) if p else None
    assert torch.autograd.gradcheck(lambda *x: add_layer_norm(*x, dropout), inputs())
    x, residual, _, gamma, beta = inputs()
    assert torch.autograd.gradcheck(
        lambda *x: add_layer_norm(x[0], x[1], None, *x[2:], dropout), [x, residual, gamma, beta]
    )
    assert torch.autograd.gradcheck(
        lambda *x: add_layer_norm(x[0], x[1], None, x[2], None, dropout), [x, residual, gamma]
    )


def test_without_beta_equals_a_beta_of_zeros():
    x, residual, bias, gamma, beta = (x.float().detach() for x in inputs())
    without, zeros = (add_layer_norm(x, residual, bias, gamma, b) for b in (None, torch.zeros_like(beta)))
    assert torch.equal(without, zeros)


def test_dropout_is_the_mask_of_the_specification():
    x, residual, bias, gamma, beta = inputs(20)
    dropout = dropout_over(SEQUENCES)
    dropped = (x + bias) * hidden_keep(dropout, 20) * dropout.scale
    torch.testing.assert_close(
        add_layer_norm(x, residual, bias, gamma, beta, dropout), composed(dropped, residual, 0, gamma, beta)
    )


def test_output_has_the_dtype_of_the_residual_which_is_not_rounded():
    """Under autocast the output of a GEMM is in half precision and the residual stream is not."""
    x, residual, bias, gamma, beta = (x.float() for x in inputs(48))
    output = add_layer_norm(x.bfloat16(), residual, bias, gamma, beta)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, composed(x.bfloat16().float(), residual, bias, gamma, beta))


def test_eps_is_used_in_fp32():
    """1e-12 is 0 in half precision, where a row without variance would be 0 / 0."""
    row = torch.ones(2, 8, dtype=torch.float16)
    weight = torch.ones(8, dtype=torch.float16)
    assert torch.equal(add_layer_norm(row, row, None, weight, weight), row)


def test_a_row_does_not_depend_on_the_others_even_if_they_are_nan():
    x, residual, *rest = (x.detach() for x in inputs())
    whole = add_layer_norm(x, residual, *rest)
    other = x.clone()
    other[0] = math.nan
    assert torch.equal(add_layer_norm(other, residual, *rest)[1:], whole[1:])


def test_an_empty_batch_has_zero_gradients():
    arguments = inputs(tokens=0)
    output = add_layer_norm(*arguments)
    output.sum().backward()
    assert output.shape == (0, 6)
    assert torch.equal(arguments[3].grad, torch.zeros(6, dtype=torch.float64))


def paired(x, residual, bias, gamma, beta, dropout=None, compute_dtype=torch.bfloat16):
    return ops.add_layer_norm(x, residual, bias, gamma, beta, 1e-12, dropout, compute_dtype=compute_dtype)


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_the_copy_is_the_output_in_another_dtype_and_does_not_change_it(residual_dtype, compute_dtype, implementation):
    x, residual, *rest = (x.detach().float() for x in inputs(48))
    arguments = (x.bfloat16(), residual.to(residual_dtype), *rest, 1e-12, dropout_over(SEQUENCES))
    if compute_dtype not in (residual_dtype, torch.bfloat16):
        implementation = "reference"  # the fallback for copies that no kernel writes here
    alone = ops.add_layer_norm(*arguments, implementation=implementation)
    y, copy = ops.add_layer_norm(*arguments, compute_dtype=compute_dtype, implementation=implementation)
    assert (y.dtype, copy.dtype) == (residual_dtype, compute_dtype)
    assert torch.equal(y, alone)
    if residual_dtype in (torch.float32, compute_dtype):  # else both are rounded from the same fp32 values
        assert torch.equal(copy, y.to(compute_dtype))


@pytest.mark.parametrize("read", [(0, 1), (0,), (1,)], ids=["both", "output alone", "copy alone"])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_output_and_copy_are_added(read, residual_dtype):
    """The gradients are those of the sum of the outputs that are used."""
    weights = [normal(5, 48, seed=seed).detach() for seed in (6, 7)]
    gradients = []
    for truth in (True, False):
        arguments = [x.detach().to(torch.float64 if truth else torch.float32) for x in inputs(48)]
        if not truth:
            arguments[0], arguments[1] = arguments[0].bfloat16(), arguments[1].to(residual_dtype)
        arguments = [x.requires_grad_() for x in arguments]
        outputs = paired(*arguments, compute_dtype=torch.float64 if truth else torch.bfloat16)
        loss = sum((outputs[index].double() * weights[index]).sum() for index in read)
        gradients.append(torch.autograd.grad(loss, arguments))
    for exact, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=0.05, atol=0.05)


class WithoutGradient(torch.autograd.Function):
    """Return x and pass no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d_y):
        return None


def test_inputs_get_no_gradient_if_output_and_copy_have_none():
    arguments = [x.detach().float().requires_grad_() for x in inputs(48)]
    y, copy = paired(*arguments)
    (WithoutGradient.apply(y).sum() + WithoutGradient.apply(copy).sum()).backward()
    assert all(x.grad is None for x in arguments)


def test_pair_gradient_is_the_derivative():
    dropout = dropout_over(SEQUENCES, 0.4)
    assert torch.autograd.gradcheck(lambda *x: paired(*x, dropout, torch.float64), inputs())


def test_no_tokens_make_an_empty_copy():
    arguments = [x.detach().float().requires_grad_() for x in inputs(tokens=0)]
    y, copy = paired(*arguments)
    assert copy.shape == (0, 6)
    assert copy.dtype == torch.bfloat16
    (y.sum() + copy.sum()).backward()
    assert torch.equal(arguments[3].grad, torch.zeros(6))


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_pair_compiles_without_a_graph_break(compute_dtype, residual_dtype):
    def both(*arguments):
        y, copy = paired(*arguments, compute_dtype=compute_dtype)
        return y.float().sin() + 2 * copy.float()

    results = []
    for function in (both, torch.compile(both, backend="aot_eager", fullgraph=True)):
        arguments = [x.detach().float() for x in inputs(48)]
        arguments[0], arguments[1] = arguments[0].bfloat16(), arguments[1].to(residual_dtype)
        arguments = [x.requires_grad_() for x in arguments]
        output = function(*arguments)
        results.append([output, *torch.autograd.grad(output.square().sum(), arguments)])
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain)


def test_errors_name_the_wrong_argument():
    x, residual, bias, gamma, beta = inputs()
    with pytest.raises(ValueError, match=r"add_layer_norm: residual must have shape \[5, 6\], got \[4, 6\]"):
        add_layer_norm(x, residual[:4], bias, gamma, beta)
    with pytest.raises(ValueError, match=r"gamma must have shape \[6\], got \[5\]"):
        add_layer_norm(x, residual, bias, gamma[:5], beta)
    with pytest.raises(TypeError, match="x must be floating point, got torch"):
        add_layer_norm(x.long(), residual, bias, gamma, beta)
    with pytest.raises(ValueError, match="beta is on meta, the other tensors are on cpu"):
        add_layer_norm(x, residual, bias, gamma, beta.to("meta"))
    for dtype in (torch.int8, "bf16"):
        with pytest.raises(TypeError, match=f"compute_dtype must be a floating-point torch.dtype, got {dtype!r}"):
            paired(x, residual, bias, gamma, beta, compute_dtype=dtype)
    with pytest.raises(ValueError, match=r"dropout.sequence_ids must have shape \[5\], got \[7\]"):
        add_layer_norm(x, residual, bias, gamma, beta, dropout_over(Sequences.from_lengths([7])))


@pytest.mark.skipif(native.UNAVAILABLE_REASON is not None, reason=str(native.UNAVAILABLE_REASON))
def test_a_copy_that_kernels_cannot_write_is_refused_if_they_are_requested():
    arguments = [x.detach().float() for x in inputs()]
    with pytest.raises(ValueError, match=r"implementation 'cpu' is not available: its kernels write copies in bf"):
        ops.add_layer_norm(*arguments, 1e-12, compute_dtype=torch.float16, implementation="cpu")


@pytest.mark.parametrize("index", range(5))
def test_the_reference_runs_if_one_argument_is_float64(index):
    arguments = [x.detach().float() for x in inputs()]
    arguments[index] = arguments[index].double()
    if index == 0:
        arguments[1] = arguments[1].double()  # the residual has x's dtype or a wider one
    expected = ops.add_layer_norm(*arguments, 1e-12, implementation="reference")
    assert torch.equal(ops.add_layer_norm(*arguments, 1e-12), expected)
    with pytest.raises(ValueError, match=r"its kernels (do not )?support float"):
        ops.add_layer_norm(*arguments, 1e-12, implementation="cpu")
