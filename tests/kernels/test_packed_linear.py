"""The kernels of packed linear layers, against the reference and float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate_as_torch, normal

from bertfast.ops.packed_linear import PANEL, pack, packed_int8, packed_linear, quantise

FLOAT, BF16 = torch.float32, torch.bfloat16
SHAPES = [  # tokens, N, K
    (1, 3, 5),  # less than a panel, than a register, than a quadruple
    (7, 33, 50),  # two panels, the second with one row
    (13, 96, 768),  # two strips of tokens
    (30, 64, 1541),  # two and three partial sums
    (200, 32, 1600),  # several blocks of tokens
]
of_each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
of_each_activation = pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])


def inputs(shape, dtype=FLOAT):
    tokens, columns, depth = shape
    x, weight, bias = normal(tokens, depth), normal(columns, depth) / depth**0.5, normal(columns)
    return [each.detach().to(dtype) for each in (x, weight, bias)]


def in_pytorch(x, weight, bias, activation):
    y = F.linear(x, weight, bias)
    return y if activation == "none" else F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


@pytest.fixture(params=[True, False], ids=["instruction", "emulated"])
def quad_instruction(request):
    """Run with the CPU's dot products of four int8, if it has them, and without."""
    torch.ops.bertfast.use_quad_instruction(request.param)
    yield
    torch.ops.bertfast.use_quad_instruction(True)


@of_each_activation
@of_each_shape
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["fp32", "bf16"])
def test_is_as_accurate_as_pytorch(dtype, shape, activation):
    arguments = inputs(shape, dtype)
    x, weight, bias = arguments
    actual = packed_linear(x, pack(weight, bias), activation, implementation="cpu")
    truth = in_pytorch(*(each.double() for each in arguments), activation)
    assert actual.dtype == dtype
    assert_as_accurate_as_torch(actual, in_pytorch(*arguments, activation), truth)


@of_each_shape
def test_a_bf16_weight_takes_fp32_activations(shape):
    x, weight, bias = inputs(shape)
    actual = packed_linear(x, pack(weight, bias, BF16), implementation="cpu")
    rounded = x.bfloat16(), weight.bfloat16()
    truth = in_pytorch(*(each.double() for each in (*rounded, bias)), "none")
    assert_as_accurate_as_torch(actual, in_pytorch(*(each.float() for each in (*rounded, bias)), "none"), truth)


@of_each_shape
@pytest.mark.parametrize("with_factors", [False, True], ids=["plain", "factors"])
@pytest.mark.usefixtures("quad_instruction")
def test_int8_is_that_of_the_reference(with_factors, shape):
    """A value halfway between two integers may be rounded either way: its token then differs by a step."""
    x, weight, bias = inputs(shape)
    factors = normal(shape[2], seed=3).detach().float().abs() + 0.5 if with_factors else None
    packed = quantise(weight, bias, factors)
    actual = packed_linear(x, packed, implementation="cpu")
    expected = packed_linear(x, packed, implementation="reference")
    step = x.abs().max() * (1 if factors is None else factors.max()) / 127 * packed.scales.max() * 127
    assert (actual - expected).abs().max() <= 2 * step
    differs = (actual - expected).abs() > 1e-4 * expected.abs().max()
    assert differs.float().mean() < 0.05 or len(x) == 1


@pytest.mark.usefixtures("quad_instruction")
def test_int8_sums_are_exact_with_the_largest_values():
    """255 times -127, twice, overflows 16 bits, in which instructions for pairs of bytes would saturate."""
    depth = 4096
    weight = torch.full((PANEL, depth), -1.0)
    weight[1::2] = 1
    x = torch.ones(3, depth)
    x[1] = -1
    actual = packed_linear(x, quantise(weight), implementation="cpu")
    signs = torch.tensor([1.0, -1, 1])[:, None] * torch.where(torch.arange(PANEL) % 2 == 0, -1, 1)
    torch.testing.assert_close(actual, signs * depth, rtol=1e-6, atol=0)


LOWEST, HIGHEST = -126.5, 127.5  # of a token: 254 steps apart, quantised to 1 and, both ends rounded up, to 255


def extremes(low: float, high: float, depth: int) -> torch.Tensor:
    """Return rows of low alone, of both in turn, by pairs, by fours and at random, and their opposites, [12, depth]."""
    position = torch.arange(depth)
    at_random = torch.rand(2, depth, generator=torch.Generator().manual_seed(0)) < 0.5
    is_high = torch.stack([position < 0, position % 2 == 1, position // 2 % 2 == 1, position // 4 % 2 == 1, *at_random])
    return torch.where(torch.cat([is_high, ~is_high]), high, low)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 31, 64, 769, 1541, 3072, 4096])
