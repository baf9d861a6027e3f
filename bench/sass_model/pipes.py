"""What an instruction occupies: units of a sub-partition, bytes of memory, and the tensor core.

Each warp instruction becomes a `Step`, in which the simulator finds all that it needs.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import NamedTuple

from bench.sass_model import constants
from bench.sass_model.control_words import Control
from bench.sass_model.sass import Instruction

WARP = 32  # lanes


class Unit(IntEnum):
    """Units of a sub-partition that a warp instruction occupies for some cycles."""

    FMA_HEAVY = 0  # fp32, and all integer multiplications
    FMA_LITE = 1  # fp32 only
    ALU = 2  # integer, logic, comparisons, 16-bit conversions
    MUFU = 3  # special functions, conversions
    LSU = 4  # loads, stores, shuffles
    UNIFORM = 5
    MMA = 6  # mma.sync; wgmma has a queue of its own
    FP64 = 7


class Kind(IntEnum):
    """How the simulator treats a step."""

    PLAIN = 0
    LOAD = 1  # from global memory to registers
    COPY = 2  # from global to shared memory (LDGSTS)
    COMMIT = 3  # makes a scoreboard count the copies so far (LDGDEPBAR)
    WAIT_BOARD = 4  # waits until a scoreboard counts at most `amount` (DEPBAR)
    STORE = 5  # to global memory
    WGMMA = 6
    WAIT_WGMMA = 7  # waits until at most `amount` groups are pending
    BARRIER = 8
    FENCE = 9  # the warp pauses for `amount` cycles


class Step(NamedTuple):
    """One warp instruction of a path.

    Attributes:
        kind: How the simulator treats it.
        units: It occupies one of these; none if it is empty.
        cycles: How long it occupies the unit, or the tensor core for a wgmma.
        stall: Cycles until the warp's next instruction.
        result: Scoreboard held until the result is there, -1 for none.
        sources: Scoreboard held until the sources were read, -1 for none.
        waits: Scoreboards that must be free.
        latency: Cycles until the result is there, for an instruction of variable latency.
        amount: Bytes, groups or cycles, see `Kind`; the FLOP of a wgmma.
        ends_group: Whether it is the last wgmma of its group.
        barrier: Number of the named barrier, as text.
        threads: Threads that a named barrier waits for, 0 for all of the block.
    """

    kind: Kind
    units: tuple[int, ...]
    cycles: float
    stall: int
    result: int
    sources: int
    waits: tuple[int, ...]
    latency: float
    amount: float = 0.0
    ends_group: bool = False
    barrier: str = ""
    threads: int = 0


# Opcodes by what they occupy. One that is missing is an error, so that nothing is counted as free by accident.
_OPCODES = {
    "fma": "FFMA FFMA32I FADD FADD32I FMUL FMUL32I FSWZADD HFMA2 HADD2 HMUL2",
    "multiply": "IMAD IMUL IMAD32I IDP IDP4A",
    "alu": (
        "IADD3 IADD IADD32I LOP3 LOP32I SHF SHL SHR LEA ISETP FSETP FSET FMNMX IMNMX VIMNMX VIMNMX3 VIADD VIADDMNMX "
        "SEL FSEL PRMT MOV MOV32I PLOP3 F2FP I2FP I2IP HSETP2 HSET2 HMNMX2 VHMNMX P2R R2P CS2R BMSK SGXT FCHK IABS "
        "VOTE LEPC"
    ),
    "special": "MUFU I2F F2I F2F I2I FRND POPC FLO BREV",
    "double": "DADD DMUL DFMA DSETP DMNMX",
    "access": "LDS STS LDSM STSM ATOMS LDL STL LDG STG LD ST LDGSTS ATOM ATOMG RED",
    "lsu": "SHFL S2R LDC MATCH REDUX MOVM CCTL UTMALDG UTMASTG UTMAPF UTMACMDFLUSH UBLKCP UBLKPF UTMACCTL UTMAREDG",
    "control": (
        "BRA BRX JMX JMP EXIT RET CALL BSSY BSYNC BREAK BMOV BAR WARPGROUP WARPSYNC NOP DEPBAR LDGDEPBAR MEMBAR FENCE "
        "SYNCS ERRBAR YIELD NANOSLEEP BPT ELECT ACQBULK PREEXIT USETMAXREG HGMMA "
        "ENDCOLLECTIVE"
    ),
    "uniform": "R2UR S2UR VOTEU",  # and all other opcodes that begin with U
}
_CLASS = {name: kind for kind, names in _OPCODES.items() for name in names.split()}
_MMA_SHAPE = re.compile(r"\.(\d+?)(8)(4|8|16|32)\b")  # HMMA.16816: m16n8k16
_WGMMA_SHAPE = re.compile(r"\.64x(\d+)x(\d+)")
_BITS = re.compile(r"\.(128|64|U16|S16|U8|S8)\b")
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_MATRIX = 128  # bytes of one 8 x 8 matrix of 16-bit elements


def step(instruction: Instruction, control: Control) -> Step:
    """Return what the instruction occupies.

    Raises:
        ValueError: The opcode is unknown.
    """
    name = instruction.opcode.split(".")[0]
    units, cycles = _unit(name, instruction)
    kind, amount, barrier, threads = _role(name, instruction)
    if kind == Kind.WGMMA:
        cycles = wgmma_cycles(instruction)
    return Step(
        kind,
        units,
        cycles,
        control.stall,
        -1 if control.result is None else control.result,
        -1 if control.sources is None else control.sources,
        control.waits,
        constants.LATENCY.get(name, constants.OTHER_LATENCY),
        amount,
        instruction.ends_group,
        barrier,
        threads,
    )


def access_bytes(instruction: Instruction) -> int:
    """Return the bytes that a warp's load or store of global or shared memory moves, if every lane takes part."""
    name = instruction.opcode.split(".")[0]
    if name in ("LDSM", "STSM"):
        matrices = re.search(r"\.(4|2|1)\b", instruction.opcode)
        return _MATRIX * int(matrices[1] if matrices else 1)
    found = _BITS.search(instruction.opcode)
    return WARP * (_BYTES[found[1]] if found else 4)


