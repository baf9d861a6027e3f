"""Tests of the kernels against the reference, one implementation per process; `make test` runs all of them.

pytest tests/kernels                        the native library for CPUs; on a machine with a GPU, Triton
TRITON_INTERPRET=1 pytest tests/kernels     Triton on a CPU, in its interpreter
BERTFAST_TESTED=cuda pytest tests/kernels   CUDA C++: on a GPU, or on a CPU with the emulated build of the library
"""

import os
import zlib

import pytest
from helpers import INTERPRETED, KERNELS, WITHOUT_CUDA_KERNEL

from bertfast.ops import native

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it for deterministic results

if INTERPRETED:
    import interpreter_bf16

    interpreter_bf16.repair()

collect_ignore = [] if KERNELS == "cuda" else ["test_cuda.py"]
collect_ignore += [] if KERNELS == "cpu" else ["test_packed_linear.py", "test_packed_tiles.py"]
if KERNELS != "triton":
    only_triton = ("attention_tiles", "gather", "linear_gelu", "rows", "sum_by_index")
    collect_ignore += [f"test_{name}.py" for name in only_triton]
    collect_ignore += [f"test_{name}.py" for name in WITHOUT_CUDA_KERNEL]
    if native.UNAVAILABLE_REASON is not None:
        collect_ignore_glob = ["test_*.py"]


def pytest_generate_tests(metafunc):
    if KERNELS == "cpu" and not metafunc.definition.get_closest_marker("one_instruction_set"):
        metafunc.parametrize("instruction_set", native.instruction_sets(), indirect=True)


@pytest.fixture(autouse=True)
def instruction_set(request):
    """Run tests of the native library with each instruction set that the CPU supports."""
    if not hasattr(request, "param"):
        yield
        return
    in_use = native.instruction_set()
    native.use_instruction_set(request.param)
    yield
    native.use_instruction_set(in_use)


@pytest.fixture(autouse=True)
def _shuffled(request, monkeypatch):
    """Seed the emulated GPU's thread order by the test's name: different in each test, and reproducible."""
    monkeypatch.setenv("BERTFAST_EMULATION_SEED", str(zlib.crc32(request.node.nodeid.encode()) % 1000))


@pytest.fixture(autouse=True)
def _poisoned(unwritten_memory_is_nan):
    pass