@pytest.mark.usefixtures("quad_instruction")
def test_int8_sums_of_extreme_values_are_exact_at_all_positions(depth):
    """Weights of -128 and 127, and tokens of 1 and 255: the sums are those of 64-bit integers, rounded to fp32."""
    values = extremes(-128, 127, depth).to(torch.int8).repeat(3, 1)
    tokens = extremes(LOWEST, HIGHEST, depth).repeat(2, 1)
    # A token's step is 1 if both ends occur in it: they do in two more columns, whose weights are zero.
    both = torch.tensor([LOWEST, HIGHEST]).expand(len(tokens), -1)
    weight = packed_int8(F.pad(values, (2, 0)), torch.ones(len(values)), None, None)
    actual = packed_linear(torch.cat([both, tokens], dim=1), weight, implementation="cpu")
    assert torch.equal(actual, (tokens.round().long() @ values.long().T).float())


@pytest.mark.parametrize("make", [pack, quantise])
@pytest.mark.usefixtures("quad_instruction")
def test_memory_of_earlier_calls_is_not_read(make):
    """The kernels keep their memory between calls: here it holds NaN, or the largest values, of a larger call."""
    x, weight, bias = inputs((14, 37, 770))
    packed = make(weight, bias)
    expected = packed_linear(x, packed, implementation="cpu")
    for value in (float("nan"), 1e30, -1e30):
        rows = torch.full((300, 6144), value)
        rows[:, ::2] *= -1
        packed_linear(rows, make(torch.ones(70, 6144)), implementation="cpu")
        assert torch.equal(packed_linear(x, packed, implementation="cpu"), expected)
        assert torch.equal(packed_linear(x[:1], packed, implementation="cpu"), expected[:1])


@pytest.mark.usefixtures("quad_instruction")
def test_neighbours_of_rows_and_columns_are_not_read():
    """The rows of x are parts of wider ones, which are otherwise NaN; so are the rows before and after them."""
    x, weight, bias = inputs((7, 33, 50))
    packed = quantise(weight, bias, torch.full((50,), 0.5))
    around = torch.full((9, 60), float("nan"))
    around[1:8, 3:53] = x
    assert torch.equal(packed_linear(around[1:8, 3:53], packed, implementation="cpu"), packed_linear(x, packed))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.usefixtures("quad_instruction")
def test_int8_of_a_token_that_is_not_finite_is_nan(value):
    x, weight, bias = inputs((5, 40, 64))
    x[2, 17] = value
    y = packed_linear(x, quantise(weight, bias), implementation="cpu")
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("token", [0.0, 1e-42, 1e-30], ids=["zero", "subnormal", "tiny"])
def test_int8_of_a_small_token_is_finite(token):
    _, weight, bias = inputs((1, 40, 64))
    y = packed_linear(torch.full((2, 64), token), quantise(weight, bias), implementation="cpu")
    torch.testing.assert_close(y, bias.expand(2, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pack_weight", [pack, quantise])
def test_rows_that_are_not_contiguous(pack_weight):
    x, weight, bias = inputs((9, 40, 64))
    packed = pack_weight(weight, bias)
    strided = torch.cat([x, x], dim=1)[:, 64:]
    assert torch.equal(packed_linear(strided, packed), packed_linear(x, packed))
    assert torch.equal(packed_linear(x.T.contiguous().T, packed), packed_linear(x, packed))
    assert packed_linear(x[:0], packed).shape == (0, 40)


@pytest.mark.parametrize("shape", [(100, 160, 300), (200, 64, 6144)], ids=["one packs", "several pack"])
@pytest.mark.parametrize("pack_weight", [pack, quantise])
def test_results_do_not_depend_on_the_number_of_threads(pack_weight, shape):
    x, weight, bias = inputs(shape)
    packed, threads = pack_weight(weight, bias), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(packed_linear(x, packed, "gelu"))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_part_of_the_rows_shares_the_memory():
    x, weight, bias = inputs((4, 96, 50))
    packed = quantise(weight, bias)
    part = packed.rows(32, 96)
    assert part.operands.data_ptr() == packed.operands[1].data_ptr()
    assert torch.equal(packed_linear(x, part), packed_linear(x, packed)[:, 32:])
