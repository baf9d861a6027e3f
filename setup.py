"""Build the native library `bertfast._C` from `csrc/`; all other configuration is in pyproject.toml.

Each kernel of `csrc/cpu` is compiled once per instruction set; the library selects one when it is loaded.
Without a C++ compiler the package is installed without the library, with a warning, and runs in plain PyTorch.

A file of `csrc/cuda` that nvcc cannot compile is left out of the library; `_C.cuda.json`, in the library's folder, has
the reason, which `bertfast doctor` shows.

    CXX=g++-13         C++ compiler, also nvcc's
    CXXFLAGS=-O0       flags appended to the compiler's
    MAX_JOBS=4         number of compilers that run at a time
    NVCC=/usr/local/cuda/bin/nvcc
                       CUDA compiler; default: that of CUDA_HOME, of PATH, of PyPI's packages (bertfast[cuda-build]) or
                       of /usr/local/cuda; empty: no CUDA kernels
    TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"
                       GPU architectures, as PyTorch's extensions take them
    TORCH_LIBRARIES=FOLDER
                       libtorch_cpu.so to link with; default: the installed PyTorch's. For a CXX that compiles for
                       another architecture, whose wheel is named by _PYTHON_HOST_PLATFORM (build_support/wheels.py)
    BERTFAST_CHECKED=1 for the tests: compile with gcc's sanitizers, and emulate the wide instruction sets with AVX2
    BERTFAST_EMULATED_CUDA=1
                       for the tests: run the CUDA kernels on a CPU, see tests/emulation
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "build_support"))  # which build front ends leave off the path
import cuda_toolkit
from cuda_toolkit import Nvcc, ToolkitError

ROOT = Path(__file__).parent
WIDE = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512"
INSTRUCTION_SETS = {"plain": "", "avx2": "-mavx2 -mfma", "avx512": WIDE, "avx512_bf16": f"{WIDE} -mavx512bf16"}
EMULATED = "-mavx2 -mfma -DBERTFAST_LANES=16"
EMULATING = INSTRUCTION_SETS | {"avx512": EMULATED, "avx512_bf16": f"{EMULATED} -DBERTFAST_PAIRS"}
CHECKED = os.environ.get("BERTFAST_CHECKED") == "1"
EMULATED_CUDA = os.environ.get("BERTFAST_EMULATED_CUDA") == "1"
OBJECTS = ROOT / "build" / ("checked-objects" if CHECKED else "objects")
NOT_KERNELS = ("instruction_set.cpp",)
PREFIX_MAP = f"-ffile-prefix-map={shlex.quote(str(ROOT))}/="  # messages name a source, not where it was built
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wall -Wextra -Werror=return-type"
SILENT = "-Wno-psabi -Wno-ignored-attributes -Wno-maybe-uninitialized"  # about 64-byte registers and gcc's headers
SANITIZED = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
NVCC_FLAGS = (
    "-std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler=-fPIC,-fvisibility=hidden "
    "-Xptxas=--warn-on-spills -Xfatbin=-compress-all"
)
CUDA_RECORD = "_C.cuda.json"  # result of building csrc/cuda, which bertfast/ops/cuda_build.py reads
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
LOG_LIMIT = 20_000  # characters of nvcc's output that are kept
LINK_LOG = "link.log"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000 -DPy_LIMITED_API=0x030b0000"  # PyTorch 2.10, Python 3.11


@dataclass(frozen=True)
class Unit:
    """A file to compile: its object's name, its flags, and with nvcc the GPU architectures."""

    source: Path
    name: str
    flags: str
    architectures: tuple[str, ...] = ()

    @property
    def object(self) -> Path:
        return OBJECTS / f"{self.name}.o"

    @property
    def log(self) -> Path:
        """nvcc's output."""
        return OBJECTS / f"{self.name}.o.log"


