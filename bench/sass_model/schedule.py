"""The distribution of work over SMs: blocks that the hardware dispatches, and work tiles of persistent blocks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def dispatched(costs: Sequence[float], slots: int) -> float:
    """Return when the last block ends: each free slot takes the next block, as the hardware dispatches a grid.

    Args:
        costs: Duration of each block, in the order of the grid.
        slots: Blocks that run at a time on all SMs.
    """
    ends = [0.0] * slots
    for cost in costs:
        heapq.heapreplace(ends, ends[0] + cost)
    return max(ends)


def alternating(costs: Sequence[float], blocks: int) -> float:
    """Return when the last of `blocks` persistent blocks ends.

    Each takes one work tile per turn, in the order of the list, and every other turn runs backwards, as in
    `csrc/cuda/work_tiles.cuh`.
    """
    ends = [0.0] * blocks
    for turn, start in enumerate(range(0, len(costs), blocks)):
        for block, cost in enumerate(costs[start : start + blocks]):
            ends[block if turn % 2 == 0 else blocks - 1 - block] += cost
    return max(ends, default=0.0)


def balance(costs: Sequence[float], end: float, slots: int) -> float:
    """Return the share of the slots' time until `end` in which they work."""
    return sum(costs) / (end * slots) if end else 1.0
