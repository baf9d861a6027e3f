"""The curriculum's assignment of bins to steps and ranks."""

import pytest

from bertfast.training.curriculum import Curriculum


@pytest.mark.parametrize("ramp", [0, 1, 5, 8])
@pytest.mark.parametrize("second_phase", [None, 3, 9])
def test_each_phase_uses_its_bins_in_order_and_once(ramp, second_phase):
    curriculum = Curriculum(8, 1, ramp, second_phase)
    taken = [index for step in range(14) for index in curriculum.bins_of_rank(step, 0)]
    for phase in (0, 1):
        numbers = [number for phase_of_bin, number in taken if phase_of_bin == phase]
        assert numbers == list(range(len(numbers)))
    begun = 14 if second_phase is None else second_phase
    assert [phase_of_bin for phase_of_bin, _ in taken] == sorted(phase_of_bin for phase_of_bin, _ in taken)
    assert sum(phase_of_bin == 0 for phase_of_bin, _ in taken) == sum(map(curriculum.bins, range(begun)))


def test_a_ramp_takes_a_quarter_and_then_half_of_the_bins():
    curriculum = Curriculum(8, ramp=4)
    assert [curriculum.bins(step) for step in range(6)] == [2, 2, 4, 4, 8, 8]


def test_bins_of_a_step_are_divided_among_ranks():
    curriculum = Curriculum(8, 2, ramp=2)
    for step in range(4):
        whole = [number for _, number in Curriculum(8, 1, ramp=2).bins_of_rank(step, 0)]
        parts = [[number for _, number in curriculum.bins_of_rank(step, rank)] for rank in range(2)]
        assert sorted(parts[0] + parts[1]) == whole
        assert len(parts[0]) == len(parts[1])


def test_bins_that_cannot_be_divided_evenly_are_refused():
    with pytest.raises(
        ValueError, match=r"--gradient-accumulation-steps, .* a multiple of 4, got 2: raise it, or pass --b"
    ):
        Curriculum(4, 2, ramp=1)
    with pytest.raises(ValueError, match="cannot be divided evenly among 3 ranks"):
        Curriculum(4, 3)
