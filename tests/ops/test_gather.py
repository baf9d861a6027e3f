"""`gather`: rows of activations."""

import pytest
import torch
from helpers import compare_with_torch, normal

from bertfast import ops

ROWS = torch.tensor([4, 0, 0, 5, 2])


def indexed(*tensors):
    return tuple(x[ROWS] for x in tensors)


def gather(*tensors):
    return ops.gather(ROWS, *tensors)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_accurate_as_indexing(dtype, implementation):
    def gather(*tensors):
        if tensors[0].dtype == torch.float64:
            return indexed(*tensors)
        return ops.gather(ROWS, *tensors, implementation=implementation)

    compare_with_torch(gather, indexed, [normal(6, 5, seed=1), normal(6, 5, seed=2)], dtype)


def test_first_and_second_derivatives_are_correct():
    x = [normal(6, 3, seed=1), normal(6, 3, seed=2)]
    assert torch.autograd.gradcheck(gather, x)
    assert torch.autograd.gradgradcheck(lambda *x: tuple(y.square() for y in gather(*x)), x)


def test_a_tensor_without_gradient_gets_none():
    x, fixed = normal(6, 3), normal(6, 3).detach()
    sum(y.sum() for y in gather(x, fixed)).backward()
    assert fixed.grad is None
    assert torch.equal(x.grad[:, 0], torch.bincount(ROWS, minlength=6).double())


def test_half_precision_gradient_is_summed_in_fp32():
    x = torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True)
    ops.gather(torch.zeros(600, dtype=torch.int64), x)[0].sum().backward()  # a bf16 sum of ones stops at 256
    assert (x.grad[0] == 600).all()


def test_gather_under_no_grad():
    with torch.no_grad():
        assert torch.equal(gather(normal(6, 3))[0], normal(6, 3)[ROWS])


def test_compiles_to_one_graph():
    x = normal(6, 3)
    compiled = torch.compile(gather, fullgraph=True, backend="aot_eager")
    (d_x,) = torch.autograd.grad(compiled(x)[0].square().sum(), x)
    torch.testing.assert_close(d_x, torch.autograd.grad(indexed(x)[0].square().sum(), x)[0])


def test_errors_name_the_wrong_argument():
    x = normal(6, 3)
    with pytest.raises(TypeError, match=r"gather: rows must be int64 or int32, got torch\.bool"):
        ops.gather(ROWS > 2, x)
    with pytest.raises(ValueError, match=r"tensors\[1\] must have shape \[6, 3\], got \[5, 3\]"):
        ops.gather(ROWS, x, x[:5])
    with pytest.raises(ValueError, match="gather: implementation 'triton' is not available"):
        ops.gather(ROWS, x, implementation="triton")
    with pytest.raises(ValueError, match="its kernels support float32 and bfloat16"):
        ops.gather(ROWS, x, implementation="cpu")


@pytest.mark.parametrize("row", [-1, 6])
def test_a_row_out_of_range_is_named(row):
    with pytest.raises(IndexError, match=rf"gather: rows\[1\] is {row}, but tensors\[0\] has 6 rows: .* in 0 … 5"):
        ops.gather(torch.tensor([0, row]), normal(6, 3))


def test_a_call_without_tensors_is_refused():
    with pytest.raises(TypeError, match="gather: at least one tensor is required"):
        ops.gather(ROWS)
