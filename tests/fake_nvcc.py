"""An nvcc for tests of the build: g++ compiles what it is given, as the emulation of tests/emulation does."""

import shutil
import sys
from pathlib import Path

EMULATION = Path(__file__).parent / "emulation"
PROGRAM = """#!{python}
import subprocess, sys

arguments = sys.argv[1:]
if "--version" in arguments:
    print("Cuda compilation tools, release {release}, V{release}.88")
elif "--list-gpu-arch" in arguments:
    print("{architectures}")
else:
    with open("{log}", "a") as log:
        log.write(" ".join(arguments) + "\\n")
    of_nvcc = ("-gencode", "-X", "--expt", "--cudart", "-ccbin", "-O")
    kept = [argument for argument in arguments if not argument.startswith(of_nvcc)]
    if "-c" in kept:
        kept = ["-x", "c++", "-O0", "-fPIC", "-fvisibility=hidden", "-w", "-I{emulation}", *kept]
    sys.exit(subprocess.run(["{compiler}", *kept]).returncode)
"""


def write_nvcc(folder: Path, release: str = "13.0", architectures: str = "75 80 86 90 100 120") -> Path:
    """Write the program to folder/nvcc; what it is called with goes to folder/calls, a line per call."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "nvcc"
    text = PROGRAM.format(
        python=sys.executable,
        release=release,
        architectures="\\n".join(f"compute_{one}" for one in architectures.split()),
        log=folder / "calls",
        emulation=EMULATION,
        compiler=shutil.which("g++"),
    )
    program.write_text(text)
    program.chmod(0o755)
    return program
