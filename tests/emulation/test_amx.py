"""The emulation of AMX refuses instructions that a CPU refuses, and some more."""

import signal
import subprocess
import sys
from pathlib import Path

import amx
import pytest

pytestmark = pytest.mark.skipif(not amx.IS_AVAILABLE, reason="AMX is emulated on Linux on x86-64, with g++")

MISTAKES = {
    "nothing_is_configured": "the tile registers are not configured",
    "released": "the tile registers are not configured",
    "register_without_rows": "the tile register is not configured",
    "another_palette": "the palette is not 1",
    "reserved_bytes": "reserved bytes of the configuration are set",
    "too_many_rows": "a tile has too many rows or bytes",
    "rows_of_no_bytes": "a tile has rows of no or odd bytes",
    "same_register": "two operands are the same tile register",
    "shapes_that_differ": "the shapes of the tiles do not match",
    "no_stride": "rows have no stride",
}
RUN = "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); library.start_emulation(); library[sys.argv[2]]()"


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return amx.build(tmp_path_factory.mktemp("amx"), Path(__file__).with_name("amx_mistakes.cpp"))


def run(library: Path, function: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", RUN, str(library), function], capture_output=True, text=True)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_the_process_with_a_message(mistake, library):
    ran = run(library, mistake)
    assert ran.returncode == -signal.SIGABRT
    assert ran.stderr.startswith(f"AMX: {MISTAKES[mistake]}")


@pytest.mark.parametrize("instruction", ["other_instruction", "tile_instruction_of_another_type"])
def test_other_instructions_are_not_emulated(instruction, library):
    assert run(library, instruction).returncode == -signal.SIGILL
