"""Find nvcc, and choose the GPU architectures that it compiles for: used by setup.py, the tests and the benchmarks."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

OLDEST_NVCC = (12, 0)  # the first with C++20 and sm_90a; the oldest tested is 12.4
OLDEST_COMPUTE = 80  # bfloat16 and cp.async
HOPPER_ONLY = ("attention", "attention_backward")  # sources that require sm_90a
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0;12.0"  # PTX of the newest serves later GPUs
# Names in PyTorch's TORCH_CUDA_ARCH_LIST of GPUs that the kernels support.
NAMED_ARCHITECTURES = {
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
FROM_PYPI = "pip install 'cuda-toolkit[crt,cudart,nvcc,nvvm]>=13'"
# ptxas messages about register spills and serialised wgmma. (C7519, an added warpgroup.arrive, costs nothing.)
LOSS_OF_SPEED = re.compile(r"spill|\(C751[0-8]\)|wgmma\.mma_async instructions are serialized", re.IGNORECASE)


class ToolkitError(Exception):
    """There is no usable nvcc: the reason, and what to do."""


@dataclass(frozen=True)
class Nvcc:
    """An nvcc that was found.

    Attributes:
        path: The program.
        version: Its full version, such as "13.0.88".
        supported: The architectures that it compiles for, as compute capability times ten.
    """

    path: str
    version: str
    supported: frozenset[int]

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)


def find_nvcc() -> Nvcc:
    """Return the nvcc to build with: $NVCC, else that of CUDA_HOME, of PATH, of PyPI's packages, of /usr/local/cuda.

    Raises:
        ToolkitError: There is none, or it does not run, or it is too old.
    """
    chosen = os.environ.get("NVCC")
    if chosen == "":
        raise ToolkitError("NVCC is empty, which turns the CUDA kernels off: unset NVCC and install bertfast again")
    path = chosen or next(filter(None, _candidates()), None)
    if path is None:
        raise ToolkitError(
            f"nvcc was not found: {FROM_PYPI}, or set NVCC=/path/to/nvcc, and install bertfast again with "
            "--no-build-isolation"
        )
    release = re.search(r"release [\d.]+, V([\d.]+)", _output(path, "--version"))
    if release is None:
        raise ToolkitError(f"{path} is not nvcc: set NVCC=/path/to/nvcc and install bertfast again")
    nvcc = Nvcc(path, release[1], frozenset())
    if nvcc.release < OLDEST_NVCC:
        raise ToolkitError(
            f"nvcc {nvcc.version} ({path}) is too old, {'.'.join(map(str, OLDEST_NVCC))} or later is required: "
            f"{FROM_PYPI}, or set NVCC=/path/to/nvcc, and install bertfast again with --no-build-isolation"
        )
    listed = re.findall(r"compute_(\d+)\b", _output(path, "--list-gpu-arch"))
    return Nvcc(path, nvcc.version, frozenset(map(int, listed)))


def _candidates() -> Iterator[str | None]:
    """Yield the candidate paths of nvcc; None for those without one."""
    for home in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))):
        yield shutil.which("nvcc", path=f"{home}/bin")
    yield shutil.which("nvcc")
    yield from _nvcc_from_pypi()
    yield shutil.which("nvcc", path="/usr/local/cuda/bin")


def _nvcc_from_pypi() -> list[str]:
    """Return the nvcc of the package nvidia-cuda-nvcc, in site-packages/nvidia/cu13/bin: the newest CUDA first.

    The packages for CUDA 12 (nvidia-cuda-nvcc-cu12) hold ptxas and no nvcc.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    return [str(nvcc) for folder in folders for nvcc in sorted(folder.glob("cu[0-9]*/bin/nvcc"), reverse=True)]


def _output(path: str, option: str) -> str:
    try:
        return subprocess.run([path, option], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ToolkitError(
            f"{path} does not run ({error}): set NVCC=/path/to/nvcc and install bertfast again"
        ) from None


def architectures(nvcc: Nvcc) -> list[str]:
    """Return the target architectures in nvcc's syntax: "80", "90a", "120+PTX", ….

    TORCH_CUDA_ARCH_LIST selects them, in PyTorch's syntax. Default: each of DEFAULT_ARCHITECTURES that nvcc supports,
    and PTX of the newest, which the driver compiles for later GPUs.

    Raises:
        ToolkitError: The list is malformed, or names none that both nvcc and the kernels support.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    text = listed or DEFAULT_ARCHITECTURES
    for name, values in NAMED_ARCHITECTURES.items():
        text = text.replace(name, values)
    found: dict[str, bool] = {}  # by architecture, whether with PTX
    for word in filter(None, re.split(r"[;\s]+", text)):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if match is None:
            raise ToolkitError(
                f"TORCH_CUDA_ARCH_LIST has {word!r}, which is no GPU architecture: write for example '8.0;9.0;12.0+PTX'"
            )
        number = int(match[1] + match[2])
        if number >= OLDEST_COMPUTE and number in nvcc.supported:
            target = f"{number}{match[3]}"
            found[target] = found.get(target, False) or bool(match[4])
    if not found:
        supported = ", ".join(
            f"{target // 10}.{target % 10}" for target in sorted(nvcc.supported) if target >= OLDEST_COMPUTE
        )
        raise ToolkitError(
            f"of the GPU architectures {text} nvcc {nvcc.version} and the kernels support none: "
            f"set TORCH_CUDA_ARCH_LIST to some of {supported or 'those of a newer nvcc'} and install bertfast again"
        )
    if not listed:
        found[max(found, key=int)] = True
    return [target + "+PTX" * with_ptx for target, with_ptx in found.items()]


def architectures_of(source: str, requested: Sequence[str]) -> list[str]:
    """Return the architectures to compile a file of csrc/cuda for; none if they all lack its instructions."""
    if source not in HOPPER_ONLY:
        return list(requested)
    return ["90a"] if any(target.startswith("90") for target in requested) else []


def gencode(targets: list[str]) -> str:
    """Return nvcc's flags for architectures as `architectures` returns them."""
    flags = []
    for target in targets:
        number = target.removesuffix("+PTX")
        code = f"sm_{number}" if number == target else f"[sm_{number},compute_{number}]"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return " ".join(flags)


def host_compiler_flag(compiler: list[str]) -> str:
    """Return nvcc's -ccbin for a C++ compiler, without a cache in front of it; nothing if NVCC_CCBIN names another."""
    if os.environ.get("NVCC_CCBIN"):
        return ""
    programs = [word for word in compiler if Path(word).name not in ("ccache", "sccache")]
    return f"-ccbin={programs[0]}" if programs else ""


def losses(output: str) -> list[str]:
    """Return the lines of a compiler's output about a loss of speed: spilled registers, serialised wgmma."""
    return [line.strip() for line in output.splitlines() if LOSS_OF_SPEED.search(line)]


def first_error(output: str) -> str:
    """Return the first line of a compiler's output that names an error, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|\bfatal\b", line)]
    return (errors or lines[-1:] or ["no message"])[0]
