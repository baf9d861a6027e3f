"""`linear_cross_entropy`: the masked-LM loss without materialised logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import LargestTensor, compare_with_torch, normal

from bertfast import ops
from bertfast.ops import linear_cross_entropy_fallback, reference

ROWS = torch.tensor([4, 0, 0, 7, 2, 5, 1])  # row 0 twice
LABELS = torch.tensor([3, 0, 10, -100, 5, -100, 3])


def inputs(tokens=8, hidden=6, vocab_size=11):
    return [normal(tokens, hidden), normal(vocab_size, hidden), normal(vocab_size)]


def linear_cross_entropy(hidden, weight, bias, rows=ROWS, labels=LABELS):
    return ops.linear_cross_entropy(hidden, rows, weight, bias, labels)[0]


def composed(hidden, weight, bias, rows=ROWS, labels=LABELS):
    logits = F.linear(hidden[rows], weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_accurate_as_torch(dtype, chunk, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy_fallback, "_LOGIT_ELEMENTS", 11 * chunk)
    compare_with_torch(linear_cross_entropy, composed, inputs(hidden=24), dtype)


@pytest.mark.parametrize("chunk", [2, 1000])
def test_gradient_is_the_derivative(chunk, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy_fallback, "_LOGIT_ELEMENTS", 11 * chunk)
    assert torch.autograd.gradcheck(linear_cross_entropy, inputs())
    assert torch.autograd.gradcheck(lambda *x: 3 * linear_cross_entropy(*x), inputs())


def test_chunks_give_the_result_of_the_reference(monkeypatch):
    monkeypatch.setattr(linear_cross_entropy_fallback, "_LOGIT_ELEMENTS", 22)
    arguments = inputs()
    results = []
    for implementation in (None, "reference"):  # in float64 there is no kernel
        loss, *counts = ops.linear_cross_entropy(
            arguments[0], ROWS, *arguments[1:], LABELS, implementation=implementation
        )
        results.append([loss, *counts, *torch.autograd.grad(loss, arguments)])
    for chunked, whole in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole)


def test_correct_and_counted_labels():
    hidden, weight, bias = inputs()
    best = (hidden @ weight.T + bias).argmax(1)
    labels = best[ROWS].clone()
    labels[1] = (labels[1] + 1) % 11
    labels[3] = -100
    loss, correct, counted = ops.linear_cross_entropy(hidden, ROWS, weight, bias, labels)
    assert (correct.item(), counted.item()) == (5, 6)
    assert correct.dtype == counted.dtype == torch.int64
    assert (loss.requires_grad, correct.requires_grad) == (True, False)


def test_the_full_logits_are_never_materialised(monkeypatch):
    tokens, hidden, vocab_size, chunk = 64, 8, 512, 4
    monkeypatch.setattr(linear_cross_entropy_fallback, "_LOGIT_ELEMENTS", chunk * vocab_size)
    arguments = inputs(tokens, hidden, vocab_size)
    rows, labels = torch.arange(tokens), torch.arange(tokens)
    with LargestTensor() as largest:
        linear_cross_entropy(*arguments, rows, labels).backward()
    assert largest.elements == max(chunk, hidden) * vocab_size
    with LargestTensor() as largest:
        composed(*arguments, rows, labels).backward()
    assert largest.elements == tokens * vocab_size


def test_gradients_that_are_not_required_are_not_computed():
    hidden, weight, bias = inputs(8, 2 * len(ROWS), 300)  # the weight, and so its gradient, outgrows the logits
    with torch.no_grad(), LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, bias)
    assert largest.elements == len(ROWS) * 300  # the logits alone
    weight, bias = weight.detach(), bias.detach()
    linear_cross_entropy(hidden, weight, bias).backward()
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(composed(hidden, weight, bias), hidden)[0])
    assert weight.grad is None


def test_the_gradient_of_the_weight_is_scaled_in_place():
    hidden, weight, bias = inputs()
    loss = linear_cross_entropy(hidden, weight, bias)
    saved = loss.grad_fn.saved_tensors[1].data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == saved


def test_backward_may_run_twice():
    arguments = inputs()
    loss = linear_cross_entropy(*arguments)
    once = torch.autograd.grad(loss, arguments, retain_graph=True)
    twice = torch.autograd.grad(2 * loss, arguments)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(2 * a, b)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:0]])
def test_without_labels_loss_and_gradients_are_zero(rows):
    arguments = inputs()
    loss, correct, counted = ops.linear_cross_entropy(arguments[0], rows, *arguments[1:], torch.full_like(rows, -100))
    loss.backward()
    assert (loss.item(), correct.item(), counted.item()) == (0, 0, 0)
    for x in arguments:
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_ignored_rows_may_hold_nan():
    hidden, weight, bias = inputs()
    poisoned = hidden.detach().clone()
    poisoned[[7, 5, 3, 6]] = math.nan  # rows without a label, and rows that are not read
    poisoned.requires_grad_()
    results = [
        torch.autograd.grad(linear_cross_entropy(x, weight, bias), [x, weight, bias]) for x in (hidden, poisoned)
    ]
    for clean, other in zip(*results, strict=True):
        assert torch.equal(clean, other)


def test_order_of_rows_does_not_matter():
    order = torch.tensor([3, 6, 0, 2, 5, 1, 4])
    torch.testing.assert_close(
        linear_cross_entropy(*inputs(), ROWS[order], LABELS[order]), linear_cross_entropy(*inputs())
    )


def test_wide_logits_do_not_overflow():
    hidden, weight, bias = (1e4 * x for x in inputs())
    assert linear_cross_entropy(hidden.float(), weight.float(), bias.float()).isfinite()


def test_int32_indices_are_supported():
    assert torch.equal(linear_cross_entropy(*inputs(), ROWS.int(), LABELS.int()), linear_cross_entropy(*inputs()))


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_a_row_index_out_of_range_is_named(implementation):
    hidden, weight, bias = (x.float() for x in inputs())
    with pytest.raises(IndexError, match=r"rows\[0\] is .*, but hidden has 8 rows: rows must be in"):
        ops.linear_cross_entropy(hidden, ROWS + 8, weight, bias, LABELS, implementation=implementation)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_a_label_outside_the_vocabulary_is_named(implementation):
    hidden, weight, bias = (x.float() for x in inputs())
    labels = LABELS.clone()
    labels[[2, 5]] = 11
    with pytest.raises(IndexError) as error:
        ops.linear_cross_entropy(hidden, ROWS, weight, bias, labels, implementation=implementation)
    assert str(error.value) == (
        "linear_cross_entropy: labels[2] is 11, but weight has 11 rows: labels must be in 0 … 10, or negative (-100) "
        "for an ignored row"
    )


def test_a_label_outside_the_vocabulary_makes_the_reference_nan():
    """As on a GPU, where labels are not checked."""
    hidden, weight, bias = inputs()
    loss, *_ = reference.linear_cross_entropy(hidden, ROWS, weight, bias, LABELS + 1)
    assert loss.isnan()


def test_without_rows_all_are_read_in_order():
    arguments = [x.float().detach().requires_grad_() for x in inputs()]
    labels = torch.cat([LABELS, LABELS[:1]])
    results = []
    for rows in (None, torch.arange(8)):
        loss, correct, counted = ops.linear_cross_entropy(arguments[0], rows, *arguments[1:], labels)
        results.append([loss, correct, counted, *torch.autograd.grad(loss, arguments)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_bias_equals_a_bias_of_zeros(implementation, dtype):
    hidden, weight, bias = (x.detach().to(dtype).requires_grad_() for x in inputs())
    results = []
    for each in (None, torch.zeros_like(bias)):
        loss, *counts = ops.linear_cross_entropy(hidden, ROWS, weight, each, LABELS, implementation=implementation)
        results.append([loss, *counts, *torch.autograd.grad(loss, [hidden, weight])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_errors_name_the_wrong_argument():
    hidden, weight, bias = inputs()
    with pytest.raises(ValueError, match=r"linear_cross_entropy: labels must have shape \[7\], got \[6\]"):
        linear_cross_entropy(hidden, weight, bias, labels=LABELS[:6])
    with pytest.raises(ValueError, match=r"linear_cross_entropy: labels must have shape \[8\], got \[7\]"):
        linear_cross_entropy(hidden, weight, bias, rows=None)
    with pytest.raises(ValueError, match=r"weight must have shape \[11, 6\], got \[11, 5\]"):
        linear_cross_entropy(hidden, weight[:, :5], bias)
    with pytest.raises(TypeError, match="rows must be int64 or int32, got torch"):
        linear_cross_entropy(hidden, weight, bias, rows=ROWS > 2)
