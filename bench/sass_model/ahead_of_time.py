"""Compile Triton kernels for a GPU that is not present, and report on the machine code.

Operators run on CPU tensors with a driver that compiles for the GPU and launches nothing, so the kernels are those that
would run, with the same specialisations of arguments. TRITON_PTXAS_PATH (for sm_100 and later
TRITON_PTXAS_BLACKWELL_PATH) names another ptxas than Triton's, for instance that of a newer CUDA toolkit.
"""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from bench.sass_model import sass
from bench.sass_model.occupancy import excess_barriers
from bertfast.kernels import device

SHARED_MEMORY_KIB = {80: 163, 90: 227, 100: 227, 120: 99}  # shared memory of a program in KiB, by architecture
# ptxas's warnings that it serialises wgmma, for any reason; C7519 is about the code around them.
_SERIALISED = re.compile(r"\((C751[0-5])\)")
_BLOCKS = ("BLOCK", "BLOCK_M", "BLOCK_N", "ROWS", "CHUNK", "COLUMNS", "DEPTH", "LANES", "WIDTH")
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration for one GPU architecture.

    Attributes:
        triton: Version of Triton.
        architecture: 90 for sm_90.
        kernel: Name of the kernel.
        case: Name of the configuration.
        shape: Block sizes.
        warps: Number of warps.
        registers: Registers per thread.
        spills: Instructions that spill registers.
        shared_memory: Bytes of shared memory.
        instructions: Number of instructions.
        tensor_core: The tensor core instruction, "" if there is none.
        tensor_core_instructions: Number of tensor core instructions.
        serialised: Codes of ptxas's warnings that it serialises wgmma.
        hazards: A line for each hazard of a pending wgmma.
        barriers: Barriers that a block reserves.
    """

    triton: str
    architecture: int
    kernel: str
    case: str
    shape: str
    warps: int
    registers: int
    spills: int
    shared_memory: int
    instructions: int
    tensor_core: str
    tensor_core_instructions: int
    serialised: list[str] = field(default_factory=list)
    hazards: list[str] = field(default_factory=list)
    barriers: int = 0

    def faults(self) -> list[str]:
        """Return a line for each fault of the kernel."""
        found = []
        if self.spills:
            found.append(f"{self.spills} instructions spill registers")
        if self.serialised:
            found.append(f"ptxas serialises its wgmma ({', '.join(self.serialised)})")
        found += self.hazards
        found += excess_barriers(self.barriers, f"sm_{self.architecture}")
        matmuls = self.kernel.startswith(("attention", "linear_gelu"))
        # wgmma multiplies 64 rows at a time; smaller blocks use the older instruction.
        wide = self.architecture == 90 and self.case.startswith("bf16") and int(self.shape.split(" ")[0]) >= 64
        if matmuls and (not self.tensor_core or (wide and self.tensor_core != "HGMMA")):
            found.append(f"its matmuls run on {self.tensor_core or 'no tensor core'}")
        limit = SHARED_MEMORY_KIB[self.architecture]
        if self.shared_memory > limit << 10:
            found.append(f"{self.shared_memory} bytes of shared memory are more than the GPU's {limit} KiB")
        return found


class _Absent:
    """A driver for a GPU that is not present, with only what the compiler needs."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture  # separates the compilation caches of architectures

    def get_current_stream(self, _device: object) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


@contextmanager
def compile_only(architecture: int, compiled: Callable[[Any, str, dict[str, Any]], None]) -> Iterator[None]:
    """Make every launch compile for `architecture` and do nothing else.

    Args:
        architecture: Compute capability, 90 for sm_90.
        compiled: Called with each kernel that differs from those before, ptxas's output and the launch's options.
    """
    driver.set_active(_Absent(architecture))
    run = JITFunction.run
    seen: set[str] = set()

    def run_without_launch(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        with redirect_stdout(io.StringIO()) as log:
            kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            compiled(kernel, log.getvalue(), options)
        return kernel

    # Kernels from the cache on disk have no output of ptxas.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "capability", lambda _device: divmod(architecture, 10))
        patch.setattr(JITFunction, "run", run_without_launch)
        patch.setattr(triton.knobs.compilation, "always_compile", True)
        patch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
        yield


def compile_cases(architecture: int, cases: Iterable[tuple[str, Callable[[], None]]]) -> list[Compiled]:
    """Return a report on each kernel that the cases (name, launch) launch."""
    results, case = [], ""

    def report(kernel: Any, log: str, options: dict[str, Any]) -> None:
        results.append(_report(kernel, log, options, architecture, case))

    with compile_only(architecture, report):
        for case, launch in cases:  # noqa: B007, the report reads it
            launch()
    return results


class _EachNth:
    """A pytest plugin that selects every `parts`-th test, from `part` on."""

    def __init__(self, part: int, parts: int):
        self.part, self.parts = part, parts

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self.part :: self.parts]


def compile_launches_of_tests(architecture: int, part: int, parts: int) -> list[Compiled]:
    """Return a report on each kernel that the tests of the kernels launch, for one of `parts` parts of the tests.

    The tests fail because nothing is computed; what they launch before that is compiled.
    """
    from bertfast.ops import dispatch

    dispatch._INTERPRETED = True  # Triton kernels are launched with CPU tensors
    results = []

    def report(kernel: Any, log: str, options: dict[str, Any]) -> None:
        results.append(_report(kernel, log, options, architecture, "a test's launch"))

    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(_ROOT)]
    ignored = ["--ignore", str(_ROOT / "tests/kernels/test_guard_pages.py")]  # starts processes
    with (
        pytest.MonkeyPatch.context() as patch,
        compile_only(architecture, report),
        redirect_stdout(io.StringIO()),
    ):
        patch.setenv("BERTFAST_TESTED", "triton")
        status = pytest.main([*options, *ignored, str(_ROOT / "tests/kernels")], [_EachNth(part, parts)])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"the tests of the kernels did not run: pytest returned {status!r}")
    return results


def serialised_wgmma(log: str) -> list[str]:
    """Return the codes of the warnings in ptxas's output that it serialises wgmma."""
    return sorted(set(_SERIALISED.findall(log)))


def disassemble(cubin: bytes) -> tuple[int, str]:
    """Return the registers per thread of a kernel, and its listing with encodings."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, "cuobjdump reports the registers of each kernel"
    return int(registers[1]), code


def _report(compiled: Any, log: str, options: dict[str, Any], architecture: int, case: str) -> Compiled:
    registers, code = disassemble(compiled.asm["cubin"])
    instructions = sass.parse(code)
    counts = sass.count(instructions)
    matmuls = Counter({name: count for name, count in counts.items() if "MMA" in name}).most_common(1)
    unit, matmul_count = matmuls[0] if matmuls else ("", 0)
    return Compiled(
        triton=triton.__version__,
        architecture=architecture,
        kernel=compiled.name.removesuffix("_kernel"),
        case=case,
        shape=" x ".join(str(options[name]) for name in _BLOCKS if name in options),
        warps=compiled.metadata.num_warps,
        registers=registers,
        spills=counts["LDL"] + counts["STL"],
        shared_memory=compiled.metadata.shared,
        instructions=len(instructions),
        tensor_core=unit,
        tensor_core_instructions=matmul_count,
        serialised=serialised_wgmma(log),
        hazards=sass.wgmma_hazards(instructions),
        barriers=sass.barriers(instructions),
    )
