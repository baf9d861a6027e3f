"""`bench.sass_model.sass` finds every instruction, and no other, that touches registers of a pending wgmma."""

import pytest

from bench.sass_model import sass

WGMMA = "HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0"  # accumulator R24 to R31, left operand R4 to R7
OPEN = WGMMA.removesuffix(", gsb0")  # its group goes on
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
WAIT_FOR_OLDER = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
OTHER = "HGMMA.64x16x16.F32.BF16 R40, gdesc[UR8], R40, gsb0"


def hazards(*lines: str) -> list[str]:
    """Return the hazards of a listing of these instructions, 16 bytes apart."""
    listing = "\n".join(f"        /*{16 * index:04x}*/      {line} ;  /* 0x0 */" for index, line in enumerate(lines))
    return sass.wgmma_hazards(sass.parse(listing))


@pytest.mark.parametrize(
    ("instruction", "fault"),
    [
        ("FADD R50, R31, R51", "reads the accumulator"),
        ("STG.E.64 desc[UR4][R2.64], R30", "reads the accumulator"),
        ("STG.E.128 desc[UR4][R2.64], R22", "reads the accumulator"),  # R22 to R25
        ("FMUL R24, R1, R2", "overwrites the accumulator"),
        ("LDS.128 R20, [R1]", None),  # R20 to R23
        ("LDS.128 R21, [R1]", "overwrites the accumulator"),
        ("MOV R7, R1", "overwrites the left operand"),
        ("@P0 MOV R7, R1", "overwrites the left operand"),
        ("MOV R8, R7", None),  # what it multiplies may be read
        ("IMAD.MOV.U32 R32, RZ, RZ, R33", None),
        (OTHER, None),
        (WGMMA, None),  # adds to the same accumulator
        ("HGMMA.64x16x16.F32.BF16 R40, R24, gdesc[UR8], R40, gsb0", "multiplies the accumulator"),
    ],
)
def test_hazards_of_an_instruction_before_the_wait(instruction, fault):
    assert hazards(WGMMA, WAIT, instruction, "EXIT") == []
    found = hazards(WGMMA, instruction, WAIT, "EXIT")
    assert [fault in text for text in found] == ([True] if fault else [])


def test_a_wait_covers_only_older_groups():
    read = "FADD R50, R24, R51"
    assert hazards(WGMMA, OTHER, WAIT_FOR_OLDER, read, WAIT, "EXIT") == []
    assert len(hazards(WGMMA, WAIT_FOR_OLDER, read, WAIT, "EXIT")) == 1
    assert len(hazards(OPEN, OTHER, WAIT_FOR_OLDER, read, WAIT, "EXIT")) == 1  # one group, the newest


def test_hazards_are_found_on_all_paths():
    """A branch skips the wait at 0x20, and the next iteration of a loop starts without a wait."""
    read = "FADD R50, R24, R51"
    assert len(hazards(WGMMA, "@P0 BRA 0x30", WAIT, read, "EXIT")) == 1
    assert hazards(WGMMA, "BRA 0x30", read, WAIT, "EXIT") == []
    assert len(hazards(read, WGMMA, "@P0 BRA 0x0", WAIT, "EXIT")) == 1
    assert hazards(read, WGMMA, WAIT, "@P0 BRA 0x0", "EXIT") == []
    assert len(hazards(WGMMA, "BRA.DIV UR4, 0x40", read, WAIT, "EXIT")) == 1  # a warp that has not diverged goes on


def test_instructions_are_counted_without_modifiers():
    listing = "/*0000*/ @!P1 LDL.LU R1, [R2] ;\n/*0010*/ LDL R3, [R2] ;\n/*0020*/ EXIT ;"
    assert sass.count(sass.parse(listing)) == {"LDL": 2, "EXIT": 1}
