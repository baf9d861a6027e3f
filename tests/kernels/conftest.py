"""The Triton kernels, run: on a GPU, or on a CPU in Triton's interpreter (`TRITON_INTERPRET=1 pytest tests/kernels`).

A process either interprets or compiles, so without either these tests are left out, and `make test` runs them apart.
"""

import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else the library refuses to be deterministic

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter_bf16

    interpreter_bf16.repair()
elif not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_addoption(parser):
    parser.addoption("--part", default="1/1", help="i/n: every n-th test from the i-th on, for in_parts.py")


def pytest_collection_modifyitems(config, items):
    part, parts = map(int, config.getoption("part", "1/1").split("/"))
    items[:] = items[part - 1 :: parts]


@pytest.fixture(autouse=True)
def _poisoned(unwritten_memory_is_nan):
    pass
