"""How many blocks of a kernel are resident on an SM, by registers, shared memory, warps and barriers."""

from __future__ import annotations

from bench.sass_model import constants


def blocks_per_sm(warps: int, registers: int, shared_memory: int, barriers: int) -> int:
    """Return the number of blocks that an SM of compute capability 9.0 holds at once.

    Args:
        warps: Warps of a block.
        registers: Registers per thread.
        shared_memory: Bytes of shared memory of a block, static and dynamic.
        barriers: Barriers that a block reserves.

    Raises:
        ValueError: Not even one block fits.
    """
    of_warp = _round_up(registers * 32, constants.REGISTER_UNIT)
    # Registers are those of a sub-partition, which holds every fourth warp.
    warps_by_registers = constants.REGISTERS // constants.SUB_PARTITIONS // of_warp * constants.SUB_PARTITIONS
    memory = _round_up(shared_memory + constants.SHARED_MEMORY_OF_A_BLOCK, constants.SHARED_MEMORY_UNIT)
    limits = {
        "registers": warps_by_registers // warps,
        "shared memory": constants.SHARED_MEMORY // memory,
        "warps": constants.MAX_WARPS // warps,
        "blocks": constants.MAX_BLOCKS,
        "barriers": constants.BARRIERS // max(barriers, 1),
    }
    least = min(limits, key=lambda name: limits[name])
    if not limits[least]:
        raise ValueError(
            f"no block fits on an SM because of its {least}: {warps} warps of {registers} registers per thread and "
            f"{shared_memory} bytes of shared memory"
        )
    return limits[least]


def excess_barriers(barriers: int, architecture: str) -> list[str]:
    """Return a line if a kernel reserves so many barriers that an SM holds fewer of its blocks, otherwise nothing.

    Args:
        barriers: Barriers that a block reserves.
        architecture: GPU architecture, such as "sm_90a".
    """
    # By cuda_occupancy.h: 24 barriers and 24 blocks on compute capability 12.0, otherwise twice as many as blocks.
    share = 1 if architecture.startswith("sm_12") else constants.BARRIERS // constants.MAX_BLOCKS
    if barriers <= share:
        return []
    return [f"{barriers} barriers per block, more than the {share} of an SM full of blocks: name them by constants"]


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
