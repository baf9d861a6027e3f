"""Build what a release publishes, an sdist and wheels, and smoke-test each in an empty environment.

    python build_support/wheels.py --output dist

The wheels are for any Python from 3.11 (abi3) and any PyTorch from 2.10 (its stable ABI), whose libraries they do not
contain. The platform tag is the oldest glibc that the library works with, which depends on the machine that builds:
.github/workflows/release.yml builds in a manylinux container. The wheel for aarch64 is built if there is a cross
compiler, aarch64-linux-gnu-g++; this machine cannot run it, so it is linked with no symbol left undefined but Python's.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

sys.path.insert(0, str(Path(__file__).parent))
from environments import ROOT, Environment, oldest_torch, run

CROSS_COMPILER = "aarch64-linux-gnu-g++"
# The Makefile has the version of PyTorch that the tests run with.
(TORCH_OF_TESTS,) = re.findall(r"^TORCH *:= *(\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
BUILD_PACKAGES = ("setuptools>=77", "wheel", "ninja", "pybind11", "numpy")


def build(kind: str, source: Path, output: Path, variables: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Build a "wheel" or an "sdist" of a source tree with the packages of this environment and these variables.

    Returns:
        The file, in the folder `output`.
    """
    for leftover in source.glob("build/lib.*"):
        shutil.rmtree(leftover)  # it would add modules that no longer exist
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "build", "--no-isolation", f"--{kind}", "--outdir", folder, str(source)]
        run(sys.executable, *command, variables=variables)
        (built,) = Path(folder).iterdir()
        return Path(shutil.copy(built, output))


def repair(wheel: Path) -> Path:
    """Give a wheel the manylinux tag that its library satisfies, and return the new wheel, which replaces it."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "auditwheel", "repair", "--exclude", "libtorch_cpu.so", "--wheel-dir", folder, str(wheel)]
        tools = os.environ.get("PYTHONPATH", "")  # auditwheel may be in a folder of its own
        run(sys.executable, *command, variables={"PYTHONPATH": tools})
        (repaired,) = Path(folder).iterdir()
        wheel.unlink()
        return Path(shutil.copy(repaired, wheel.parent))


def cross_compile(sdist: Path, output: Path) -> Path:
    """Build the wheel for aarch64 from an sdist, linked with the library of PyTorch's oldest wheel for aarch64."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
            *("--platform=manylinux_2_28_aarch64", "--python-version=3.11", "--dest", name, oldest_torch()),
        )
        (torch_wheel,) = folder.glob("torch-*.whl")
        zipfile.ZipFile(torch_wheel).extract("torch/lib/libtorch_cpu.so", folder)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (source,) = folder.glob("bertfast-*")
        libraries = folder / "torch" / "lib"
        variables = {"CXX": CROSS_COMPILER, "NVCC": "", "TORCH_LIBRARIES": str(libraries)}
        wheel = build("wheel", source, output, {**variables, "_PYTHON_HOST_PLATFORM": "linux-aarch64"})
        check_symbols(wheel, libraries / "libtorch_cpu.so")
    return wheel


def check_symbols(wheel: Path, torch_library: Path) -> None:
    """Check that every symbol that the wheel's library takes from PyTorch exists there.

    Raises:
        ValueError: One does not, or the wheel has no library.
    """
    library = "bertfast/_C.abi3.so"
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        if library not in archive.namelist():
            raise ValueError(f"{wheel.name} has no {library}: the compiler failed, see above")
        required = _symbols(Path(archive.extract(library, folder)), "--undefined-only")
    required = {name for name in required if name.startswith(("aoti_", "torch_"))}
    if missing := required - _symbols(torch_library, "--defined-only"):
        raise ValueError(f"{wheel.name} uses what {torch_library.name} does not have: {', '.join(sorted(missing))}")


def _symbols(library: Path, which: str) -> set[str]:
    command = ["nm", "--dynamic", "--format=just-symbols", which, str(library)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name.partition("@")[0] for name in listing.split()}


def smoke_test(package: Path) -> None:
    """Install a package into an empty environment and run the smoke test."""
    is_wheel = package.suffix == ".whl"
    environment = Environment(sys.executable, "wheel" if is_wheel else "sdist", TORCH_OF_TESTS)
    environment.create()
    if not is_wheel:
        environment.install(*BUILD_PACKAGES)
    environment.replace(package.resolve(), *([] if is_wheel else ["--no-build-isolation"]))
    environment.smoke_test("--native")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="Folder for the sdist and the wheels.")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    sdist = build("sdist", ROOT, output)
    wheel = repair(build("wheel", ROOT, output))
    for package in (wheel, sdist):
        smoke_test(package)
    if platform.machine() != "x86_64":
        return
    if shutil.which(CROSS_COMPILER):
        repair(cross_compile(sdist, output))
    else:
        print(f"no wheel for aarch64: {CROSS_COMPILER} is not installed (Debian: g++-aarch64-linux-gnu)")


if __name__ == "__main__":
    main()
