"""The kernels of `linear_cross_entropy`, against the reference."""

import math

import pytest
import torch
from helpers import DEVICE, KERNELS, compare_with_torch, normal, under_autocast, with_half

from bertfast import ops
from bertfast.ops import linear_cross_entropy_native
from bertfast.ops.dispatch import operator

if KERNELS == "triton":
    from bertfast.kernels import linear_cross_entropy as triton_kernels

FLOAT, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
ROWS = torch.tensor([4, 0, 0, 7, 2, 5, 1, 7], device=DEVICE)  # 0 and 7 twice, 3 and 6 never
LABELS = torch.tensor([0, 3, 0, -100, 1, -100, 3, 2], device=DEVICE)
VOCABULARIES = [
    1,  # a single class
    5,  # less than 16 bytes of a lane
    64,  # a tile, no padding
    65,  # one column more
    1000,  # the smallest that is guaranteed
    4096,  # a block of lanes in bf16, two in fp32
    4097,  # one column more
]


def inputs(vocabulary, tokens=8, hidden=24, scale=1.0):
    arguments = normal(tokens, hidden, seed=1), normal(vocabulary, hidden, seed=2), normal(vocabulary, seed=3)
    return [(scale * x).detach().to(DEVICE).requires_grad_() for x in arguments]


def kernel(hidden, weight, bias, rows=ROWS, labels=LABELS):
    labels = labels.clamp(max=len(weight) - 1)
    return ops.linear_cross_entropy(hidden, rows, weight, bias, labels, implementation=KERNELS)


def reference(hidden, weight, bias, rows=ROWS, labels=LABELS):
    labels = labels.clamp(max=len(weight) - 1)
    return ops.linear_cross_entropy(hidden, rows, weight, bias, labels, implementation="reference")


def gradients(arguments, *indices):
    return torch.autograd.grad(kernel(*arguments, *indices)[0], arguments)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["fp32", "bf16"])
def test_is_as_accurate_as_the_reference(vocabulary, dtype):
    compare_with_torch(kernel, reference, inputs(vocabulary), dtype)


@with_half
def test_half_precision_is_as_accurate_as_pytorch():
    compare_with_torch(kernel, reference, inputs(100), HALF)


def test_the_vocabulary_of_bert_is_as_accurate_as_pytorch():
    compare_with_torch(kernel, reference, inputs(30_522, hidden=8), BF16)


@pytest.mark.parametrize("hidden", [FLOAT, BF16], ids=["fp32", "bf16"])
def test_under_autocast(hidden):
    actual, expected = under_autocast(kernel, BF16), under_autocast(reference, BF16)
    compare_with_torch(actual, expected, inputs(100), [hidden, FLOAT, FLOAT], gemm_dtype=BF16)


def test_more_rows_than_a_tile():
    labels = torch.arange(40, device=DEVICE) % 9 - 1
    rows = torch.arange(40, device=DEVICE)
    arguments = inputs(130, tokens=40)
    compare_with_torch(lambda *x: kernel(*x, rows, labels), lambda *x: reference(*x, rows, labels), arguments, FLOAT)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:0]], ids=["no label", "no row"])
def test_without_labels_loss_and_gradients_are_zero(rows):
    arguments = [x.float().detach().requires_grad_() for x in inputs(100)]
    results = kernel(*arguments, rows, torch.full_like(rows, -100))
    assert [x.item() for x in results] == [0, 0, 0]
    for x, d_x in zip(arguments, torch.autograd.grad(results[0], arguments), strict=True):
        assert torch.equal(d_x, torch.zeros_like(x))


def test_ignored_rows_may_hold_nan():
    hidden, weight, bias = (x.float().detach().requires_grad_() for x in inputs(100))
    with_nan = hidden.detach().clone()
    with_nan[[5, 3, 6]] = math.nan  # a row without a label, and rows that are not read
    with_nan.requires_grad_()
    for clean, other in zip(gradients([hidden, weight, bias]), gradients([with_nan, weight, bias]), strict=True):
        assert torch.equal(clean, other)


def test_logits_may_be_very_large():
    compare_with_torch(kernel, reference, inputs(300, scale=50.0), FLOAT)  # ± 1e4
    compare_with_torch(kernel, reference, inputs(300, scale=50.0), BF16)


