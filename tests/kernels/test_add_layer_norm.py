"""The kernels of `add_layer_norm`, against the reference."""

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


def inputs(hidden, tokens=11):
    rows = [normal(tokens, hidden, seed=i, device=DEVICE) for i in (1, 2)]
    return rows + [normal(hidden, seed=i, device=DEVICE) for i in (3, 4, 5)]


def kernel(x, residual, bias, gamma, beta, dropout=None):
    return ops.add_layer_norm(x, residual, bias, gamma, beta, 1e-12, dropout, implementation=KERNELS)


def reference(x, residual, bias, gamma, beta, dropout=None):
    return ops.add_layer_norm(x, residual, bias, gamma, beta, 1e-12, dropout, implementation="reference")


def compare(inputs, dtypes, dropout=None):
    compare_with_torch(lambda *x: kernel(*x, dropout), lambda *x: reference(*x, dropout), inputs, dtypes)


@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize(
    "dtypes",
    [FLOAT, BF16, [BF16, FLOAT, FLOAT, FLOAT, FLOAT]],
    ids=["fp32", "bf16", "autocast"],
)
@pytest.mark.parametrize("p", [0, 0.3])
def test_is_as_accurate_as_the_reference(hidden, dtypes, p):
    compare(inputs(hidden), dtypes, dropout_over(SEQUENCES, p) if p else None)


def pair_of(implementation, dropout=None, compute_dtype=BF16):
    """Return the function that computes output and copy; for float64 inputs both are in float64."""

    def function(x, residual, bias, gamma, beta):
        exact = x.dtype == torch.float64
        return ops.add_layer_norm(
            x, residual, bias, gamma, beta, 1e-12, dropout,
            compute_dtype=torch.float64 if exact else compute_dtype,
            implementation="reference" if exact else implementation,
        )  # fmt: skip

    return function


def compare_pairs(inputs, dtypes, dropout=None, compute_dtype=BF16):
    actual, expected = (pair_of(implementation, dropout, compute_dtype) for implementation in (KERNELS, "reference"))
    compare_with_torch(actual, expected, inputs, dtypes, compute_dtype)


@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize(
    "dtypes",
    [FLOAT, BF16, [BF16, FLOAT, FLOAT, FLOAT, FLOAT]],
    ids=["fp32", "bf16", "autocast"],
)
def test_pair_is_as_accurate_as_the_reference(hidden, dtypes):
    compare_pairs(inputs(hidden), dtypes, dropout_over(SEQUENCES))


@with_half
def test_pair_in_half_precision():
    compare_pairs(inputs(96), [HALF, FLOAT, FLOAT, FLOAT, FLOAT], dropout_over(SEQUENCES), HALF)


@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_pairs_of_any_number_of_tokens(tokens):
    compare_pairs(inputs(256, tokens), [BF16, FLOAT, FLOAT, FLOAT, FLOAT])


def autocast_inputs(hidden, tokens=11):
    x, *others = (x.float().detach() for x in inputs(hidden, tokens))
    return [x.requires_grad_() for x in (x.bfloat16(), *others)]


@pytest.mark.parametrize("hidden", [50, 768, 1500])
def test_the_copy_is_the_rounded_output_and_does_not_change_it(hidden):
    arguments = [x.detach() for x in autocast_inputs(hidden)]
    y, copy = pair_of(KERNELS)(*arguments)
    assert torch.equal(y, kernel(*arguments))
    assert torch.equal(copy, y.bfloat16())


@pytest.mark.parametrize("hidden", [50, 768])
def test_an_absent_gradient_is_a_gradient_of_zeros(hidden):
    arguments = autocast_inputs(hidden)
    d_y = normal(11, hidden, dtype=FLOAT, device=DEVICE).detach()
    for index, gradient in enumerate((d_y, d_y.bfloat16())):
        pair = pair_of(KERNELS)(*arguments)
        both = [torch.zeros_like(x) for x in pair]
        both[index] = gradient
        alone = torch.autograd.grad(pair[index], arguments, gradient, retain_graph=True)
        for a, b in zip(alone, torch.autograd.grad(pair, arguments, both), strict=True):
            assert torch.equal(a, b)


def test_gradients_of_a_pair_may_have_any_stride():
    arguments = autocast_inputs(96)
    gradients = [normal(11, 2, 96, dtype=dtype, seed=8, device=DEVICE).detach() for dtype in (FLOAT, BF16)]
    apart, dense = ([f(x) for x in gradients] for f in (lambda x: x[:, 0], lambda x: x[:, 0].contiguous()))
    transposed = [x.t().contiguous().t() for x in dense]
    results = [
        torch.autograd.grad(pair_of(KERNELS)(*arguments), arguments, each) for each in (dense, apart, transposed)
    ]
    for dense_result, *others in zip(*results, strict=True):
        assert all(torch.equal(dense_result, other) for other in others)


