"""Build the probes of probes.cu into a library with a C interface: for a GPU of sm_90, or for the emulation.

    python tests/emulation/build_probes.py dist/probes.so

builds it for a GPU, with nvcc. The machine with the GPU needs no nvcc, and any Python can load the library:
`BERTFAST_PROBES=dist/probes.so pytest tests/emulation/test_probes.py` runs the probes on the GPU.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "build_support"))
import cuda_toolkit

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc" / "cuda"
SHARED = "-std=c++20 -shared"
FOR_CPU = f"-x c++ {SHARED} -O1 -fPIC -fvisibility=hidden -Wno-unknown-pragmas -Wno-psabi"
FOR_GPU = (
    f"{SHARED} -O3 -gencode=arch=compute_90a,code=sm_90a --cudart=static --expt-relaxed-constexpr "
    "-Xcompiler=-fPIC,-fvisibility=hidden"
)


def build_for_gpu(target: Path) -> Path:
    """Compile the probes with the nvcc that setup.py would use.

    Raises:
        ToolkitError: There is no nvcc.
    """
    return compile_source(HERE / "probes.cu", target, [cuda_toolkit.find_nvcc().path, *shlex.split(FOR_GPU)])


def compile_source(source: Path, target: Path, command: list[str]) -> Path:
    """Compile a file of this folder into a library, and return its path."""
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*command, f"-I{HERE}", f"-I{CSRC}", str(source), "-o", str(target)], check=True)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="the library to write, such as dist/probes.so")
    try:
        print(build_for_gpu(parser.parse_args().target))
    except cuda_toolkit.ToolkitError as error:
        sys.exit(f"build_probes: {error}")
