"""Which bins the steps of a run take."""

import pytest

from bertfast.training.curriculum import Curriculum


@pytest.mark.parametrize("ramp", [0, 1, 5, 8])
@pytest.mark.parametrize("second_phase", [None, 3, 9])
def test_each_phase_takes_its_bins_in_a_row_and_none_twice(ramp, second_phase):
    curriculum = Curriculum(8, 1, ramp, second_phase)
    taken = [place for step in range(14) for place in curriculum.places(step, 0)]
    for phase in (0, 1):
        numbers = [number for where, number in taken if where == phase]
        assert numbers == list(range(len(numbers)))
    begun = 14 if second_phase is None else second_phase
    assert [where for where, _ in taken] == sorted(where for where, _ in taken)
    assert sum(where == 0 for where, _ in taken) == sum(map(curriculum.bins, range(begun)))


def test_a_ramp_takes_a_quarter_and_then_half_of_the_bins():
    curriculum = Curriculum(8, ramp=4)
    assert [curriculum.bins(step) for step in range(6)] == [2, 2, 4, 4, 8, 8]


def test_ranks_share_a_step():
    curriculum = Curriculum(8, 2, ramp=2)
    for step in range(4):
        whole = [number for _, number in Curriculum(8, 1, ramp=2).places(step, 0)]
        parts = [[number for _, number in curriculum.places(step, rank)] for rank in range(2)]
        assert sorted(parts[0] + parts[1]) == whole
        assert len(parts[0]) == len(parts[1])


def test_bins_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match=r"cannot be shared evenly by 2 ranks: choose .* that 4 divides"):
        Curriculum(4, 2, ramp=1)
    with pytest.raises(ValueError, match="cannot be shared evenly by 3 ranks"):
        Curriculum(4, 3)
