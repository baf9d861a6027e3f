"""The kernels of `pre_norm`, against the reference."""

import math

import pytest
import torch
from helpers import DEVICE, KERNELS, compare_with_torch, dropout_over, normal, with_half

from bertfast import ops
from bertfast.ops.dropout import hidden_keep
from bertfast.ops.sequences import Sequences

SEQUENCES = Sequences.from_lengths([3, 0, 1, 5], capacity=11, device=DEVICE)
FLOAT, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
WIDTHS = [
    1,  # a chunk of one
    50,  # one chunk, masked
    128,  # several rows per warp
    384,  # three chunks of 128
    768,  # three of 256
    1024,  # the widest row of one warp
    1500,  # an odd width of several warps
    4096,  # the widest that is guaranteed
]
# Dtypes of x, of all other inputs, and of the norm.
PRECISIONS = {
    "fp32": (FLOAT, FLOAT, FLOAT),
    "bf16": (BF16, BF16, BF16),
    "autocast": (BF16, FLOAT, BF16),
    "bf16 stream": (BF16, BF16, FLOAT),
}
norms = pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])


def inputs(hidden, tokens=11, rms=False):
    rows = [normal(tokens, hidden, seed=i, device=DEVICE) for i in (1, 2)]
    return rows + [normal(hidden, seed=i, device=DEVICE) for i in ((3, 4) if rms else (3, 4, 5))]


def leaves(hidden, tokens=11, rms=False):
    return [x.float().detach().requires_grad_() for x in inputs(hidden, tokens, rms)]


def pre_norm(implementation, dropout=None, norm_dtype=None):
    """The operation as a function of its inputs; without beta it is an RMSNorm. Float64 inputs give the truth."""

    def function(x, residual, bias, gamma, beta=None):
        exact = residual.dtype == torch.float64
        return ops.pre_norm(
            x, residual, bias, gamma, beta, 1e-5, dropout, rms=beta is None,
            norm_dtype=None if exact else norm_dtype, implementation="reference" if exact else implementation,
        )  # fmt: skip

    return function


kernel = pre_norm(KERNELS)


def compare(inputs, x_dtype, dtype, norm_dtype, dropout=None):
    functions = [pre_norm(name, dropout, norm_dtype) for name in (KERNELS, "reference")]
    dtypes = [x_dtype, *[dtype] * (len(inputs) - 1)]
    compare_with_torch(*functions, inputs, dtypes, norm_dtype)


@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize("precision", PRECISIONS)
@norms
def test_is_as_accurate_as_the_reference(hidden, precision, rms):
    compare(inputs(hidden, rms=rms), *PRECISIONS[precision], dropout_over(SEQUENCES))


@norms
def test_without_dropout(rms):
    for precision in PRECISIONS.values():
        compare(inputs(96, rms=rms), *precision)


@with_half
@norms
def test_half_precision_is_as_accurate_as_pytorch(rms):
    compare(inputs(96, rms=rms), HALF, HALF, HALF, dropout_over(SEQUENCES))
    compare(inputs(96, rms=rms), HALF, FLOAT, HALF, dropout_over(SEQUENCES))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 33])  # less than a tile of rows, a tile, more than one