def test_a_logit_may_be_minus_infinity():
    hidden, weight, bias = inputs(100)
    bias.data[[50, 99]] = -math.inf
    compare_with_torch(kernel, reference, [hidden, weight, bias], FLOAT)


@pytest.mark.parametrize("largest", [[2, 3], [2, 70], [4500, 9000]])  # of one lane, of two, not of the first block
@pytest.mark.parametrize(("index", "expected"), [(0, 1), (1, 0)])
def test_the_prediction_is_the_first_of_equal_logits(largest, index, expected):
    hidden, weight, bias = torch.ones(1, 4), torch.zeros(9001, 4), torch.zeros(9001)
    bias[largest] = 1.0
    label = largest[index]
    labels = torch.tensor([label], device=DEVICE)
    correct = kernel(hidden.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), labels * 0, labels)[1]
    assert correct.item() == expected


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from the interpreter, about NaN
@pytest.mark.skipif(KERNELS == "cpu", reason="an error on a CPU, see tests/ops")
@pytest.mark.parametrize("label", [100, 127, 128, 1 << 32])  # of 100; the logits have 128 columns
def test_a_label_outside_the_vocabulary_makes_the_loss_nan(label):
    hidden, weight, bias = (x.float() for x in inputs(100))
    labels = torch.tensor([label], device=DEVICE)
    loss, correct, _ = ops.linear_cross_entropy(hidden, labels * 0, weight, bias, labels, implementation=KERNELS)
    assert loss.isnan()
    assert correct.item() == 0


@pytest.mark.parametrize("hidden", [FLOAT, BF16], ids=["fp32", "bf16"])
def test_without_rows_all_are_read_in_order(hidden):
    def in_order(*arguments):
        return kernel(*arguments, None)

    compare_with_torch(in_order, lambda *x: reference(*x, torch.arange(8, device=DEVICE)), inputs(100), hidden)
    arguments = [x.to(hidden).detach().requires_grad_() for x in inputs(100)]
    before = arguments[0].detach().clone()
    rows = torch.arange(8, device=DEVICE)
    for a, b in zip(gradients(arguments, None), gradients(arguments, rows), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(arguments[0], before)  # d_hidden is computed in place, in a copy


def test_without_rows_nothing_is_summed_by_index(monkeypatch):
    module, name = (
        (triton_kernels, "sum_by_index") if KERNELS == "triton" else (linear_cross_entropy_native, "_sum_by_index")
    )

    def refuse(*_):
        raise AssertionError("rows in order need no sum by index")

    monkeypatch.setattr(module, name, refuse)
    arguments = [x.float().detach().requires_grad_() for x in inputs(100)]
    assert gradients(arguments, None)[0].any()
    with pytest.raises(AssertionError, match="no sum by index"):
        gradients(arguments, ROWS)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_that_are_not_needed_are_empty(which):
    arguments = [x.float().detach() for x in inputs(100)]
    needs_grad = [i == which for i in range(3)]
    forward = operator(KERNELS, "linear_cross_entropy_forward")
    gradients = forward(arguments[0], ROWS, *arguments[1:], LABELS, needs_grad, FLOAT)[3:]
    assert [x.numel() > 0 for x in gradients] == needs_grad
    arguments[which].requires_grad_()
    actual, expected = (torch.autograd.grad(run(*arguments)[0], arguments[which])[0] for run in (kernel, reference))
    torch.testing.assert_close(actual, expected)


def test_indices_may_be_int32_and_have_any_stride():
    arguments = [x.float().detach().requires_grad_() for x in inputs(100)]
    strided = torch.stack([ROWS, LABELS], 1).int()
    for a, b in zip(gradients(arguments), gradients(arguments, *strided.unbind(1)), strict=True):
        assert torch.equal(a, b)


def test_is_bitwise_reproducible():
    arguments = [x.to(BF16).detach().requires_grad_() for x in inputs(100)]
    for a, b in zip(gradients(arguments), gradients(arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_compiles_to_one_graph():
    arguments = [x.float().detach().requires_grad_() for x in inputs(100)]
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    whole = torch.autograd.grad(compiled(*arguments)[0], arguments)
    for a, b in zip(gradients(arguments), whole, strict=True):
        assert torch.equal(a, b)