def wgmma_cycles(instruction: Instruction) -> float:
    """Return how long a wgmma occupies the tensor cores: by its FLOP, or by its operands in shared memory."""
    columns, _ = _wgmma_shape(instruction)
    # Its depth is always 32 bytes: 16 elements of 16 bits, 8 of 32 or 32 of 8, and the FLOP per cycle double with them.
    as_16_bit = 2 * 64 * columns * 16 / constants.WGMMA_ROWS_FLOP
    left_is_shared = re.match(r"\s*R\d+\s*,\s*gdesc", instruction.operands) is not None
    shared = (64 * left_is_shared + columns) * 32 / constants.WGMMA_SHARED_BYTES
    return max(as_16_bit, shared)


def wgmma_flop(instruction: Instruction) -> float:
    """Return the floating-point operations of a wgmma, of all four warps."""
    columns, depth = _wgmma_shape(instruction)
    return 2.0 * 64 * columns * depth


def _wgmma_shape(instruction: Instruction) -> tuple[int, int]:
    found = _WGMMA_SHAPE.search(instruction.opcode)
    if found is None:
        raise ValueError(f"a wgmma without a shape: {instruction.opcode}")
    return int(found[1]), int(found[2])


def _unit(name: str, instruction: Instruction) -> tuple[tuple[int, ...], float]:
    """Return the units of which it occupies one, and for how many cycles."""
    kind = _CLASS.get(name, "mma" if name.endswith("MMA") else "uniform" if name.startswith("U") else None)
    wide = ".WIDE" in instruction.opcode or ".HI" in instruction.opcode
    match kind:
        case "control":
            return (), 0.0
        case "fma":
            return (Unit.FMA_LITE, Unit.FMA_HEAVY), constants.HALF_UNIT
        case "multiply":
            return (Unit.FMA_HEAVY,), constants.WIDE_MULTIPLY if wide else constants.HALF_UNIT
        case "alu":
            return (Unit.ALU,), constants.HALF_UNIT
        case "special":
            return (Unit.MUFU,), constants.SPECIAL
        case "double":
            return (Unit.FP64,), constants.DOUBLE
        case "access":
            return (Unit.LSU,), max(access_bytes(instruction) / constants.SHARED_BYTES, constants.SHUFFLE)
        case "lsu":
            return (Unit.LSU,), constants.SHUFFLE
        case "mma":
            return (Unit.MMA,), _mma_flop(instruction) / constants.MMA_FLOP
        case "uniform":
            return (Unit.UNIFORM,), constants.UNIFORM
    raise ValueError(f"no unit is known for {instruction.opcode}: add {name} to bench/sass_model/pipes.py")


def _mma_flop(instruction: Instruction) -> float:
    found = _MMA_SHAPE.search(instruction.opcode)
    if found is None:
        raise ValueError(f"the shape of {instruction.opcode} is unknown: add it to bench/sass_model/pipes.py")
    rows, columns, depth = (int(number) for number in found.groups())
    # TF32 has half of the throughput of 16-bit operands.
    return 2 * rows * columns * depth * (2 if ".TF32" in instruction.opcode else 1)


def _role(name: str, instruction: Instruction) -> tuple[Kind, float, str, int]:
    """Return the kind of step, its amount, and for a barrier its number and its threads."""
    operands = instruction.operands
    if name in ("LDG", "LD"):
        return Kind.LOAD, access_bytes(instruction), "", 0
    if name == "LDGSTS":
        return Kind.COPY, access_bytes(instruction), "", 0
    if name in ("STG", "ST", "RED", "ATOM", "ATOMG"):
        return Kind.STORE, access_bytes(instruction), "", 0
    if name == "LDGDEPBAR":
        return Kind.COMMIT, 0, "", 0
    if name == "DEPBAR" and (found := re.search(r"SB(\d)(?:\s*,\s*0x([0-9a-f]+))?", operands)):
        return Kind.WAIT_BOARD, int(found[2] or "0", 16), found[1], 0
    if name == "HGMMA":
        return Kind.WGMMA, wgmma_flop(instruction), "", 0
    if instruction.pending_groups is not None:
        return Kind.WAIT_WGMMA, instruction.pending_groups, "", 0
    if name == "BAR" and ".ARV" not in instruction.opcode:
        words = [word.strip() for word in operands.split(",")]
        counted = re.fullmatch(r"0x([0-9a-f]+)", words[1]) if len(words) > 1 else None
        return Kind.BARRIER, 0, words[0], int(counted[1], 16) if counted else 0
    if name in constants.FENCE:
        return Kind.FENCE, constants.FENCE[name], "", 0
    return Kind.PLAIN, 0, "", 0