class BuildLibrary(build_ext):  # type: ignore[misc]  # setuptools has no types
    """Write a build.ninja and run it, which compiles only files that changed."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        record = target.with_name(CUDA_RECORD)
        record.unlink(missing_ok=True)
        try:
            if CHECKED or EMULATED_CUDA:
                _build(target, _units())
            else:
                record.write_text(json.dumps(_build_with_cuda(target), indent=2) + "\n", encoding="utf-8")
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)  # a library of older sources
            if not (CHECKED or EMULATED_CUDA):
                for name in (target.name, CUDA_RECORD):
                    (ROOT / "bertfast" / name).unlink(missing_ok=True)
            _warn(
                f"bertfast's native library was not built ({error}). bertfast works without it, several times slower "
                "on a CPU. To build it, install a C++20 compiler, such as g++ 12, and install bertfast again."
            )

    def copy_extensions_to_source(self) -> None:
        """Copy the record as well to the source tree, where an editable install has the library."""
        super().copy_extensions_to_source()
        record = Path(self.build_lib, "bertfast", CUDA_RECORD)
        if record.is_file():
            shutil.copyfile(record, ROOT / "bertfast" / CUDA_RECORD)


def _warn(text: str) -> None:
    print(f"\nWARNING: {text}\n", file=sys.stderr, flush=True)


def _build_with_cuda(target: Path) -> dict[str, Any]:
    """Build the library with the files of csrc/cuda that nvcc can compile.

    Returns:
        The record of the build. "commit": that of the checkout. "nvcc": its version. "reason": why there is no CUDA
        kernel, None if there is one. By the names of sources: "architectures" of those in the library, "missing" with
        the error and all output of the others, and "slow" with ptxas's lines about lost speed.
    """
    record: dict[str, Any] = {"commit": _commit(), "nvcc": None, "reason": None}
    record |= {"architectures": {}, "missing": {}, "slow": {}}
    try:
        nvcc = cuda_toolkit.find_nvcc()
        record["nvcc"] = nvcc.version
        requested = cuda_toolkit.architectures(nvcc)
        units = _units(nvcc, requested)
        for source in sorted({path.stem for path in CUDA_SOURCES} - {unit.source.stem for unit in units}):
            error = "it requires sm_90, which TORCH_CUDA_ARCH_LIST leaves out: add 9.0 and install bertfast again"
            record["missing"][source] = {"error": error, "output": ""}
        _build(target, _that_compile(units, nvcc, record), nvcc)
        _warn_of_mismatch(nvcc)
    except ToolkitError as error:
        record |= {"reason": str(error), "architectures": {}, "slow": {}}
        _build(target, _units())
        _warn(f"the library has no CUDA kernels: {error}")
    for source, why in record["missing"].items():
        _warn(f"{source}.cu is not in the library: {why['error']}")
    for source, lines in record["slow"].items():
        _warn("\n".join([f"{source}.cu is slower than it should be:", *lines]))
    return record


def _commit() -> str:
    """Return the commit of the checkout, with "-dirty" if there are uncommitted changes; empty if it is not known."""
    if not (ROOT / ".git").exists():  # that of a repository around this folder is another one
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # there is no git
        return ""


def _that_compile(units: list[Unit], nvcc: Nvcc, record: dict[str, Any]) -> list[Unit]:
    """Compile all units, and return them without the CUDA sources that nvcc cannot compile.

    Raises:
        ToolkitError: nvcc can compile none.
    """
    _write_ninja(units, nvcc)
    _ninja("-k", "0", check=False)  # keep going; errors in C++ end the build later
    kept = []
    for unit in units:
        output = unit.log.read_text(encoding="utf-8", errors="replace") if unit.log.is_file() else ""
        if unit.source.suffix != ".cu":
            kept.append(unit)
        elif not unit.object.is_file():
            remedy = "set NVCC=/path/to/nvcc to another one and install bertfast again"
            error = f"nvcc {nvcc.version} failed ({cuda_toolkit.first_error(output)}): {remedy}"
            record["missing"][unit.source.stem] = {"error": error, "output": output[:LOG_LIMIT]}
        else:
            kept.append(unit)
            record["architectures"][unit.source.stem] = list(unit.architectures)
            if slow := cuda_toolkit.losses(output):
                record["slow"][unit.source.stem] = slow
    if not record["architectures"]:
        error = cuda_toolkit.first_error(next(iter(record["missing"].values()))["output"])
        raise ToolkitError(
            f"nvcc {nvcc.version} compiled no file of csrc/cuda ({error}): set NVCC=/path/to/nvcc to another one, or "
            "CXX to a C++ compiler that it supports, and install bertfast again"
        )
    return kept


def _warn_of_mismatch(nvcc: Nvcc) -> None:
    import torch

    cuda = torch.version.cuda
    if cuda is not None and int(cuda.split(".")[0]) != nvcc.release[0]:
        _warn(
            f"PyTorch was built with CUDA {cuda}, this is nvcc {nvcc.version}: the CUDA kernels will require a driver "
            f"for CUDA {nvcc.release[0]}. NVCC=/path/to/nvcc chooses another nvcc."
        )


def _build(target: Path, units: list[Unit], nvcc: Nvcc | None = None) -> None:
    """Compile and link the units.

    Raises:
        ToolkitError: nvcc cannot link.
        CalledProcessError: The C++ compiler failed.
    """
    _write_ninja(units, nvcc, target)
    log = OBJECTS / LINK_LOG
    log.unlink(missing_ok=True)
    try:
        _ninja()
    except subprocess.CalledProcessError:
        if nvcc is None or not log.is_file():
            raise
        error = cuda_toolkit.first_error(log.read_text(encoding="utf-8", errors="replace"))
        raise ToolkitError(
            f"nvcc {nvcc.version} cannot link the library ({error}): install its runtime, libcudart_static.a, or set "
            "NVCC=/path/to/nvcc to another one, and install bertfast again"
        ) from None


def _ninja(*arguments: str, check: bool = True) -> None:
    import ninja

    jobs = os.environ.get("MAX_JOBS")
    command = [str(Path(ninja.BIN_DIR) / "ninja"), *(["-j", jobs] if jobs else []), *arguments]
    subprocess.run(command, cwd=OBJECTS, check=check)


def _cxx() -> str:
    """Return the C++ compiler, quoted for a shell.

    Raises:
        FileNotFoundError: There is none.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler was found: neither CXX nor g++ nor c++")
    subprocess.run([*shlex.split(compiler), "--version"], check=True, stdout=subprocess.DEVNULL)
    return compiler


