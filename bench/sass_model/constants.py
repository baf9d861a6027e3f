"""Every constant of the model of an SM, with its source. Change VERSION with any on which a kernel's time depends.

A prediction holds for one version: if a constant changes, `python -m bench.sass_model.predict` computes all of them
again. Sources: [P] NVIDIA's CUDA C++ Programming Guide, tables of throughput and occupancy, compute capability 9.0;
[H] NVIDIA's H100 architecture white paper; [M] Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU
Architecture" (arXiv 2402.13499); [A] assumed, and so a candidate for calibration. Nothing was measured by this project.
"""

from __future__ import annotations

from dataclasses import dataclass

VERSION = "1"


@dataclass(frozen=True)
class Gpu:
    """A GPU of compute capability 9.0.

    Attributes:
        name: Its name.
        clock: SM cycles per second under load.
        copy_bandwidth: Bytes per second, read and written, of a large copy in device memory.
        sms: Number of SMs.
    """

    name: str
    clock: float
    copy_bandwidth: float
    sms: int = 132


# 1.83 GHz is the clock of the data sheet's 989 TFLOP/s [H]; whether it holds under load is assumed [A]. Copies reach
# about 90 % of the data sheet's 4.8 TB/s: 4.3 TB/s, as bench/LOG.md assumes, and so 3.0 of the H100's 3.35 [A].
H200 = Gpu("H200", 1.83e9, 4.3e12)
H100 = Gpu("H100 SXM5", 1.83e9, 3.0e12)

# Occupancy of an SM [P]; the number of barriers is that of cudaOccMaxBlocksPerSMBlockBarrierLimit in cuda_occupancy.h
# (CUDA 13.0): twice as many as blocks.
MAX_WARPS = 64
MAX_BLOCKS = 32
BARRIERS = 2 * MAX_BLOCKS
REGISTERS = 65_536
REGISTER_UNIT = 256  # registers of a warp are allocated in multiples of it
SHARED_MEMORY = 228 << 10
SHARED_MEMORY_OF_A_BLOCK = 1 << 10  # reserved for the system, per block
SHARED_MEMORY_UNIT = 128

SUB_PARTITIONS = 4  # of an SM; each issues one warp instruction per cycle

# Cycles for which a warp instruction occupies a unit of its sub-partition.
HALF_UNIT = 2.0  # 16 lanes: FMA (two such units), integer and logic [P]
WIDE_MULTIPLY = 4.0  # IMAD.WIDE and IMAD.HI: two results; no published rate [A]
SPECIAL = 8.0  # MUFU and conversions: 16 per SM and cycle [P]
UNIFORM = 2.0  # [A]
DOUBLE = 2.0  # 64 per SM and cycle [P]
SHUFFLE = 4.0  # 32 lanes per SM and cycle, a quarter of them for each sub-partition [P]
SHARED_BYTES = 32.0  # per cycle: 128 per SM [H], a quarter for each sub-partition
MMA_FLOP = 645.0  # mma.sync, per sub-partition and cycle: 63 % of the peak of 1,024 [M]

# wgmma: a tensor core of a sub-partition multiplies 16 of the 64 rows, 1,024 FLOP per cycle [H].
WGMMA_ROWS_FLOP = 4096.0  # of the SM per cycle
WGMMA_SHARED_BYTES = 128.0  # that it reads per cycle, of operands in shared memory [H]
WGMMA_START = 10.0  # cycles from its issue until it starts [A]
WGMMA_DRAIN = 40.0  # from its end until a wait for its group returns [A]

# Cycles until the result of an instruction of variable latency can be read. [M] has 29 for shared memory.
LATENCY = {
    "MUFU": 24.0,  # [A], also below where no source is named
    "LDS": 29.0,  # [M]
    "LDSM": 33.0,
    "SHFL": 24.0,
    "S2R": 25.0,
    "S2UR": 30.0,
    "R2UR": 14.0,
    "SYNCS": 30.0,
    "LDC": 30.0,
    "LDCU": 30.0,
    "ULDC": 12.0,
    "STS": 20.0,
    "STSM": 30.0,
    "STG": 20.0,
    "HMMA": 33.0,  # [M]
}
OTHER_LATENCY = 20.0  # [A]
READ_RELEASE = 12.0  # until a source register may be overwritten [A]
BARRIER = 20.0  # from the last arrival at a barrier until its warps go on [A]
FENCE = {"MEMBAR": 30.0, "FENCE": 10.0}  # [A]
BLOCK_START = 200.0  # from the end of a block until the next one in its slot issues [A]

# Device memory.
L1_LATENCY = 33.0  # [A], about that of shared memory
L2_LATENCY = 262.0  # [M]
DRAM_LATENCY = 479.0  # [M], without queueing
L2_BYTES = 27.0  # per SM and cycle: 5.5 TB/s, as others measured on an H100 with 114 SMs [A]

# Library operators and launches, see `library_time.py`. They change sums of kernels only, which VERSION does not cover.
GEMM_FLOPS = 790e12  # bf16 GEMMs of an H200 with full waves, as bench/LOG.md assumes [A]
GEMM_TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.85))  # rows, columns, share of GEMM_FLOPS [A]
GEMM_SPLITS = 8  # at most as many blocks share a tile's sum over K, whose parts are added in fp32 [A]
GRAPH_GAP = 1e-6  # seconds from the end of a kernel of a CUDA graph to the start of the next one [A]
HOST_LAUNCH = 4e-6  # seconds of the host per launch without a graph, as bench/LOG.md assumes [A]
SHORTEST = 2e-6  # seconds of a library kernel that does next to nothing [A]
SORT_IN_A_BLOCK = 4096  # keys that PyTorch sorts in one kernel
# More keys: the positions, a histogram, its prefix sums, and a pass per byte of a key (CUB's radix sort).
SORT_LAUNCHES_BESIDES_PASSES = 3
SORT_PASS = 5e-6  # seconds: a pass waits for sums of earlier blocks, and 2^16 keys are few for it [A]
MULTI_TENSOR_CHUNK, MULTI_TENSOR_BLOCKS = (
    65_536,
    320,
)  # elements of a block and blocks of a launch of `_foreach` [PyTorch]
