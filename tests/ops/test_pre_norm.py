"""`pre_norm`: residual stream and its norm in one operation."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import compare_with_torch, dropout_over, normal
from torch import Tensor

from bertfast import ops
from bertfast.ops import native
from bertfast.ops.dropout import hidden_keep
from bertfast.ops.sequences import Sequences

SEQUENCES = Sequences.from_lengths([3, 0, 1], capacity=5)
EPS = 1e-5
norms = pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])


def inputs(hidden=6, tokens=5, rms=False):
    rows = [normal(tokens, hidden, seed=i) for i in (1, 2)]
    return rows + [normal(hidden, seed=i) for i in ((3, 4) if rms else (3, 4, 5))]


def pre_norm(x, residual, bias, gamma, beta=None, dropout=None, **options):
    return ops.pre_norm(x, residual, bias, gamma, beta, EPS, dropout, rms=beta is None, **options)


def composed(x, residual, bias, gamma, beta=None):
    stream = residual + (x + bias)
    if beta is None:
        return stream, F.rms_norm(stream, gamma.shape, gamma, EPS)
    return stream, F.layer_norm(stream, gamma.shape, gamma, beta, EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@norms
def test_is_as_accurate_as_torch(dtype, rms):
    compare_with_torch(pre_norm, composed, inputs(48, rms=rms), dtype)


@pytest.mark.parametrize("p", [0, 0.4])
@norms
def test_gradient_is_the_derivative(p, rms):
    dropout = dropout_over(SEQUENCES, p) if p else None
    assert torch.autograd.gradcheck(lambda *x: pre_norm(*x, dropout=dropout), inputs(rms=rms))
    _, residual, _, *parameters = inputs(rms=rms)
    assert torch.autograd.gradcheck(lambda r, *p: pre_norm(None, r, None, *p), [residual, *parameters])


def test_dropout_is_the_mask_of_the_specification():
    x, residual, bias, gamma, beta = inputs(20)
    dropout = dropout_over(SEQUENCES)
    dropped = (x + bias) * hidden_keep(dropout, 20) * dropout.scale
    actual = pre_norm(x, residual, bias, gamma, beta, dropout)
    torch.testing.assert_close(actual, composed(dropped, residual, 0, gamma, beta))


@norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_x_the_stream_is_the_residual(rms, dtype):
    _, residual, _, *parameters = (x.detach().to(dtype).requires_grad_() for x in inputs(rms=rms))
    stream, normed = pre_norm(None, residual, None, *parameters)
    assert stream is residual
    zeros = torch.zeros_like(residual)
    assert torch.equal(normed, pre_norm(zeros, residual, None, *parameters)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@norms
def test_statistics_are_those_of_the_stored_stream(dtype, rms):
    """The norm equals that of the stream that was returned, bitwise."""
    x, residual, *parameters = (x.detach().to(dtype) for x in inputs(48, rms=rms))
    stream, normed = pre_norm(x, residual, *parameters)
    assert torch.equal(pre_norm(None, stream, None, *parameters[1:])[1], normed)


@norms
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_norm_dtype_is_that_of_the_norm_only(residual_dtype, norm_dtype, implementation, rms):
    x, residual, *parameters = (x.detach().float() for x in inputs(48, rms=rms))
    arguments = (x.bfloat16(), residual.to(residual_dtype), *parameters)
    if norm_dtype is torch.float16:
        implementation = "reference"  # the fallback for dtypes that no kernel writes here
    stream, normed = pre_norm(*arguments, norm_dtype=norm_dtype, implementation=implementation)
    exact_stream, exact = pre_norm(*arguments, norm_dtype=torch.float32, implementation=implementation)
    assert (stream.dtype, normed.dtype) == (residual_dtype, norm_dtype or residual_dtype)
    assert torch.equal(stream, exact_stream)
    assert torch.equal(normed, exact.to(normed.dtype))


@norms
@pytest.mark.parametrize("read", [(0, 1), (0,), (1,)], ids=["both", "stream alone", "norm alone"])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_stream_and_norm_are_added(read, residual_dtype, rms):
    """The gradients are those of the sum of the outputs that are used."""
    weights = [normal(5, 48, seed=seed).detach() for seed in (6, 7)]
    gradients = []
    for truth in (True, False):
        arguments = [x.detach().to(torch.float64 if truth else torch.float32) for x in inputs(48, rms=rms)]
        if not truth:
            arguments[0], arguments[1] = arguments[0].bfloat16(), arguments[1].to(residual_dtype)
        arguments = [x.requires_grad_() for x in arguments]
        outputs = pre_norm(*arguments, norm_dtype=torch.float64 if truth else torch.bfloat16)
        loss = sum((outputs[index].double() * weights[index]).sum() for index in read)
        found = torch.autograd.grad(loss, arguments, allow_unused=True)
        gradients.append([torch.zeros_like(x) if d is None else d for x, d in zip(arguments, found, strict=True)])
    for exact, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=0.05, atol=0.05)


def test_nothing_but_the_stream_and_parameters_is_saved():
    """x and residual are not kept alive for the backward pass."""
    arguments = [x.detach().float().requires_grad_() for x in inputs(48)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        stream, _ = pre_norm(*arguments, dropout=dropout_over(SEQUENCES))
    matrices = [x for x in kept if x.dim() == 2]
    assert [x.data_ptr() for x in matrices] == [stream.data_ptr()]


class WithoutGradient(torch.autograd.Function):
    """Return x and pass no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d_y):
        return None