def _target_machine() -> str:
    """Return the architecture that the C++ compiler compiles for, such as x86_64 or aarch64."""
    command = [*shlex.split(_cxx()), "-dumpmachine"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.partition("-")[0]


def _write_ninja(units: list[Unit], nvcc: Nvcc | None, target: Path | None = None) -> None:
    """Write build.ninja: the rules, the units and the target, if any. With nvcc, nvcc also links, with its runtime."""
    from ninja.ninja_syntax import Writer
    from torch.utils.cpp_extension import library_paths

    compiler = _cxx()
    always = f"{FLAGS} {PREFIX_MAP} {SILENT} {SANITIZED if CHECKED else ''} {os.environ.get('CXXFLAGS', '')}"
    link = f"{compiler} {always} -shared $in -o $out"
    libraries = os.environ.get("TORCH_LIBRARIES")
    torch_folders = " ".join(shlex.quote(f"-L{path}") for path in ([libraries] if libraries else library_paths()))
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with (OBJECTS / "build.ninja").open("w") as file:
        rules = Writer(file, width=10**6)  # type: ignore[arg-type]  # its stub has the type of the file wrong
        command = f"{compiler} -MD -MF $out.d {always} $flags -c $in -o $out"
        rules.rule("compile", command, depfile="$out.d", deps="gcc", description="$out")
        if nvcc is not None:
            program = f"{shlex.quote(nvcc.path)} {cuda_toolkit.host_compiler_flag(shlex.split(compiler))}"
            # Remove the object first: an older one must not replace one that does not compile. Keep nvcc's output.
            command = f"rm -f $out; {program} -MD -MF $out.d {NVCC_FLAGS} $flags -c $in -o $out"
            rules.rule("compile_cuda", _logged(command, "$out.log"), depfile="$out.d", deps="gcc", description="$out")
            link = f"{program} --cudart=static -shared $in -o $out"
        link = f"{link} {torch_folders} -ltorch_cpu"
        rules.rule("link", link if nvcc is None else _logged(link, LINK_LOG), description="$out")
        objects: list[str] = []
        for unit in units:
            rule = "compile_cuda" if unit.architectures else "compile"
            objects.append(f"{unit.name}.o")
            rules.build(objects[-1:], rule, [str(unit.source)], variables={"flags": unit.flags})
        if target is not None:
            rules.build([str(target)], "link", objects)


def _logged(command: str, log: str) -> str:
    """Return a shell command that runs another one, shows its output and keeps it in a file."""
    return f"{{ {command}; }} > {log} 2>&1; status=$$?; cat {log}; exit $$status"


def _units(nvcc: Nvcc | None = None, requested: Sequence[str] = ()) -> list[Unit]:
    """Return what to compile; of csrc/cuda only with nvcc, and only files for one of the requested architectures."""
    from torch.utils.cpp_extension import include_paths

    folders = [*include_paths(), sysconfig.get_path("include")]
    includes = " ".join(f"-isystem {shlex.quote(path)}" for path in folders)
    cuda = "-DBERTFAST_CUDA" if nvcc else "-DBERTFAST_CUDA -DBERTFAST_EMULATED_CUDA" if EMULATED_CUDA else ""
    kind = ".cuda" if nvcc else ".emulated" if EMULATED_CUDA else ""
    units = [Unit(ROOT / "csrc" / "library.cpp", f"library{kind}", f"{includes} {STABLE_ABI} {cuda}")]
    for source in CUDA_SOURCES:
        if EMULATED_CUDA:
            emulation = shlex.quote(str(ROOT / "tests" / "emulation"))
            flags = f"-x c++ -O2 -g1 -Wno-unknown-pragmas -I{emulation}"
            units.append(Unit(source, f"{source.stem}{kind}", flags))
        elif nvcc is not None and (chosen := cuda_toolkit.architectures_of(source.stem, requested)):
            name = f"{source.stem}{kind}-{nvcc.version}"  # objects of several nvcc side by side
            units.append(Unit(source, name, cuda_toolkit.gencode(chosen), tuple(chosen)))
    sets = EMULATING if CHECKED else INSTRUCTION_SETS
    if _target_machine() != "x86_64":
        sets = {"plain": ""}
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        if source.name in NOT_KERNELS:
            units.append(Unit(source, source.stem, "-DBERTFAST_EMULATED" if CHECKED else ""))
        else:
            units += [Unit(source, f"{source.stem}.{name}", f"-DBERTFAST_SET={name} {sets[name]}") for name in sets]
    return units


setup(
    ext_modules=[Extension("bertfast._C", [], py_limited_api=True, optional=True)],
    cmdclass={"build_ext": BuildLibrary},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
