"""Builds the compiled library `bertfast._C` of `csrc/`; all other configuration is in pyproject.toml.

A kernel of `csrc/cpu` is compiled once for each instruction set, of which the library chooses when it is loaded.
Without a C++ compiler the package is installed without the library and says so: it then runs in plain PyTorch.

    MAX_JOBS=4                        how many compilers run at a time
    BERTFAST_SANITIZE=address,undefined   for the tests: with gcc's sanitizers
    BERTFAST_EMULATE=1                for the tests: wide instruction sets made of AVX2's instructions
"""

import os
import platform
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
EMULATED = {
    name: f"-mavx2 -mfma -DBERTFAST_LANES=16{' -DBERTFAST_PAIRS' * (name == 'avx512_bf16')}"
    for name in ("avx512", "avx512_bf16")
}
NOT_KERNELS = ("instruction_set.cpp",)
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wall -Wextra -Werror=return-type"
SILENT = "-Wno-psabi -Wno-ignored-attributes -Wno-maybe-uninitialized"  # of registers of 64 bytes, and gcc's headers
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000 -DPy_LIMITED_API=0x030b0000"  # PyTorch 2.10, Python 3.11


class BuildLibrary(build_ext):
    """Writes a build.ninja and runs it: what has not changed is not compiled again."""

    def build_extension(self, extension):
        target = Path(self.get_ext_fullpath(extension.name)).absolute()
        try:
            self._build(target)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)  # one of older sources
            print(
                f"\nWARNING: bertfast's compiled library was not built ({error}). bertfast works without it, several "
                "times slower on a CPU; with a C++ compiler of C++20 (gcc 12, say), install again.\n",
                file=sys.stderr,
                flush=True,
            )

    def _build(self, target: Path) -> None:
        import ninja
        from ninja.ninja_syntax import Writer
        from torch.utils.cpp_extension import include_paths, library_paths

        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        if compiler is None:
            raise FileNotFoundError("there is no C++ compiler")
        folder = Path(self.build_temp).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = " ".join(f"-isystem {path}" for path in [*include_paths(), sysconfig.get_path("include")])
        with (folder / "build.ninja").open("w") as file:
            rules = Writer(file, width=10**6)
            compile_command = f"{compiler} -MD -MF $out.d {FLAGS} {SILENT} $flags -c $in -o $out"
            rules.rule("compile", compile_command, depfile="$out.d", deps="gcc", description="$out")
            link = f"{compiler} -shared {_sanitizers()} $in -o $out"
            link += "".join(f" -L{path}" for path in library_paths()) + " -ltorch_cpu -ldl"
            rules.rule("link", link, description="$out")
            objects = []
            for source, name, flags in _units(includes):
                objects.append(str(folder / f"{name}.o"))
                rules.build(objects[-1], "compile", str(source), variables={"flags": f"{flags} {_sanitizers()}"})
            rules.build(str(target), "link", objects)
        jobs = os.environ.get("MAX_JOBS")
        command = [Path(ninja.BIN_DIR) / "ninja", *(["-j", jobs] if jobs else [])]
        subprocess.run(command, cwd=folder, check=True)


def _units(includes: str) -> list[tuple[Path, str, str]]:
    """What is compiled: (source, name of the object, flags)."""
    emulate = os.environ.get("BERTFAST_EMULATE") == "1"
    shared = "-DBERTFAST_EMULATED" if emulate else ""
    units = [(ROOT / "csrc" / "library.cpp", "library", f"{includes} {STABLE_ABI}")]
    sets = INSTRUCTION_SETS | (EMULATED if emulate else {})
    if platform.machine() not in ("x86_64", "AMD64"):
        sets = {"plain": ""}
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        if source.name in NOT_KERNELS:
            units.append((source, source.stem, shared))
            continue
        units += [(source, f"{source.stem}.{name}", f"{shared} -DBERTFAST_SET={name} {sets[name]}") for name in sets]
    return units


def _sanitizers() -> str:
    wanted = os.environ.get("BERTFAST_SANITIZE", "")
    return f"-fsanitize={wanted} -fno-omit-frame-pointer -g" if wanted else ""


setup(
    ext_modules=[Extension("bertfast._C", [], py_limited_api=True)],
    cmdclass={"build_ext": BuildLibrary},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