def test_inputs_get_no_gradient_if_both_outputs_have_none():
    arguments = [x.detach().float().requires_grad_() for x in inputs(48)]
    stream, normed = pre_norm(*arguments)
    (WithoutGradient.apply(stream).sum() + WithoutGradient.apply(normed).sum()).backward()
    assert all(x.grad is None for x in arguments)


@pytest.mark.parametrize("trained", range(5))
@pytest.mark.parametrize("create_graph", [False, True])
def test_one_input_alone_may_require_a_gradient(trained, create_graph):
    results = []
    for implementation in (None, "reference"):
        arguments = [x.detach().float() for x in inputs(48)]
        leaf = arguments[trained].requires_grad_()
        stream, normed = pre_norm(*arguments, implementation=implementation)
        loss = stream.square().sum() + normed.square().sum()
        results.append(torch.autograd.grad(loss, leaf, create_graph=create_graph)[0].detach())
    torch.testing.assert_close(*results)


@norms
def test_an_empty_batch_has_zero_gradients(rms):
    arguments = [x.detach().float().requires_grad_() for x in inputs(tokens=0, rms=rms)]
    stream, normed = pre_norm(*arguments, norm_dtype=torch.bfloat16)
    (stream.sum() + normed.sum()).backward()
    assert (stream.shape, normed.shape, normed.dtype) == ((0, 6), (0, 6), torch.bfloat16)
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in arguments)


def test_eps_is_used_in_fp32():
    """1e-12 is 0 in half precision, where a row without variance would be 0 / 0."""
    row, weight = torch.zeros(2, 8, dtype=torch.float16), torch.ones(8, dtype=torch.float16)
    for rms in (False, True):
        assert torch.equal(ops.pre_norm(None, row, None, weight, None, 1e-12, rms=rms)[1], row)


def test_a_row_does_not_depend_on_the_others_even_if_they_are_nan():
    x, residual, *rest = (x.detach() for x in inputs())
    whole = pre_norm(x, residual, *rest)
    other = x.clone()
    other[0] = math.nan
    for with_nan, plain in zip(pre_norm(other, residual, *rest), whole, strict=True):
        assert torch.equal(with_nan[1:], plain[1:])


@norms
@pytest.mark.parametrize("has_x", [False, True], ids=["norm", "add"])
def test_compiles_without_a_graph_break(rms, has_x):
    def both(x, residual, bias, *parameters):
        x, bias = (x, bias) if has_x else (None, None)
        stream, normed = pre_norm(x, residual, bias, *parameters, norm_dtype=torch.bfloat16)
        return stream.sin() + 2 * normed.float()

    results = []
    torch._dynamo.reset()
    for function in (both, torch.compile(both, backend="aot_eager", fullgraph=True)):
        arguments = [x.detach().float().requires_grad_() for x in inputs(48, rms=rms)]
        output = function(*arguments)
        used = arguments if has_x else [arguments[1], *arguments[3:]]
        results.append([output, *torch.autograd.grad(output.square().sum(), used)])
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain)


def test_errors_name_the_wrong_argument():
    x, residual, bias, gamma, beta = inputs()
    with pytest.raises(ValueError, match=r"pre_norm: residual must have shape \[5, 6\], got \[4, 6\]"):
        pre_norm(x, residual[:4], bias, gamma, beta)
    with pytest.raises(ValueError, match=r"gamma must have shape \[6\], got \[5\]"):
        pre_norm(None, residual, None, gamma[:5], beta)
    with pytest.raises(TypeError, match="pre_norm: residual must be a tensor, got NoneType"):
        pre_norm(x, None, bias, gamma, beta)
    for dtype in (torch.int8, "bf16"):
        with pytest.raises(TypeError, match=f"norm_dtype must be a floating-point torch.dtype, got {dtype!r}"):
            pre_norm(x, residual, bias, gamma, beta, norm_dtype=dtype)
    with pytest.raises(ValueError, match=r"dropout.sequence_ids must have shape \[5\], got \[7\]"):
        pre_norm(x, residual, bias, gamma, beta, dropout_over(Sequences.from_lengths([7])))


def test_arguments_without_effect_are_refused():
    x, residual, bias, gamma, beta = inputs()
    with pytest.raises(ValueError, match="bias applies to x, which is None: pass bias=None"):
        pre_norm(None, residual, bias, gamma, beta)
    with pytest.raises(ValueError, match="dropout applies to x, which is None: pass dropout=None"):
        pre_norm(None, residual, None, gamma, beta, 0.1)
    with pytest.raises(ValueError, match="an RMSNorm has no beta: pass beta=None, or rms=False"):
        ops.pre_norm(x, residual, bias, gamma, beta, EPS, rms=True)


@pytest.mark.skipif(native.UNAVAILABLE_REASON is not None, reason=str(native.UNAVAILABLE_REASON))
def test_a_norm_that_kernels_cannot_write_is_refused_if_they_are_requested():
    arguments = [x.detach().float() for x in inputs()]
    with pytest.raises(ValueError, match=r"'cpu' is not available: its kernels support float32 and bfloat16, got tor"):
        pre_norm(*arguments, norm_dtype=torch.float16, implementation="cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("index", range(5))
def test_the_reference_runs_if_the_kernels_do_not_support_an_argument(index, dtype):
    arguments = [x.detach().float() for x in inputs()]
    arguments[index] = arguments[index].to(dtype)
    expected = pre_norm(*arguments, implementation="reference")
    assert all(torch.equal(a, b) for a, b in zip(pre_norm(*arguments), expected, strict=True))
    with pytest.raises(ValueError, match="implementation 'cpu' is not available"):
        pre_norm(*arguments, implementation="cpu")
