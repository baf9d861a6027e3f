"""Parse NVIDIA machine code, as printed by `cuobjdump -sass`, and find hazards of asynchronous matmuls.

On Hopper a matmul of a warpgroup (wgmma, HGMMA in SASS) runs asynchronously. Until a wait for its group, no instruction
may touch its accumulator or overwrite registers that it reads. Compilers must ensure that, and versions of Triton have
failed to (triton-lang/triton issues 9433, 11366 and 11781): a kernel then sometimes returns garbage.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z]\S*)(.*?);")
_REGISTER = re.compile(r"(?<![A-Z0-9])R(\d+)")
# Instructions that write no general register: their first operand is a source.
_WITHOUT_DESTINATION = re.compile(
    r"(BAR|BRA|BSSY|BSYNC|CCTL|DEPBAR|ELECT|ERRBAR|EXIT|FENCE|FSETP|ISETP|LDGDEPBAR|LDGSTS|MEMBAR|NOP|PLOP3|R2P|R2UR"
    r"|REDUX|S2UR|ST|STG|STL|STS|STSM|SYNCS|VOTEU|WARPGROUP|WARPSYNC|U\w+)\b"
)
ALL_BARRIERS = 16  # of a block, numbered from 0
_MAX_PENDING = 8  # groups that a wait can leave pending; bounds the states of a loop without a wait


@dataclass(frozen=True)
class Instruction:
    """One line of a listing."""

    address: int
    predicate: str | None
    opcode: str
    operands: str

    @property
    def is_wgmma(self) -> bool:
        return self.opcode.startswith("HGMMA")

    @property
    def is_barrier(self) -> bool:
        """Whether it synchronises, or arrives at, a barrier of the block."""
        return self.opcode.startswith("BAR.")

    @property
    def ends_group(self) -> bool:
        """Whether it is the last wgmma of its group."""
        return self.is_wgmma and "gsb0" in self.operands

    @property
    def pending_groups(self) -> int | None:
        """The number of groups of wgmma that may be pending after this wait; None if it is not such a wait."""
        if not self.opcode.startswith("WARPGROUP.DEPBAR"):
            return None
        found = re.search(r"gsb0, 0x([0-9a-f]+)", self.operands)
        if found is None:
            raise ValueError(f"a wait without a number of groups: {self.opcode} {self.operands}")
        return int(found[1], 16)

    @property
    def target(self) -> int | None:
        """The address to which a branch jumps; None if it is not a branch."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.opcode.startswith("BRA") else None
        return int(found[1], 16) if found else None

    @property
    def always_leaves(self) -> bool:
        """Whether it is an exit or a branch without condition, so that the next instruction never follows.

        BRA.DIV branches if the warp has diverged.
        """
        condition = self.predicate or re.search(r"\bU?P\d", self.operands.split("0x")[0])
        return self.opcode.startswith(("EXIT", "BRA")) and ".DIV" not in self.opcode and not condition

    @cached_property
    def written(self) -> frozenset[int]:
        """Registers that it writes."""
        if _WITHOUT_DESTINATION.match(self.opcode):
            return frozenset()
        found = re.match(r"\s*(?:P\w+\s*,\s*)?R(\d+)", self.operands)
        return frozenset(range(int(found[1]), int(found[1]) + self._width)) if found else frozenset()

    @cached_property
    def read(self) -> frozenset[int]:
        """Registers that it reads: the first of each operand, and all that a store writes to memory."""
        sources = self.operands.split(",", 1)[-1] if self.written else self.operands
        registers = [int(register) for register in _REGISTER.findall(sources)]
        wide = range(registers[-1], registers[-1] + self._width) if registers and self.opcode.startswith("ST") else ()
        return frozenset([*registers, *wide])

    @cached_property
    def multiplied(self) -> frozenset[int]:
        """Registers of the left operand of a wgmma; empty if it is in shared memory."""
        found = re.match(r"\s*R(\d+)", self.operands.split(",")[1])
        return frozenset(range(int(found[1]), int(found[1]) + 4)) if found else frozenset()

    @property
    def _width(self) -> int:
        shape = re.search(r"\.64x(\d+)x\d+", self.opcode)
        if self.is_wgmma and shape:
            return int(shape[1]) // 2  # fp32 [64, N] over 128 threads
        if ".128" in self.opcode:
            return 4
        if ".64" in self.opcode or self.opcode.startswith("IMAD.WIDE"):
            return 2
        return 2 if self.opcode.startswith("CS2R") and ".32" not in self.opcode else 1


def parse(listing: str) -> list[Instruction]:
    """Return the instructions of the listing of one kernel."""
    found = (_LINE.match(line) for line in listing.splitlines())
    return [Instruction(int(m[1], 16), m[2], m[3], m[4]) for m in found if m]


def count(instructions: list[Instruction]) -> Counter[str]:
    """Return the number of instructions of each opcode, without modifiers."""
    return Counter(instruction.opcode.split(".")[0] for instruction in instructions)


def barriers(instructions: list[Instruction]) -> int:
    """Return how many barriers a block reserves on its SM: up to the last one that an instruction names.

    If a register says which barrier it is, the assembler reserves all of them.
    """
    names = [instruction.operands.split(",")[0].strip() for instruction in instructions if instruction.is_barrier]
    return max((int(name, 16) + 1 if name.startswith("0x") else ALL_BARRIERS for name in names), default=0)


def wgmma_hazards(instructions: list[Instruction]) -> list[str]:
    """Return a line for each instruction that, on any path, touches registers of a pending wgmma."""
    index_of = {instruction.address: index for index, instruction in enumerate(instructions)}
    found = set()
    for index, instruction in enumerate(instructions):
        if instruction.is_wgmma:
            found |= _hazards_after(index, instructions, index_of)
    return [f"{text} at {address:#x}" for address, text in sorted(found)]


def _hazards_after(start: int, instructions: list[Instruction], index_of: dict[int, int]) -> set[tuple[int, str]]:
    # A state is an instruction and the number of groups that were closed after that of the wgmma; None before its own
    # group is closed.
    wgmma = instructions[start]
    found, seen = set(), set()
    paths = [(start + 1, 0 if wgmma.ends_group else None)]
    while paths:
        index, ended = paths.pop()
        while index < len(instructions) and (index, ended) not in seen:
            seen.add((index, ended))
            instruction = instructions[index]
            if ended is not None and instruction.pending_groups is not None and instruction.pending_groups <= ended:
                break
            fault = _fault(instruction, wgmma)
            if fault:
                found.add((instruction.address, f"{instruction.opcode} {fault} of the wgmma at {wgmma.address:#x}"))
            if instruction.ends_group:
                ended = 0 if ended is None else min(ended + 1, _MAX_PENDING)
            if instruction.target in index_of:
                paths.append((index_of[instruction.target], ended))
            if instruction.always_leaves:
                break
            index += 1
    return found


def _fault(instruction: Instruction, wgmma: Instruction) -> str | None:
    if instruction.written & wgmma.multiplied:
        return "overwrites the left operand"
    if instruction.is_wgmma:  # which may add to the same accumulator
        return "multiplies the accumulator" if instruction.multiplied & wgmma.written else None
    if instruction.written & wgmma.written:
        return "overwrites the accumulator"
    return "reads the accumulator" if instruction.read & wgmma.written else None
