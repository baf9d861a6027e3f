"""Which bins (packed batches) each step takes: fewer during the batch ramp, longer sequences in a second phase."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

FRACTIONS = (4, 2)  # divisors of bins_per_step in the first and the second half of the ramp


@dataclass(frozen=True)
class Curriculum:
    """Assignment of bins to steps; the bins of each phase are numbered from 0 in the order in which they are used.

    Attributes:
        bins_per_step: Bins of a step, over all ranks.
        ranks: Number of ranks; bin i of a step goes to rank i mod ranks.
        ramp: Number of steps of the batch ramp (0 = off).
        second_phase: First step of the second phase; None: there is none.
    """

    bins_per_step: int
    ranks: int = 1
    ramp: int = 0
    second_phase: int | None = None

    def __post_init__(self) -> None:
        per_rank, rest = divmod(self.bins_per_step, self.ranks)
        if rest:
            raise ValueError(
                f"a step of {self.bins_per_step} batches cannot be divided evenly among {self.ranks} ranks: use a "
                f"multiple of {self.ranks} batches"
            )
        if self.ramp and per_rank % FRACTIONS[0]:
            raise ValueError(
                f"--batch-ramp begins with a quarter of --gradient-accumulation-steps, which must be a multiple of "
                f"{FRACTIONS[0]}, got {per_rank}: raise it, or pass --batch-ramp 0"
            )

    def bins(self, step: int) -> int:
        """Return the number of bins of step `step`, counted from 0."""
        if step >= self.ramp:
            return self.bins_per_step
        return self.bins_per_step // FRACTIONS[step * len(FRACTIONS) // self.ramp]

    def first(self, step: int) -> int:
        """Return the index of the first bin of a step within its phase."""
        if self.second_phase is None or step < self.second_phase:
            return self._before(step)
        return self._before(step) - self._before(self.second_phase)

    def bins_of_rank(self, step: int, rank: int) -> Iterator[tuple[int, int]]:
        """Yield (phase, bin) of the bins of a step that a rank computes."""
        first = self.first(step)
        return ((int(self.in_second_phase(step)), first + i) for i in range(rank, self.bins(step), self.ranks))

    def in_second_phase(self, step: int) -> bool:
        """Return whether a step is in the second phase."""
        return self.second_phase is not None and step >= self.second_phase

    def _before(self, step: int) -> int:
        """Return the number of bins of all steps before `step`."""
        half = -(-self.ramp // 2)  # steps of the ramp's first half
        # Steps before `step` in the ramp's first half, in its second half and after it, times the bins per step there.
        spans = (min(step, half), min(max(step - half, 0), self.ramp - half), max(step - self.ramp, 0))
        counts = (*(self.bins_per_step // fraction for fraction in FRACTIONS), self.bins_per_step)
        return sum(span * count for span, count in zip(spans, counts, strict=True))
