"""Which bins each step of a run takes: fewer while the batch ramps up, longer sequences in a second phase."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

FRACTIONS = (4, 2)  # a ramp takes a quarter of a step's bins in its first half, then half of them


@dataclass(frozen=True)
class Curriculum:
    """The bins of steps, each phase's numbered from 0 in the order they are taken.

    Attributes:
        bins_per_step: Bins of a step, over all ranks.
        ranks: How many share them, bin by bin.
        ramp: Steps of the ramp; 0: there is none.
        second_phase: The step that the second phase begins with; None: there is none.
    """

    bins_per_step: int
    ranks: int = 1
    ramp: int = 0
    second_phase: int | None = None

    def __post_init__(self):
        least = self.bins_per_step // FRACTIONS[0] if self.ramp else self.bins_per_step
        if self.bins_per_step % self.ranks or (self.ramp and self.bins_per_step % (FRACTIONS[0] * self.ranks)):
            raise ValueError(
                f"a step of {self.bins_per_step} batches, {least} at first, cannot be shared evenly by {self.ranks} "
                "ranks: choose gradient_accumulation_steps that 4 divides"
            )

    def bins(self, step: int) -> int:
        """How many bins step `step`, from 0, takes."""
        if step >= self.ramp:
            return self.bins_per_step
        return self.bins_per_step // FRACTIONS[step * len(FRACTIONS) // self.ramp]

    def first(self, step: int) -> int:
        """The number of the first bin of a step, in its phase."""
        return self._before(step) - (self._before(self.second_phase) if self._in_second_phase(step) else 0)

    def places(self, step: int, rank: int) -> Iterator[tuple[int, int]]:
        """(phase, bin) of those of a step that a rank computes."""
        first = self.first(step)
        return ((int(self._in_second_phase(step)), first + i) for i in range(rank, self.bins(step), self.ranks))

    def _before(self, step: int) -> int:
        """The bins of all steps before one."""
        half = -(-self.ramp // 2)  # the ramp's first half, in which a quarter of the bins is taken
        spans = (min(step, half), min(max(step - half, 0), self.ramp - half), max(step - self.ramp, 0))
        counts = (*(self.bins_per_step // fraction for fraction in FRACTIONS), self.bins_per_step)
        return sum(span * count for span, count in zip(spans, counts, strict=True))

    def _in_second_phase(self, step: int) -> bool:
        return self.second_phase is not None and step >= self.second_phase
