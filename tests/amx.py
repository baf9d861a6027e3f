"""Run the library's AMX instructions on CPUs that have none: see emulation/amx.cpp."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from bertfast.ops import native

SOURCE = Path(__file__).parent / "emulation" / "amx.cpp"
COMPILER = shutil.which("g++")
IS_AVAILABLE = COMPILER is not None and platform.machine() in ("x86_64", "AMD64") and sys.platform == "linux"
_KINDS = ("configured", "released", "zeroed", "loaded", "stored", "multiplied")  # those of the enum in amx.cpp


def build(folder: Path, *sources: Path) -> Path:
    """Build the emulation, with other sources, as a shared library in a folder, and return its path."""
    library = folder / "amx.so"
    command = [str(COMPILER), "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", str(SOURCE)]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # sanitizers
    subprocess.run([*command, *map(str, sources), "-o", str(library)], check=True, env=environment)
    return library


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(build(Path(folder))))
    library.emulated_count.restype = ctypes.c_int64
    return library


@cache
def is_native() -> bool:
    """Return whether this CPU has AMX, also if the instruction set in use is a narrower one, without tiles by default.

    Not to be called first in `tiles()`, which allows them on every CPU.
    """
    in_use = native.instruction_set()
    native.use_instruction_set(native.instruction_sets()[-1])
    has_tiles: bool = torch.ops.bertfast.has_tiles()
    native.use_instruction_set(in_use)
    return has_tiles


def executed() -> Counter[str]:
    """Return how many instructions of each kind were emulated in this process: none where the CPU has AMX."""
    return Counter({kind: _library().emulated_count(index) for index, kind in enumerate(_KINDS)})


@contextmanager
def tiles() -> Iterator[None]:
    """Multiply int8 with the AMX instructions in this context, emulated where the CPU has none."""
    library = _library()
    library.start_emulation()
    torch.ops.bertfast.use_tiles(True)
    try:
        yield
    finally:
        torch.ops.bertfast.use_tiles(None)
        library.stop_emulation()
