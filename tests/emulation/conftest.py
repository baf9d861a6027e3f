"""Build the kernels of this folder for the emulation, or use probes that were built for a GPU of sm_90.

On such a GPU, BERTFAST_PROBES names a library of `build_probes.py`; without it nvcc builds one.
"""

import ctypes
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from build_probes import FOR_CPU, build_for_gpu, compile_source, cuda_toolkit

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")


def emulated(name: str, folder: Path, *flags: str) -> Path:
    """Build `name`.cu for a CPU, and return the library."""
    if COMPILER is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the emulation requires g++ on x86-64")
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    return compile_source(HERE / f"{name}.cu", target, [COMPILER, *FOR_CPU.split(), *flags])


class MatmulArguments(ctypes.Structure):
    """The struct of the same name in probes.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "d")),
        *((name, ctypes.c_int) for name in ("a_first", "b_first")),
        *((name, ctypes.c_bool) for name in ("a_transposed", "b_transposed")),
    ]


class Probes:
    """The functions of probes.cu on numpy arrays; errors are raised as RuntimeError."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))

    def _call(self, name: str, *arguments) -> None:
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        pointers = [x.ctypes.data_as(ctypes.c_void_p) if isinstance(x, np.ndarray) else x for x in arguments]
        if (error := function(*pointers)) is not None:
            raise RuntimeError(error.decode())

    def wgmma(self, name: str, a, b, columns: int, *, a_first=0, b_first=0, a_transposed=False, b_transposed=False):
        """Return [64, columns], the matmul of rows of a and of b, computed by the probe `wgmma_NAME`."""
        d = np.zeros((64, columns), np.float32)
        addresses = (x.ctypes.data for x in (a, b, d))
        arguments = MatmulArguments(*addresses, a_first, b_first, a_transposed, b_transposed)
        self._call(f"wgmma_{name}", ctypes.byref(arguments))
        return d

    def box(self, x, column: int, row: int, plane: int):
        y = np.zeros((3, 4, 8), np.uint16)
        self._call("box", x, y, *x.shape, column, row, plane)
        return y

    def transpose(self, x):
        y = np.zeros((16, 16), np.uint16)
        self._call("transpose", x, y)
        return y

    def mma(self, kind: str, a, b):
        d = np.zeros((16, 8), np.float32)
        self._call(f"mma_{kind}", a, b, d)
        return d

    def count(self, threads: int):
        sums, elected_threads = np.zeros(threads, np.int32), np.zeros(1, np.int32)
        self._call("count", threads, sums, elected_threads)
        return sums, int(elected_threads[0])


def runs_on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.fixture(scope="session")
def probes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes")
    prebuilt = os.environ.get("BERTFAST_PROBES")
    if not runs_on_hopper():
        if prebuilt is not None:
            pytest.skip(f"{prebuilt} requires a GPU of sm_90")
        return Probes(emulated("probes", folder))
    if prebuilt is not None:
        return Probes(Path(prebuilt))
    try:
        return Probes(build_for_gpu(folder / "probes.so"))
    except cuda_toolkit.ToolkitError as error:
        pytest.skip(f"{error}; or build the probes elsewhere by build_probes.py, and set BERTFAST_PROBES to the file")


@pytest.fixture(scope="session")
def mistakes(tmp_path_factory):
    pybind11 = pytest.importorskip("pybind11")
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    spec = importlib.util.spec_from_file_location(
        "mistakes", emulated("mistakes", tmp_path_factory.mktemp("mistakes"), *includes)
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[0, 1, 2, 3])
def seed(request, monkeypatch):
    """Thread order of the emulation: 0 is in order, others are shuffled."""
    if request.param > 0 and "probes" in request.fixturenames and runs_on_hopper():
        pytest.skip("a GPU has no such order")
    monkeypatch.setenv("BERTFAST_EMULATION_SEED", str(request.param))
