"""Listings of machine code that are written by hand, with control words."""

from collections.abc import Sequence

from bench.sass_model import control_words
from bench.sass_model.control_words import Control

Line = tuple[str, Control]  # an instruction and its control word

EXIT: Line = ("EXIT", Control(1))


def listing(lines: Sequence[Line]) -> str:
    """Return these instructions, 16 bytes apart, as cuobjdump prints them."""
    return "\n".join(
        f"        /*{16 * index:04x}*/      {text} ;  /* 0x0000000000000000 */\n"
        f"                                          /* 0x{control_words.encode(control):016x} */"
        for index, (text, control) in enumerate(lines)
    )
