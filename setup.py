"""Builds the compiled library `bertfast._C` of `csrc/`; all other configuration is in pyproject.toml.

A kernel of `csrc/cpu` is compiled once for each instruction set, of which the library chooses when it is loaded.
Without a C++ compiler the package is installed without the library and says so: it then runs in plain PyTorch.

    CXX=g++-13         the compiler
    CXXFLAGS=-O0       its last flags
    MAX_JOBS=4         how many of it run at a time
    NVCC=/usr/local/cuda/bin/nvcc
                       CUDA's compiler, which is looked for on the path and in CUDA_HOME; empty: no kernels for GPUs
    BERTFAST_CHECKED=1 for the tests: gcc's sanitizers watch, and the wide instruction sets are made of AVX2's
    BERTFAST_EMULATED_CUDA=1
                       for the tests: the kernels for GPUs run on a CPU, see tests/emulation
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
WIDE = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512"
INSTRUCTION_SETS = {"plain": "", "avx2": "-mavx2 -mfma", "avx512": WIDE, "avx512_bf16": f"{WIDE} -mavx512bf16"}
EMULATED = "-mavx2 -mfma -DBERTFAST_LANES=16"
EMULATING = INSTRUCTION_SETS | {"avx512": EMULATED, "avx512_bf16": f"{EMULATED} -DBERTFAST_PAIRS"}
CHECKED = os.environ.get("BERTFAST_CHECKED") == "1"
EMULATED_CUDA = os.environ.get("BERTFAST_EMULATED_CUDA") == "1"
OBJECTS = ROOT / "build" / ("checked-objects" if CHECKED else "objects")
NOT_KERNELS = ("instruction_set.cpp",)
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wall -Wextra -Werror=return-type"
SILENT = "-Wno-psabi -Wno-ignored-attributes -Wno-maybe-uninitialized"  # of registers of 64 bytes, and gcc's headers
SANITIZED = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
# Of CUDA: the chips of each kernel, and flags. A spill, or products that wait for one another, is an error.
CHIPS, CHIPS_OF = ("80", "90", "100", "120"), {"attention": ("90a",), "attention_backward": ("90a",)}
NVCC_FLAGS = (
    "-std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler=-fPIC,-fvisibility=hidden "
    "-Xptxas=--warn-on-spills,-Werror -Xfatbin=-compress-all"
)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000 -DPy_LIMITED_API=0x030b0000"  # PyTorch 2.10, Python 3.11


class BuildLibrary(build_ext):
    """Writes a build.ninja and runs it: what has not changed is not compiled again."""

    def build_extension(self, extension):
        target = Path(self.get_ext_fullpath(extension.name)).absolute()
        nvcc = None if CHECKED or EMULATED_CUDA else _nvcc()
        try:
            if nvcc is None or not _built(target, nvcc):
                _build(target, None)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)  # one of older sources
            if not (CHECKED or EMULATED_CUDA):
                (ROOT / "bertfast" / target.name).unlink(missing_ok=True)
            _warn(
                f"bertfast's compiled library was not built ({error}). bertfast works without it, several times slower "
                "on a CPU; with a compiler of C++20 (g++ 12, say), install again."
            )


def _built(target: Path, nvcc: str) -> bool:
    """Whether the library was built with the kernels for GPUs; a CUDA compiler that fails does not cost the others."""
    try:
        _build(target, nvcc)
    except subprocess.CalledProcessError:
        _warn("the kernels for GPUs in CUDA C++ were not built, see above; all else is.")
        return False
    return True


def _warn(text: str) -> None:
    print(f"\nWARNING: {text}\n", file=sys.stderr, flush=True)


def _build(target: Path, nvcc: str | None) -> None:
    import ninja
    from ninja.ninja_syntax import Writer
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler")
    subprocess.run([*shlex.split(compiler), "--version"], check=True, stdout=subprocess.DEVNULL)
    always = f"{FLAGS} {SILENT} {SANITIZED if CHECKED else ''} {os.environ.get('CXXFLAGS', '')}"
    torch_folders = " ".join(shlex.quote(f"-L{path}") for path in library_paths())
    OBJECTS.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with (OBJECTS / "build.ninja").open("w") as file:
        rules = Writer(file, width=10**6)
        compile_command = f"{compiler} -MD -MF $out.d {always} $flags -c $in -o $out"
        rules.rule("compile", compile_command, depfile="$out.d", deps="gcc", description="$out")
        link_command = f"{compiler} {always} -shared"
        if nvcc:  # it knows where its runtime is
            link_command = f"{nvcc} --cudart=static -shared"
            compile_command = f"{nvcc} -MD -MF $out.d {NVCC_FLAGS} $flags -c $in -o $out"
            rules.rule("compile_cuda", compile_command, depfile="$out.d", deps="gcc", description="$out")
        rules.rule("link", f"{link_command} $in -o $out {torch_folders} -ltorch_cpu", description="$out")
        objects = []
        for source, name, flags in _units([*include_paths(), sysconfig.get_path("include")], nvcc is not None):
            rule = "compile_cuda" if source.suffix == ".cu" and nvcc else "compile"
            objects += rules.build(f"{name}.o", rule, str(source), variables={"flags": flags})
        rules.build(str(target), "link", objects)
    jobs = os.environ.get("MAX_JOBS")
    subprocess.run([Path(ninja.BIN_DIR) / "ninja", *(["-j", jobs] if jobs else [])], cwd=OBJECTS, check=True)


def _nvcc() -> str | None:
    """CUDA's compiler, if there is one."""
    asked = os.environ.get("NVCC")
    if asked is not None:
        return asked or None
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (home and shutil.which("nvcc", path=f"{home}/bin"))


def _units(include_folders: list[str], with_nvcc: bool) -> list[tuple[Path, str, str]]:
    """What is compiled: (source, name of the object, flags)."""
    includes = " ".join(f"-isystem {shlex.quote(path)}" for path in include_folders)
    cuda = "-DBERTFAST_CUDA" if with_nvcc else "-DBERTFAST_CUDA -DBERTFAST_EMULATED_CUDA" if EMULATED_CUDA else ""
    kind = ".cuda" if with_nvcc else ".emulated" if EMULATED_CUDA else ""
    units = [(ROOT / "csrc" / "library.cpp", f"library{kind}", f"{includes} {STABLE_ABI} {cuda}")]
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if cuda else ():
        chips = CHIPS_OF.get(source.stem, CHIPS)
        generated = " ".join(f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in chips)
        emulated = f"-x c++ -O2 -g1 -Wno-unknown-pragmas -I{shlex.quote(str(ROOT / 'tests' / 'emulation'))}"
        units.append((source, f"{source.stem}{kind}", generated if with_nvcc else emulated))
    sets = EMULATING if CHECKED else INSTRUCTION_SETS
    if platform.machine() not in ("x86_64", "AMD64"):
        sets = {"plain": ""}
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        if source.name in NOT_KERNELS:
            units.append((source, source.stem, "-DBERTFAST_EMULATED" if CHECKED else ""))
        else:
            units += [(source, f"{source.stem}.{name}", f"-DBERTFAST_SET={name} {sets[name]}") for name in sets]
    return units


setup(
    ext_modules=[Extension("bertfast._C", [], py_limited_api=True, optional=True)],
    cmdclass={"build_ext": BuildLibrary},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
