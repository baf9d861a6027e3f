"""`bench.sass_model.predict` finds the path of each case in kernels that Triton compiled, and its page is checked."""

import os
import sys

import launches
import pytest
from launches import in_a_process

from bench.sass_model import predict

not_interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets")


@pytest.mark.slow
@not_interpreted
def test_a_path_has_every_matmul_of_its_case_once():
    """128 x 64 blocks of S and O are two warpgroups of 64 x 64, so four wgmma of depth 16 for each of both matmuls."""
    counts = in_a_process(launches.count_wgmma, 512)
    assert counts["attention_forward"] == 512 // 64 * 8
    assert counts["attention_d_q"] == 512 // 64 * 12  # three matmuls
    assert in_a_process(launches.count_wgmma, 300)["attention_forward"] == (300 // 64 + 1) * 8  # one block is masked


@pytest.mark.slow
@not_interpreted
def test_predictions_are_below_the_limit_and_say_what_bounds_them():
    (rotary,) = in_a_process(launches.predict_launch, "rotary")
    assert 0.9 < rotary.prediction.limit / rotary.prediction.seconds <= 1
    assert rotary.prediction.bound.startswith("dram")
    rows = in_a_process(launches.predict_launch, "attention")
    assert all(0.2 < row.prediction.limit / row.prediction.seconds < 1 for row in rows)
    seconds = {(row.kernel, row.case): row.prediction.seconds for row in rows}
    # Four times the matmuls for the same tokens, while the start and the end of a block take their time less often.
    assert 2 < seconds["attention_forward", "length 2,048"] / seconds["attention_forward", "length 512"] < 4


LINES = [
    f"| {predict.COLUMNS} |",
    "|---" * 11 + "|",
    "| attention_forward | length 512 | 128 x 64, 8 warps | 106 | 2 | 9,831 | 129.0 | 400 | 1,573 | 40% | dram 87% |",
    "| both kernels | length 512 | | | | | 440.7 | 292 | | | |",
]


def test_a_page_that_is_not_renewed_is_found():
    assert predict.differences(LINES, ["# A title", "", *LINES]) == []
    within = [line.replace("129.0", "130.0") for line in LINES]
    assert predict.differences(LINES, within) == []
    changed = [line.replace("129.0", "131.0") for line in LINES]
    assert predict.differences(LINES, changed) == [
        "attention_forward, length 512: the page has 131.0 µs, this is 129.0"
    ]
    assert predict.differences(LINES, LINES[:3]) == ["both kernels, length 512: the page has no such row"]
    assert predict.differences(LINES[:3], LINES) == []
    assert predict.differences(LINES[:3], LINES, whole=True) == ["both kernels, length 512: only the page has this row"]


def test_an_unknown_kernel_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predict", "softmax"])
    with pytest.raises(SystemExit):
        predict.main()
    assert (
        "no kernel is called softmax: there are attention, add_layer_norm, pre_norm, bias_gelu"
        in capsys.readouterr().err
    )
