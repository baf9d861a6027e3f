"""The gradients of tables in Triton: sums of the rows that have one index."""

import math

import pytest
import torch
from helpers import DEVICE

from bertfast.kernels.sum_by_index import sum_by_index

FLOAT = torch.float32


@pytest.mark.parametrize(
    "index",
    [
        torch.zeros(600),  # one run through every block of three rounds
        torch.arange(100).flip(0),  # no two alike
        torch.arange(100) // 32,  # a run is a block
        (torch.arange(100) + 16) // 32,  # every run lies in two blocks
        torch.arange(130).square() % 599 % 30,  # runs of all lengths
        torch.tensor([3]),  # one place
    ],
    ids=["one", "none", "blocks", "between", "all", "single"],
)
def test_sums_by_index(index):
    index = index.to(DEVICE, torch.int64)
    values = torch.arange(len(index) * 5, device=DEVICE, dtype=FLOAT).view(-1, 5) % 97  # whole, so sums are exact
    expected = torch.zeros(100, 5, device=DEVICE).index_add_(0, index, values)
    assert torch.equal(sum_by_index(values, index, 100, FLOAT), expected)


def test_a_sum_that_is_no_number_spoils_no_other():
    index = torch.arange(100, device=DEVICE) // 10
    values = torch.ones(100, 5, device=DEVICE)
    values[35] = math.nan
    assert torch.equal(sum_by_index(values, index, 10, FLOAT).isnan().any(1), torch.arange(10, device=DEVICE) == 3)
