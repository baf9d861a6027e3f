"""The time of an attention kernel for a batch of sequences of many lengths.

Blocks of sequences of different lengths take different times. The block of each length is simulated among its like, and
the hardware's dispatch then distributes all blocks over SMs, those of the longest sequences first, as the tile table
of `kernels/attention_tiles.py` orders them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.sass_model import schedule
from bench.sass_model.constants import Gpu
from bench.sass_model.kernel_time import Kernel, Prediction, Work, limit, predict


@dataclass(frozen=True)
class Batch:
    """Sequences, and how a kernel divides them.

    Attributes:
        lengths: Length of each sequence.
        heads: Each head has blocks of its own.
        rows: Rows of a block; a sequence has as many blocks as it needs.
        step: Rows of an iteration of the kernel's loop.
    """

    lengths: Sequence[int]
    heads: int
    rows: int
    step: int


def predict_mixed(kernel: Kernel, work_of: Callable[[int], Work], batch: Batch, total: Work, gpu: Gpu) -> Prediction:
    """Return the predicted time of a launch.

    Args:
        kernel: The machine code.
        work_of: Returns the work of a launch with about as many tokens whose sequences all have one length.
        batch: The sequences.
        total: The work of the launch, for its limit.
        gpu: The GPU.
    """
    found: dict[tuple[int, bool], Prediction] = {}
    costs: list[float] = []
    for length in sorted(batch.lengths, reverse=True):
        # Blocks with equally many iterations, a partial one included, take the same time.
        key = length // batch.step, length % batch.step > 0
        if key not in found:
            found[key] = predict(kernel, work_of(length), gpu)
        # All resident blocks end once in the time of as many intervals between ends.
        cost = found[key].block_cycles * found[key].resident
        costs += [cost] * (-(-length // batch.rows) * batch.heads)
    resident = next(iter(found.values())).resident
    cycles = schedule.dispatched(costs, resident * gpu.sms)
    return Prediction(
        cycles / gpu.clock,
        sum(costs) / len(costs) / resident,
        resident,
        limit(total, gpu),
        {"balance of SMs": schedule.balance(costs, cycles, resident * gpu.sms)},
    )


def predict_persistent(
    kernel: Kernel, work_of: Callable[[int], Work], batch: Batch, total: Work, gpu: Gpu
) -> Prediction:
    """Return the predicted time of persistent blocks, which take the heads of sequences in turns, the longest first.

    Args:
        kernel: The machine code.
        work_of: Returns the work of a launch whose sequences all have one length, whose blocks have `tiles` work tiles.
        batch: The sequences.
        total: The work of the launch, for its limit.
        gpu: The GPU.
    """
    found: dict[tuple[int, bool], float] = {}
    costs: list[float] = []
    for length in sorted(batch.lengths, reverse=True):
        key = length // batch.step, length % batch.step > 0
        if key not in found:
            uniform = work_of(length)
            found[key] = predict(kernel, uniform, gpu).block_cycles / max(uniform.tiles, 1)
        costs += [found[key]] * batch.heads
    blocks = min(len(costs), gpu.sms)
    cycles, shortest = schedule.alternating(costs, blocks), limit(total, gpu)
    share = schedule.balance(costs, cycles, blocks)
    return Prediction(max(cycles / gpu.clock, shortest), cycles, 1, shortest, {"balance of SMs": share})
