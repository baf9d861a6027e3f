"""The time of one launch of a kernel on a GPU, predicted from its machine code.

An SM gets every `sms`-th block. Its blocks are simulated, the first and the last ones in full; if there are many, the
ones between take the interval between ends in the steady state. The launch itself is not included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.sass_model import constants, control_words, pipes, sass
from bench.sass_model.constants import Gpu
from bench.sass_model.control_flow import Choice, ControlFlow
from bench.sass_model.memory import Memory
from bench.sass_model.occupancy import blocks_per_sm
from bench.sass_model.pipes import Kind, Step
from bench.sass_model.simulator import Result, SubPartition

_ROUNDS = 12  # blocks per slot that are simulated: warps of different blocks shift against each other
_BOUND = 0.75  # share of the cycles from which a resource is named as what bounds the kernel


@dataclass(frozen=True)
class Kernel:
    """The machine code of a kernel.

    Attributes:
        listing: Its listing by `cuobjdump -sass`, with encodings.
        warps: Warps of a block.
        registers: Registers per thread.
        shared_memory: Bytes of shared memory of a block.
    """

    listing: str
    warps: int
    registers: int
    shared_memory: int


@dataclass(frozen=True)
class Work:
    """What one launch does.

    Attributes:
        blocks: Number of blocks that do something.
        choice: The path of their warps.
        flop: Floating-point operations of its matmuls.
        reads: Bytes that must come from DRAM, each input once.
        writes: Bytes of its outputs.
        loads: Bytes that all blocks load from L2, those of DRAM included.
        roles: Paths of the warps of a block that are on one sub-partition, if they differ, as in a kernel with producer
            and consumer warps. Those that do next to nothing, such as the producer of TMA loads, are left out.
        tiles: Work tiles of a persistent block.
        waits: How often a block waits for loads by TMA that nothing hides. Loads that a ring buffer fetches ahead are
            no such wait.
        awaited: Bytes of each.
    """

    blocks: int
    choice: Choice
    flop: float
    reads: float
    writes: float
    loads: float
    roles: tuple[Choice, ...] = ()
    tiles: int = 1
    waits: int = 0
    awaited: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """The predicted time of a launch.

    Attributes:
        seconds: Its duration.
        block_cycles: Cycles from the end of one block of an SM to that of the next.
        resident: Blocks that an SM holds at a time.
        limit: Seconds that the tensor cores' peak or the copy bandwidth would allow, the longer of both.
        utilisation: Share of the cycles in which each resource is occupied.
    """

    seconds: float
    block_cycles: float
    resident: int
    limit: float
    utilisation: dict[str, float]

    @property
    def bound(self) -> str:
        """What bounds the kernel: the resource that is occupied most, or latency if none is occupied for long."""
        name, share = max(self.utilisation.items(), key=lambda item: item[1])
        return f"{name} {share:.0%}" if share >= _BOUND else f"latency ({name} {share:.0%})"


def predict(kernel: Kernel, work: Work, gpu: Gpu) -> Prediction:
    """Return the predicted time of a launch.

    Raises:
        ValueError: The listing has no control words, or an instruction that is not known, or the path does not end.
    """
    paths = [steps(kernel.listing, role) for role in work.roles or (work.choice,)]
    barriers = sass.barriers(sass.parse(kernel.listing))
    resident = blocks_per_sm(kernel.warps, kernel.registers, kernel.shared_memory, barriers)
    of_sm = -(-work.blocks // gpu.sms)
    # A block has a warp on each sub-partition for every four of its warps. Smaller blocks are spread over them.
    parts = constants.SUB_PARTITIONS
    if kernel.warps >= parts:
        warps, slots, blocks = kernel.warps // parts, resident, of_sm
    else:
        warps, slots = 1, -(-resident * kernel.warps // parts)
        blocks = -(-of_sm * kernel.warps // parts)
    if not work.roles:
        paths *= warps
    # If SMs get different numbers of blocks, the one with most is simulated, but memory serves the mean.
    mean = work.blocks * kernel.warps / (gpu.sms * parts * warps * blocks)
    memory = _memory(paths, kernel.warps, work, gpu, mean)
    simulated = blocks if blocks <= _ROUNDS * slots else (_ROUNDS - 1) * slots + blocks % slots
    result = SubPartition(paths, min(slots, blocks), memory).run(simulated)
    interval = steady_interval(result, min(slots, blocks))
    # Loads by TMA are not on the path of a warp, so their bandwidth bounds the time from outside.
    exposed = work.waits * (constants.DRAM_LATENCY + work.awaited / constants.L2_BYTES)
    shortest, from_l2 = limit(work, gpu), work.loads / (constants.L2_BYTES * gpu.sms * gpu.clock)
    seconds = max((result.cycles + exposed + (blocks - simulated) * interval) / gpu.clock, shortest, from_l2)
    utilisation = {
        name: share * result.cycles / (result.cycles + exposed) for name, share in result.utilisation().items()
    }
    utilisation["dram"] = max(utilisation["dram"], (work.reads + work.writes) / gpu.copy_bandwidth / seconds)
    utilisation["l2"] = max(utilisation["l2"], from_l2 / seconds)
    share = 1.0 if kernel.warps >= parts else kernel.warps / parts
    return Prediction(seconds, interval * share + exposed, resident, shortest, utilisation)


def _memory(paths: Sequence[Sequence[Step]], warps: int, work: Work, gpu: Gpu, mean: float) -> Memory:
    """Return the memory, with the share of DRAM and L2 in what the paths load, and of the work in what they store.

    Raises:
        ValueError: The paths have fewer matmuls than the work.
    """
    matmuls = [step.amount for path in paths for step in path if step.kind == Kind.WGMMA]
    executed = work.blocks * sum(matmuls)  # a wgmma is one of four warps, one on each sub-partition
    if matmuls and executed < 0.99 * work.flop:
        raise ValueError(f"the path has {executed:.3g} FLOP of the {work.flop:.3g} of the case: it took a wrong branch")

    def share(size: float, *kinds: Kind) -> float:
        """Return which share `size` is of the bytes that these instructions would move in all lanes."""
        of_warps = sum(step.amount for path in paths for step in path if step.kind in kinds)
        requested = work.blocks * min(warps, constants.SUB_PARTITIONS) * of_warps
        return min(size / requested, 1.0) if requested else 0.0

    dram, l2 = (share(size, Kind.LOAD, Kind.COPY) for size in (work.reads, work.loads))
    return Memory(gpu, dram, max(l2, dram), share(work.writes, Kind.STORE), mean)


def limit(work: Work, gpu: Gpu) -> float:
    """Return the seconds that the tensor cores' peak or the copy bandwidth would allow, the longer of both."""
    peak = constants.WGMMA_ROWS_FLOP * gpu.sms * gpu.clock
    return max(work.flop / peak, (work.reads + work.writes) / gpu.copy_bandwidth)


def steps(listing: str, choice: Choice) -> list[Step]:
    """Return the steps of a warp on the path of a case."""
    parsed = control_words.parse(listing)
    every = [pipes.step(instruction, control) for instruction, control in parsed]
    return [every[index] for index in ControlFlow([instruction for instruction, _ in parsed]).path(choice)]


def steady_interval(result: Result, slots: int) -> float:
    """Return the mean cycles from the end of a block to that of the next, without the first ones.

    Blocks that started together end together, so ends are compared that are one round of all slots apart.
    """
    ends = result.ends
    if len(ends) < 2 * slots:
        return result.cycles / len(ends)
    rounds = [(later - end) / slots for end, later in zip(ends[slots - 1 :], ends[2 * slots - 1 :], strict=False)]
    # In the first rounds a queue may still fill, but in the long run no resource is busy for longer than that takes.
    busiest = max(result.utilisation().values()) * result.cycles / len(ends)
    return max(sum(rounds) / len(rounds), busiest)
