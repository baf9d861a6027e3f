"""The kernels of `rotary`, against the reference."""

import math

import pytest
import torch
from helpers import DEVICE, KERNELS, compare_with_torch, normal, with_half

from bertfast import ops

FLOAT, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
DIMENSIONS = [
    2,  # a half of one element
    22,  # halves that are no multiple of a register
    32,
    64,
    80,  # halves that are no power of two
    128,
]


def table(tokens=11, dimension=32):
    inv_freq = 10_000 ** -(torch.arange(0, dimension, 2, device=DEVICE) / dimension)
    angles = (torch.arange(tokens, device=DEVICE) * 77 + 700)[:, None] * inv_freq
    return torch.cat([angles.cos(), angles.sin()], 1)


def qkv(tokens=11, heads=3, dimension=32, dtype=torch.float64):
    return normal(tokens, 3, heads, dimension, dtype=dtype, device=DEVICE)


def rotary(x, implementation=KERNELS):
    return ops.rotary(x, table(len(x), x.shape[3]), implementation=implementation)


def reference(x):
    return rotary(x, "reference")


def output_and_gradient(x):
    x = x.detach().requires_grad_()
    y = rotary(x)
    return y.detach(), torch.autograd.grad(y, x, normal(*y.shape, seed=1, dtype=y.dtype, device=DEVICE))[0]


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["fp32", "bf16"])
def test_is_as_accurate_as_the_reference(dimension, dtype):
    compare_with_torch(rotary, reference, [qkv(dimension=dimension)], dtype)


@with_half
def test_half_precision_is_as_accurate_as_pytorch():
    compare_with_torch(rotary, reference, [qkv()], HALF)


@pytest.mark.parametrize("tokens", [1, 2, 33, 150])  # less than a tile or part of a loop, and more than one
@pytest.mark.parametrize("heads", [1, 12])
def test_any_number_of_tokens_and_heads(tokens, heads):
    compare_with_torch(rotary, reference, [qkv(tokens, heads)], FLOAT)


def test_an_empty_batch_has_an_empty_gradient():
    y, d_qkv = output_and_gradient(qkv(0, dtype=FLOAT))
    assert y.shape == d_qkv.shape == (0, 3, 3, 32)


def test_the_gradient_is_rotated_back():
    x = qkv(dtype=FLOAT)
    y = rotary(x)
    assert (y - x)[:, :2].abs().max() > 0.1
    torch.testing.assert_close(torch.autograd.grad(y, x, y.detach())[0], x.detach())


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["fp32", "bf16"])
def test_values_are_copied_bit_by_bit(dtype):
    x = qkv(dtype=dtype).detach()
    x[3, 2, 1, ::5] = math.inf
    x[4, 2, 0, 1:] = -0.0
    integers = torch.int32 if dtype == FLOAT else torch.int16
    assert torch.equal(rotary(x)[:, 2].view(integers), x[:, 2].contiguous().view(integers))


def test_nan_does_not_leak_between_tokens():
    clean = qkv(70, dtype=FLOAT).detach()
    with_nan = clean.clone()
    with_nan[[3, 69]] = math.nan
    others = torch.ones(70, dtype=torch.bool, device=DEVICE)
    others[[3, 69]] = False
    for actual, expected in zip(output_and_gradient(with_nan), output_and_gradient(clean), strict=True):
        assert torch.equal(actual[others], expected[others])
    assert rotary(with_nan)[~others].isnan().all()


def test_a_token_does_not_depend_on_its_slot():
    x = qkv(70, dtype=FLOAT).detach()
    order = torch.arange(70, device=DEVICE).flip(0)
    moved = ops.rotary(x[order], table(70)[order], implementation=KERNELS)
    assert torch.equal(moved, rotary(x)[order])


def test_tokens_and_rows_may_have_any_stride_and_gradients_be_expanded():
    dense, angles = qkv(dtype=FLOAT).detach(), table()
    expected = rotary(dense)
    apart, transposed = torch.stack([dense, dense], 1)[:, 0], dense.transpose(0, 3).contiguous().transpose(0, 3)
    wide = torch.cat([angles, angles], 1)[:, :32]
    for x in (apart, transposed):
        assert torch.equal(ops.rotary(x, wide, implementation=KERNELS), expected)
    columns = angles.mT.contiguous().mT
    assert torch.equal(ops.rotary(dense, columns, implementation=KERNELS), expected)
    dense.requires_grad_()
    expanded = torch.autograd.grad(rotary(dense).sum(), dense)[0]
    assert torch.equal(expanded, torch.autograd.grad(rotary(dense), dense, torch.ones_like(dense))[0])
