"""Machine code of kernels: read from what nvcc built, and kept in a file from which predictions are computed again.

The file has the code of all kernels whose times bench/results/sass_model.md predicts, without what the model does not
read. So a prediction of an earlier commit can be computed with the constants of a later one, see `history.py`.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.result_files import ROOT
from bench.sass_model import compiled_cuda, control_words

SOURCES = ROOT / "csrc" / "cuda"
_ARCHITECTURES = ("sm_90a", "sm_90", "")  # the last one in a file for a single architecture


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel.

    Attributes:
        kernel: Its name, with the template arguments of a CUDA C++ kernel.
        listing: Its listing with encodings.
        registers: Registers per thread.
        launch: Name of the launch that compiled it, of `cases.py`; "" for a CUDA C++ kernel.
        warps: Warps of a block; 0 for a CUDA C++ kernel, whose case says it, as `shared_memory` and `options`.
        shared_memory: Bytes of shared memory of a block.
        options: The block sizes and other integers with which Triton compiled it.
    """

    kernel: str
    listing: str
    registers: int
    launch: str = ""
    warps: int = 0
    shared_memory: int = 0
    options: dict[str, Any] = field(default_factory=dict)


def read_cuda(path: Path) -> list[Code]:
    """Return the kernels for compute capability 9.0 in a library, object file or cubin of nvcc, or in a kept file.

    Raises:
        ValueError: It has none.
    """
    if path.suffix == ".xz":
        return [code for code in unpack(path.read_bytes()) if not code.launch]
    registers = compiled_cuda.resources(compiled_cuda.cuobjdump("--dump-resource-usage", path))
    listings = compiled_cuda.listings(compiled_cuda.cuobjdump("--dump-sass", path))
    names = compiled_cuda.readable({symbol for _, symbol in listings})
    of_symbol = {symbol: used for (arch, symbol), (used, _) in registers.items() if arch in _ARCHITECTURES}
    found = [
        Code(names[symbol], "\n".join(listing), of_symbol[symbol])
        for (arch, symbol), listing in sorted(listings.items())
        if arch in _ARCHITECTURES and symbol in of_symbol
    ]
    if not found:
        raise ValueError(f"{path} has no kernel for sm_90: build it with `NVCC=/path/to/nvcc python setup.py build`")
    return found


def pack(codes: Sequence[Code], origin: dict[str, Any]) -> bytes:
    """Return the contents of a file that keeps these kernels."""
    kernels = [asdict(code) | {"listing": compact(code.listing)} for code in codes]
    text = json.dumps({"origin": origin, "kernels": kernels}, sort_keys=True, default=str)
    return lzma.compress(text.encode(), preset=9)


def unpack(data: bytes) -> list[Code]:
    """Return the kernels that a file keeps."""
    return [Code(**kernel) for kernel in json.loads(lzma.decompress(data))["kernels"]]


def sources_hash(folder: Path = SOURCES) -> str:
    """Return a hash of the CUDA C++ sources, without comments at the end of a line and without white space."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        found.update(path.name.encode())
        found.update(re.sub(r"//.*|\s+", "", path.read_text(encoding="utf-8")).encode())
    return found.hexdigest()[:16]


def kept_sources_hash(path: Path) -> str:
    """Return the hash of the sources of the kernels in a file: the kept one, or that of today for what nvcc built."""
    if path.suffix != ".xz":
        return sources_hash()
    return str(json.loads(lzma.decompress(path.read_bytes()))["origin"].get("sources", "")) if path.is_file() else ""


def compact(listing: str) -> str:
    """Return the listing with nothing but instructions and, of each encoding, the control word."""
    lines = []
    for instruction, control in control_words.parse(listing):
        predicate = f"{instruction.predicate} " if instruction.predicate else ""
        lines.append(f"/*{instruction.address:04x}*/ {predicate}{instruction.opcode}{instruction.operands};")
        lines.append(f"/* 0x{control_words.encode(control):016x} */")
    return "\n".join(lines)


def nvcc_version(path: Path) -> str:
    """Return the version of nvcc that made a file, from what is kept in it or from setup.py's record next to it."""
    if path.suffix == ".xz":
        return str(json.loads(lzma.decompress(path.read_bytes()))["origin"]["nvcc"]) if path.is_file() else "unknown"
    record = path.with_name("_C.cuda.json")
    return str(json.loads(record.read_text(encoding="utf-8"))["nvcc"]) if record.is_file() else "unknown"
