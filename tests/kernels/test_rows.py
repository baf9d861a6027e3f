"""Launches of the row kernels: the tiles and the programs of kernels that sum over rows."""

import pytest
import torch

from bertfast.kernels import rows

FLOAT, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(("warps", "per_sm"), [(1, 16), (2, 8), (4, 4), (8, 2), (32, 1)])
def test_programs_of_any_number_of_warps_fill_an_sm(monkeypatch, warps, per_sm):
    monkeypatch.setattr(rows, "sm_count", lambda _device: 132)
    device = torch.device("cpu")
    assert rows.summing_programs(1_000_000, device, warps) == per_sm * 132
    assert rows.summing_programs(5, device, warps) == 5  # no program without a tile
    assert rows.summing_programs(0, device, warps) == 1  # which writes sums of zero


@pytest.mark.parametrize(
    ("columns", "rows_of_tile", "dtype"),
    [(384, 4, BF16), (768, 2, FLOAT), (768, 2, BF16), (1536, 1, FLOAT), (1536, 1, BF16), (3072, 1, BF16)],
)
def test_no_lane_idles_at_three_times_a_power_of_two(columns, rows_of_tile, dtype):
    config = rows.row_config(columns, torch.empty(0, dtype=dtype), summing=True)
    assert 3 * config["CHUNK"] == columns
    assert config["ROWS"] == rows_of_tile
    assert config["ROWS"] * config["CHUNK"] == 4 * 32 * config["num_warps"]  # 4 columns of a chunk belong to a lane


def test_fp32_rows_of_384_columns_are_not_held_by_one_warp():
    assert rows.row_config(384, torch.empty(0, dtype=FLOAT), summing=True)["CHUNK"] == 512


@pytest.mark.parametrize("columns", [384, 768])
def test_all_warps_share_a_row_where_rows_of_a_tile_are_added(columns):
    config = rows.row_config(columns, torch.empty(0), summing=True, warps_share_rows=True)
    assert config["CHUNK"] >= 32 * config["num_warps"]
    assert config["CHUNK"] & (config["CHUNK"] - 1) == 0
    assert config["ROWS"] == 1
