"""The gradient of `gather` in Triton: a sum by index that several tensors share."""

import math

import pytest
import torch
from helpers import DEVICE, compare_with_torch, normal

from bertfast import ops
from bertfast.kernels.contracts import CONTRACTS
from bertfast.ops.dispatch import operator

FLOAT, BF16 = torch.float32, torch.bfloat16
ROWS = torch.tensor([4, 0, 0, 7, 2, 5, 0, 1], device=DEVICE)


def gather(*tensors, rows=ROWS):
    return ops.gather(rows, *tensors, implementation="triton")


def indexed(*tensors, rows=ROWS):
    return tuple(x[rows] for x in tensors)


def tensors(hidden=48):
    return [normal(9, hidden, seed=seed, device=DEVICE) for seed in (1, 2)]


@pytest.mark.parametrize("dtypes", [FLOAT, BF16, [BF16, FLOAT]], ids=["fp32", "bf16", "mixed"])
@pytest.mark.parametrize("hidden", [1, 50, 768])
def test_is_as_accurate_as_indexing(dtypes, hidden):
    compare_with_torch(gather, indexed, tensors(hidden), dtypes)


def test_half_precision_gradient_is_summed_in_fp32():
    x = torch.zeros(2, 8, device=DEVICE, dtype=BF16, requires_grad=True)
    rows = torch.zeros(600, dtype=torch.int64, device=DEVICE)
    gather(x, rows=rows)[0].sum().backward()  # a bf16 sum of ones stops at 256
    assert (x.grad[0] == 600).all()
    assert (x.grad[1] == 0).all()


def test_second_derivative_is_that_of_indexing():
    results = []
    for function in (gather, indexed):
        arguments = [x.float().detach().requires_grad_() for x in tensors()]
        outputs = [y.square() * weight for y, weight in zip(function(*arguments), (1.0, 3.0), strict=True)]
        first = torch.autograd.grad(sum(y.sum() for y in outputs), arguments, create_graph=True)
        results.append(torch.autograd.grad(sum(x.pow(3).sum() for x in first), arguments))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_tensor_without_gradient_gets_none():
    x, fixed = (x.float().detach() for x in tensors())
    x.requires_grad_()
    sum(y.sum() for y in gather(x, fixed)).backward()
    assert fixed.grad is None
    assert torch.equal(x.grad[:, 0], torch.bincount(ROWS, minlength=9).float())


def test_nan_does_not_leak_between_rows():
    x = torch.ones(9, 8, device=DEVICE, requires_grad=True)
    d_y = torch.ones(len(ROWS), 8, device=DEVICE)
    d_y[3] = math.nan
    (d_x,) = torch.autograd.grad(gather(x)[0], x, d_y)
    assert d_x.isnan().any(1).nonzero().flatten().tolist() == [7]


def test_no_rows_give_zero_gradients():
    x = torch.ones(9, 8, device=DEVICE, requires_grad=True)
    gather(x, rows=ROWS[:0])[0].sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_fake_results_are_the_real_ones():
    values = [torch.ones(len(ROWS), 8, device=DEVICE, dtype=dtype) for dtype in (FLOAT, BF16)]
    real = operator("triton", "gather_backward")(ROWS, values, 9)
    for a, b in zip(real, CONTRACTS["gather_backward"].fake(ROWS, values, 9), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def test_compiles_to_one_graph():
    arguments = [x.float().detach().requires_grad_() for x in tensors()]
    compiled = torch.compile(gather, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*arguments), indexed(*arguments), strict=True):
        assert torch.equal(a, b)
    whole = torch.autograd.grad(sum(y.square().sum() for y in compiled(*arguments)), arguments)
    eager = torch.autograd.grad(sum(y.square().sum() for y in indexed(*arguments)), arguments)
    for a, b in zip(whole, eager, strict=True):
        torch.testing.assert_close(a, b)
