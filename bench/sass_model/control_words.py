"""The control word of each instruction: ptxas's stall count, and the scoreboards that it sets and waits for.

NVIDIA does not document it. The fields are those that assemblers for Volta and later found (the upper 64 bits of an
instruction's 128): 4 bits of stall count from bit 41, a yield flag, 3 bits each of the scoreboards that protect its
result and its sources (7: none), and a mask of 6 scoreboards to wait for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bench.sass_model import sass

SCOREBOARDS = 6
_NONE = 7
_UPPER_WORD = re.compile(
    r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$", re.MULTILINE
)  # a line of its own, after the instruction's


@dataclass(frozen=True)
class Control:
    """A control word.

    Attributes:
        stall: Cycles until the warp can issue its next instruction, at least 1.
        result: The scoreboard that is held until the result is written; None if its latency is fixed.
        sources: The scoreboard that is held until the sources were read, or None.
        waits: The scoreboards that must be free before it issues.
    """

    stall: int
    result: int | None = None
    sources: int | None = None
    waits: tuple[int, ...] = ()


def decode(upper: int) -> Control:
    """Return the control word in the upper 64 bits of an instruction."""
    result, sources, waits = upper >> 46 & 7, upper >> 49 & 7, upper >> 52 & 63
    return Control(
        max(upper >> 41 & 15, 1),
        None if result == _NONE else result,
        None if sources == _NONE else sources,
        tuple(board for board in range(SCOREBOARDS) if waits >> board & 1),
    )


def encode(control: Control) -> int:
    """Return upper 64 bits that have this control word and nothing else: for listings that are written by hand."""
    result = _NONE if control.result is None else control.result
    sources = _NONE if control.sources is None else control.sources
    waits = sum(1 << board for board in control.waits)
    return control.stall << 41 | result << 46 | sources << 49 | waits << 52


def parse(listing: str) -> list[tuple[sass.Instruction, Control]]:
    """Return the instructions of the listing of one kernel with their control words.

    Raises:
        ValueError: An instruction is printed without its second word, so that the control words are unknown.
    """
    instructions = sass.parse(listing)
    words = [int(word, 16) for word in _UPPER_WORD.findall(listing)]
    if len(words) != len(instructions):
        raise ValueError(
            f"the listing has {len(instructions)} instructions and {len(words)} second words of them: print it with "
            "`cuobjdump -sass`, which writes the encoding after each instruction"
        )
    return [(instruction, decode(word)) for instruction, word in zip(instructions, words, strict=True)]