def test_any_number_of_tokens(tokens):
    compare(inputs(256, tokens), FLOAT, FLOAT, FLOAT, dropout_over(Sequences.from_lengths([tokens], device=DEVICE)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bias_and_beta_are_optional(precision):
    x, residual, _, gamma = inputs(96, rms=True)
    x_dtype, dtype, norm_dtype = PRECISIONS[precision]
    for rms in (False, True):
        functions = [
            lambda x, residual, gamma, name=name, rms=rms: ops.pre_norm(
                x, residual, None, gamma, None, 1e-5, dropout_over(SEQUENCES), rms=rms,
                norm_dtype=residual.dtype if residual.dtype == torch.float64 else norm_dtype,
                implementation="reference" if residual.dtype == torch.float64 else name,
            )
            for name in (KERNELS, "reference")
        ]  # fmt: skip
        compare_with_torch(*functions, [x, residual, gamma], [x_dtype, dtype, dtype], norm_dtype)


@pytest.mark.parametrize("hidden", [50, 768])
@pytest.mark.parametrize("precision", PRECISIONS)
@norms
def test_the_norm_alone(hidden, precision, rms):
    _, residual, _, *parameters = inputs(hidden, rms=rms)
    _, dtype, norm_dtype = PRECISIONS[precision]
    functions = [pre_norm(name, None, norm_dtype) for name in (KERNELS, "reference")]
    alone = [lambda residual, *p, f=function: f(None, residual, None, *p)[1] for function in functions]
    compare_with_torch(*alone, [residual, *parameters], dtype, norm_dtype)


@pytest.mark.parametrize("hidden", [50, 768])
@norms
def test_an_absent_gradient_is_a_gradient_of_zeros(hidden, rms):
    arguments = leaves(hidden, rms=rms)
    dropout = dropout_over(SEQUENCES)
    d_y = normal(11, hidden, dtype=FLOAT, device=DEVICE).detach()
    for index, gradient in enumerate((d_y, d_y.bfloat16())):
        pair = pre_norm(KERNELS, dropout, BF16)(*arguments)
        both = [torch.zeros_like(x) for x in pair]
        both[index] = gradient
        alone = torch.autograd.grad(pair[index], arguments, gradient, retain_graph=True)
        for a, b in zip(alone, torch.autograd.grad(pair, arguments, both), strict=True):
            assert torch.equal(a, b)


def test_gradients_of_a_pair_may_have_any_stride():
    arguments = leaves(96)
    gradients = [normal(11, 2, 96, dtype=dtype, seed=8, device=DEVICE).detach() for dtype in (FLOAT, BF16)]
    apart, dense = ([f(x) for x in gradients] for f in (lambda x: x[:, 0], lambda x: x[:, 0].contiguous()))
    transposed = [x.t().contiguous().t() for x in dense]
    function = pre_norm(KERNELS, None, BF16)
    results = [torch.autograd.grad(function(*arguments), arguments, each) for each in (dense, apart, transposed)]
    for dense_result, *others in zip(*results, strict=True):
        assert all(torch.equal(dense_result, other) for other in others)


@norms
def test_an_empty_batch_has_zero_gradients(rms):
    arguments = leaves(96, 0, rms)
    stream, normed = kernel(*arguments)
    (stream.sum() + normed.sum()).backward()
    assert stream.shape == normed.shape == (0, 96)
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in arguments)


def test_mask_is_bitwise_identical_to_the_reference():
    """The gradient of x is zero exactly where x is dropped."""
    arguments = leaves(768)
    dropout = dropout_over(SEQUENCES)
    pair = pre_norm(KERNELS, dropout)(*arguments)
    (d_x,) = torch.autograd.grad(pair, arguments[:1], [normal(11, 768, dtype=FLOAT, device=DEVICE)] * 2)
    assert torch.equal(d_x != 0, hidden_keep(dropout, 768))


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["fp32", "bf16"])
@norms
def test_the_norm_is_that_of_the_returned_stream(dtype, rms):
    x, residual, bias, *parameters = (x.detach().to(dtype) for x in inputs(50, rms=rms))
    stream, normed = kernel(x, residual, bias, *parameters)
    assert torch.equal(kernel(None, stream, None, *parameters)[1], normed)


@pytest.mark.parametrize("with_nan", ["x", "d_stream", "d_normed"])
@norms
def test_nan_does_not_leak_between_rows(with_nan, rms):
    others = torch.arange(11, device=DEVICE) != 3
    results = []
    for value in (0.5, math.nan):
        arguments = leaves(50, rms=rms)
        gradients = [normal(11, 50, dtype=FLOAT, seed=seed, device=DEVICE).detach() for seed in (8, 9)]
        with torch.no_grad():
            {"x": arguments[0], "d_stream": gradients[0], "d_normed": gradients[1]}[with_nan][3] = value
        pair = kernel(*arguments)
        results.append([*pair, *torch.autograd.grad(pair, arguments[:2], gradients)])
    for whole, with_nan in zip(*results, strict=True):
        assert torch.equal(with_nan[others], whole[others])
    assert results[1][-1][3].isnan().all()


def test_rows_and_vectors_may_have_any_stride():
    arguments = [x.detach() for x in leaves(96)]
    apart = [torch.stack([x, x], 1)[:, 0] for x in arguments]
    for strided, dense in zip(kernel(*apart), kernel(*arguments), strict=True):
        assert torch.equal(strided, dense)


@norms
def test_is_bitwise_reproducible(rms):
    results = []
    for _ in range(2):
        arguments = leaves(384, rms=rms)
        stream, normed = pre_norm(KERNELS, dropout_over(SEQUENCES))(*arguments)
        gradients = torch.autograd.grad(stream.square().sum() + normed.sin().sum(), arguments)
        results.append([stream, normed, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
