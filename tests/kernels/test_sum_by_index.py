"""The gradients of tables in Triton: sums of the rows that have one index."""

import math

import pytest
import torch
from helpers import DEVICE

from bertfast.kernels.rows import row_config
from bertfast.kernels.sum_by_index import group_by_index, sum_by_index, sum_groups

FLOAT, BF16 = torch.float32, torch.bfloat16


def whole_numbers(count, hidden=5):
    """[count, hidden] whole numbers, whose sums are exact."""
    return torch.arange(count * hidden, device=DEVICE, dtype=FLOAT).view(count, hidden) % 97


def expected(values, index, rows):
    return torch.zeros(rows, values.shape[1], device=DEVICE).index_add_(0, index, values)


@pytest.mark.parametrize(
    "index",
    [
        torch.zeros(600),  # one group of eighteen blocks and a rest
        torch.arange(100).flip(0),  # all distinct
        torch.arange(128) // 32,  # each group is a block
        (torch.arange(130) + 16) // 32,  # each group crosses a block boundary, and contains no block
        torch.arange(300) // 100,  # groups with whole blocks and two partial ones
        torch.arange(130).square() % 599 % 30,  # groups of all sizes
        torch.tensor([3]),  # one
        torch.tensor([]),  # none
    ],
    ids=["equal", "distinct", "blocks", "straddling", "long", "mixed", "single", "empty"],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_sums_rows_with_equal_index(index, dtype):
    index = index.to(DEVICE, dtype)
    values = whole_numbers(len(index))
    assert torch.equal(sum_by_index(values, index, 100, FLOAT), expected(values, index, 100))


@pytest.mark.parametrize("hidden", [1, 128, 768, 1500])
def test_any_width(hidden):
    index = torch.arange(80, device=DEVICE) // 50
    values = whole_numbers(80, hidden)
    assert torch.equal(sum_by_index(values, index, 3, FLOAT), expected(values, index, 3))


def test_a_sum_leaves_the_shared_launch_options_as_they_are():
    """They are cached: an option that a sum adds would be unknown to the next LayerNorm of that width, or change it."""
    values = whole_numbers(64, 128)
    before = dict(row_config(128, values, summing=True))
    sum_by_index(values, torch.zeros(64, dtype=torch.int64, device=DEVICE), 1, FLOAT)
    assert row_config(128, values, summing=True) == before
    with pytest.raises(TypeError, match="does not support item assignment"):
        row_config(128, values, summing=True)["BLOCK"] = 32


def test_half_precision_is_summed_in_fp32():
    index = torch.zeros(300, dtype=torch.int64, device=DEVICE)
    values = torch.ones(300, 8, device=DEVICE, dtype=BF16)  # a bf16 sum of ones stops at 256
    assert torch.equal(sum_by_index(values, index, 1, FLOAT), torch.full((1, 8), 300.0, device=DEVICE))


def test_tables_share_one_sort():
    values = whole_numbers(90)
    indices = torch.arange(90, device=DEVICE) % 7, torch.arange(90, device=DEVICE) // 40
    sizes = [(9, FLOAT), (3, FLOAT)]
    tables = sum_groups(values, group_by_index(indices, [9, 3]), sizes, zero_row=4)
    first = expected(values, indices[0], 9)
    first[4] = 0
    assert torch.equal(tables[0], first)
    assert torch.equal(tables[1], expected(values, indices[1], 3))


def test_nan_does_not_leak_between_rows():
    index = torch.arange(400, device=DEVICE) // 40
    values = torch.ones(400, 5, device=DEVICE)
    values[135] = math.nan
    assert torch.equal(sum_by_index(values, index, 10, FLOAT).isnan().any(1), torch.arange(10, device=DEVICE) == 3)


def test_an_index_outside_the_table_changes_no_row():
    index = torch.tensor([0, -1, 5, 1, 1 << 20], device=DEVICE)
    values = torch.ones(5, 4, device=DEVICE)
    assert torch.equal(sum_by_index(values, index, 2, FLOAT), torch.ones(2, 4, device=DEVICE))


def test_is_bitwise_reproducible():
    index = torch.arange(300, device=DEVICE).square() % 7
    values = torch.randn(300, 33, device=DEVICE)
    assert torch.equal(sum_by_index(values, index, 7, FLOAT), sum_by_index(values, index, 7, FLOAT))