def test_no_tokens_make_an_empty_pair():
    arguments = autocast_inputs(96, 0)
    y, copy = pair_of(KERNELS)(*arguments)
    assert (y.shape, copy.shape, copy.dtype) == ((0, 96), (0, 96), BF16)
    (y.sum() + copy.sum()).backward()
    assert torch.equal(arguments[3].grad, torch.zeros_like(arguments[3]))


@pytest.mark.parametrize("with_nan", ["x", "d_y", "d_copy"])
def test_nan_does_not_leak_between_rows_of_a_pair(with_nan):
    others = torch.arange(11, device=DEVICE) != 3
    results = []
    for value in (0.5, math.nan):
        arguments = autocast_inputs(96)
        gradients = [normal(11, 96, dtype=dtype, seed=8, device=DEVICE).detach() for dtype in (FLOAT, BF16)]
        with torch.no_grad():
            {"x": arguments[0], "d_y": gradients[0], "d_copy": gradients[1]}[with_nan][3] = value
        pair = pair_of(KERNELS)(*arguments)
        results.append([*pair, *torch.autograd.grad(pair, arguments[:2], gradients)])
    for whole, with_nan in zip(*results, strict=True):
        assert torch.equal(with_nan[others], whole[others])
    assert results[1][-1][3].isnan().all()


@with_half
def test_half_precision_is_as_accurate_as_pytorch():
    compare(inputs(96), HALF, dropout_over(SEQUENCES))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 33])  # less than a tile of rows, a tile, more than one
def test_any_number_of_tokens(tokens):
    sequences = Sequences.from_lengths([tokens], device=DEVICE)
    compare(inputs(256, tokens), FLOAT, dropout_over(sequences))


def test_the_bias_is_optional():
    x, residual, _, gamma, beta = inputs(96)
    dropout = dropout_over(SEQUENCES)
    compare_with_torch(
        lambda x, residual, gamma, beta: kernel(x, residual, None, gamma, beta, dropout),
        lambda x, residual, gamma, beta: reference(x, residual, None, gamma, beta, dropout),
        [x, residual, gamma, beta],
        FLOAT,
    )


@pytest.mark.parametrize("dtypes", [FLOAT, BF16, [BF16, FLOAT, FLOAT]], ids=["fp32", "bf16", "autocast"])
def test_bias_and_beta_are_optional(dtypes):
    x, residual, _, gamma, _ = inputs(50)
    dropout = dropout_over(SEQUENCES)
    compare_with_torch(
        lambda x, residual, gamma: kernel(x, residual, None, gamma, None, dropout),
        lambda x, residual, gamma: reference(x, residual, None, gamma, None, dropout),
        [x, residual, gamma],
        dtypes,
    )


def test_an_empty_batch_has_zero_gradients():
    arguments = [x.float().detach().requires_grad_() for x in inputs(96, 0)]
    output = kernel(*arguments)
    output.sum().backward()
    assert output.shape == (0, 96)
    assert torch.equal(arguments[3].grad, torch.zeros_like(arguments[3]))


def test_mask_is_bitwise_identical_to_the_reference():
    """The gradient of x is zero exactly where x is dropped."""
    x, residual, bias, gamma, beta = (x.float().detach() for x in inputs(768))
    x.requires_grad_()
    dropout = dropout_over(SEQUENCES)
    kernel(x, residual, bias, gamma, beta, dropout).backward(normal(11, 768, dtype=FLOAT, device=DEVICE))
    assert torch.equal(x.grad != 0, hidden_keep(dropout, 768))


def test_nan_does_not_leak_between_rows():
    x, residual, *rest = (x.float().detach() for x in inputs(96))
    whole = kernel(x, residual, *rest)
    x[3] = math.nan
    others = torch.arange(11, device=DEVICE) != 3
    assert torch.equal(kernel(x, residual, *rest)[others], whole[others])


def test_rows_may_have_any_stride():
    arguments = inputs(96)
    apart = [torch.stack([x, x], 1)[:, 0].float() for x in arguments[:2]]
    vectors = [x.float() for x in arguments[2:]]
    assert torch.equal(kernel(*apart, *vectors), kernel(*(x.contiguous() for x in apart), *vectors))


def test_vectors_may_be_strided():
    x, residual, *vectors = (x.float().detach() for x in inputs(96))
    spread = [torch.stack([x, x], 1)[:, 0] for x in vectors]
    assert torch.equal(kernel(x, residual, *spread), kernel(x, residual, *vectors))


def test_is_bitwise_reproducible():
    results = []
    for _ in range(2):
        arguments = [x.float().detach().requires_grad_() for x in inputs(384)]
        output = kernel(*arguments, dropout_over(SEQUENCES))
        results.append([output, *torch.autograd.grad(output.square().sum(), arguments)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
