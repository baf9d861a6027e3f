"""Launches of the row kernels: programs that sum over rows."""

import pytest
import torch

from bertfast.kernels import rows


@pytest.mark.parametrize(("warps", "per_sm"), [(1, 16), (2, 8), (4, 4), (8, 2), (32, 1)])
def test_programs_of_any_number_of_warps_fill_an_sm(monkeypatch, warps, per_sm):
    monkeypatch.setattr(rows, "sm_count", lambda _device: 132)
    device = torch.device("cpu")
    assert rows.summing_programs(1_000_000, device, warps) == per_sm * 132
    assert rows.summing_programs(5, device, warps) == 5  # no program without a tile
    assert rows.summing_programs(0, device, warps) == 1  # which writes sums of zero
