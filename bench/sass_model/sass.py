"""NVIDIA machine code as `cuobjdump -sass` prints it: its instructions, and the hazards of asynchronous matmuls.

On Hopper a warpgroup's matmul (wgmma, HGMMA in SASS) goes on while the warps run further. Until a wait for its group no
instruction may touch its accumulator or overwrite registers that it reads. Compilers have to see to that, and versions
of Triton have failed to (triton-lang/triton issues 9433, 11366 and 11781): a kernel then sometimes returns garbage.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z]\S*)(.*?);")
_REGISTER = re.compile(r"(?<![A-Z0-9])R(\d+)")
# Instructions without a general register that they write: their first one is a source.
_WITHOUT_DESTINATION = re.compile(
    r"(BAR|BRA|BSSY|BSYNC|CCTL|DEPBAR|ELECT|ERRBAR|EXIT|FENCE|FSETP|ISETP|LDGDEPBAR|LDGSTS|MEMBAR|NOP|PLOP3|R2P|R2UR"
    r"|REDUX|S2UR|ST|STG|STL|STS|STSM|SYNCS|VOTEU|WARPGROUP|WARPSYNC|U\w+)\b"
)
_MOST_PENDING = 8  # groups that a wait can leave; a loop without any wait ends more and more


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
    def ends_group(self) -> bool:
        """Whether a wgmma is the last one of its group."""
        return self.is_wgmma and "gsb0" in self.operands

    @property
    def pending_groups(self) -> int | None:
        """The most groups of wgmma that may go on after this wait; None if it is no such wait."""
        if not self.opcode.startswith("WARPGROUP.DEPBAR"):
            return None
        return int(re.search(r"gsb0, 0x([0-9a-f]+)", self.operands)[1], 16)

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.opcode.startswith("BRA") else None
        return int(found[1], 16) if found else None

    @property
    def always_leaves(self) -> bool:
        """Whether the next instruction is never next: an exit or a branch without condition."""
        condition = self.predicate or re.search(r"\bU?P\d", self.operands.split("0x")[0])
        return self.opcode.startswith(("EXIT", "BRA")) and not condition

    @cached_property
    def written(self) -> frozenset[int]:
        """Registers that it writes."""
        if _WITHOUT_DESTINATION.match(self.opcode):
            return frozenset()
        found = re.match(r"\s*(?:P\w+\s*,\s*)?R(\d+)", self.operands)
        return frozenset(range(int(found[1]), int(found[1]) + self._width)) if found else frozenset()

    @cached_property
    def read(self) -> frozenset[int]:
        """Registers that it reads: each operand's first one, and all that a store writes to memory."""
        sources = self.operands.split(",", 1)[-1] if self.written else self.operands
        registers = [int(register) for register in _REGISTER.findall(sources)]
        wide = range(registers[-1], registers[-1] + self._width) if registers and self.opcode.startswith("ST") else ()
        return frozenset([*registers, *wide])

    @cached_property
    def multiplied(self) -> frozenset[int]:
        """Registers of a wgmma's left operand; none if that lies in shared memory."""
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
    """The instructions of a listing of one kernel."""
    found = (_LINE.match(line) for line in listing.splitlines())
    return [Instruction(int(m[1], 16), m[2], m[3], m[4]) for m in found if m]


def count(instructions: list[Instruction]) -> Counter[str]:
    """How many there are of each opcode, modifiers left out."""
    return Counter(instruction.opcode.split(".")[0] for instruction in instructions)


def wgmma_hazards(instructions: list[Instruction]) -> list[str]:
    """Every instruction that, on some path, touches registers of a wgmma that nothing has waited for."""
    index = {instruction.address: place for place, instruction in enumerate(instructions)}
    found = set()
    for place, instruction in enumerate(instructions):
        if instruction.is_wgmma:
            found |= _hazards_after(place, instructions, index)
    return [f"{text} at {address:#x}" for address, text in sorted(found)]


def _hazards_after(start: int, instructions: list[Instruction], index: dict[int, int]) -> set[tuple[int, str]]:
    # A state is an instruction and how many groups have ended since the wgmma's own: None before that ended.
    wgmma = instructions[start]
    found, seen = set(), set()
    paths = [(start + 1, 0 if wgmma.ends_group else None)]
    while paths:
        place, ended = paths.pop()
        while place < len(instructions) and (place, ended) not in seen:
            seen.add((place, ended))
            instruction = instructions[place]
            if ended is not None and instruction.pending_groups is not None and instruction.pending_groups <= ended:
                break
            fault = _fault(instruction, wgmma)
            if fault:
                found.add((instruction.address, f"{instruction.opcode} {fault} of the wgmma at {wgmma.address:#x}"))
            if instruction.ends_group:
                ended = 0 if ended is None else min(ended + 1, _MOST_PENDING)
            if instruction.target in index:
                paths.append((index[instruction.target], ended))
            if instruction.always_leaves:
                break
            place += 1
    return found


def _fault(instruction: Instruction, wgmma: Instruction) -> str | None:
    if instruction.written & wgmma.multiplied:
        return "overwrites the left operand"
    if instruction.is_wgmma:  # the next one may add to the same accumulator
        return "multiplies the accumulator" if instruction.multiplied & wgmma.written else None
    if instruction.written & wgmma.written:
        return "overwrites the accumulator"
    return "reads the accumulator" if instruction.read & wgmma.written else None
