"""The kernels, run, each against the definition. Which ones depends on the process, and `make test` has one of each.

pytest tests/kernels                        the compiled library's; on a machine with a GPU, Triton's
TRITON_INTERPRET=1 pytest tests/kernels     Triton's, on a CPU, in its interpreter
BERTFAST_TESTED=cuda pytest tests/kernels   those in CUDA C++: on a GPU, or on a CPU with a library that emulates them
"""

import os
import zlib

import pytest
from helpers import INTERPRETED, KERNELS

from bertfast.ops import native

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else the library refuses to be deterministic

if INTERPRETED:
    import interpreter_bf16

    interpreter_bf16.repair()

collect_ignore = [] if KERNELS == "cuda" else ["test_cuda.py"]
if KERNELS != "triton":
    only_triton = ("attention_tiles", "gather", "linear_gelu", "sum_by_index")
    collect_ignore += [f"test_{name}.py" for name in only_triton]
    if KERNELS == "cuda":
        collect_ignore.append("test_embed.py")
    if native.ABSENT is not None:
        collect_ignore_glob = ["test_*.py"]


def pytest_generate_tests(metafunc):
    if KERNELS == "cpu" and not metafunc.definition.get_closest_marker("one_instruction_set"):
        metafunc.parametrize("instruction_set", native.instruction_sets(), indirect=True)


@pytest.fixture(autouse=True)
def instruction_set(request):
    """Tests of the library run with each instruction set that it can use here."""
    if not hasattr(request, "param"):
        yield
        return
    in_use = native.instruction_set()
    native.use_instruction_set(request.param)
    yield
    native.use_instruction_set(in_use)


@pytest.fixture(autouse=True)
def _shuffled(request, monkeypatch):
    """An emulated GPU runs its threads in another order in each test, and in the same one the next time."""
    monkeypatch.setenv("BERTFAST_EMULATION_SEED", str(zlib.crc32(request.node.nodeid.encode()) % 1000))


@pytest.fixture(autouse=True)
def _poisoned(unwritten_memory_is_nan):
    pass
