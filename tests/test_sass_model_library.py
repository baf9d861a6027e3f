"""`bench.sass_model.library_time` computes times of library operators that follow by hand from its assumed rates."""

import pytest

from bench.sass_model import constants
from bench.sass_model.constants import H200
from bench.sass_model.library_time import gemm_time, library_time
from bench.sass_model.trace import Call

OF_SM = constants.GEMM_FLOPS / H200.sms


def call(name: str, moved: int = 0, **sizes) -> Call:
    return Call(name, "", False, moved, 0, **sizes)


def test_a_gemm_of_whole_waves_runs_at_the_full_rate():
    found = gemm_time(128 * 132, 3 * 256, 768, H200)
    assert found.launches == 1
    assert found.seconds == pytest.approx(2 * 128 * 132 * 768 * 768 / constants.GEMM_FLOPS)


def test_another_row_of_tiles_takes_another_wave_of_the_best_tiles():
    """133 tiles of 128 x 256 are two waves; 266 of 128 x 128, at 85 % of the rate, are three of half the work."""
    expected = 3 * 2 * 128 * 128 * 4096 / (0.85 * OF_SM)
    assert gemm_time(128 * 133, 256, 4096, H200).seconds == pytest.approx(expected)


def test_few_tiles_share_their_sums():
    """The gradient of a 768 x 768 weight has 18 tiles: seven blocks per tile use 126 of the 132 SMs."""
    found = gemm_time(768, 768, 32_768, H200)
    parts = 2 * 7 * 768 * 768 * 4 / H200.copy_bandwidth
    assert found.launches == 2
    assert found.seconds == pytest.approx(2 * 128 * 256 * 32_768 / 7 / OF_SM + parts)


def test_a_gemm_takes_at_least_the_time_of_its_bytes():
    assert library_time(call("mm", 43 * 10**8, gemm=(128, 128, 64)), H200).seconds == pytest.approx(1e-3)


def test_other_operators_take_the_time_of_a_copy():
    found = library_time(call("add", 43 * 10**8), H200)
    assert (found.launches, found.seconds) == (1, pytest.approx(1e-3))
    assert library_time(call("add", 4), H200).seconds == constants.SHORTEST


@pytest.mark.parametrize("size", [2, 4])
def test_a_sort_of_many_keys_takes_a_pass_per_byte(size):
    assert library_time(call("sort", rows=4096, element=size), H200).launches == 1
    found = library_time(call("sort", rows=4097, element=size), H200)
    assert (found.launches, found.seconds) == (size + 3, pytest.approx(size * 5e-6 + 3 * 2e-6))


def test_a_launch_takes_many_tensors():
    found = library_time(call("_foreach_norm", 43 * 10**8, chunks=641), H200)
    assert (found.launches, found.seconds) == (3, pytest.approx(1e-3))
