"""`bench/compiled_kernels.py` notices what is wrong with a compiled kernel."""

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import compiled_kernels  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets")


@triton.jit
def attention_like_kernel(x_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + place)
    tl.store(x_ptr + place, tl.dot(x, tl.dot(x, x).to(x.dtype)).to(x.dtype))


def compiled(size: int, warps: int, monkeypatch) -> compiled_kernels.Compiled:
    x = torch.zeros(size, size, dtype=torch.bfloat16)
    case = ("bf16", lambda: attention_like_kernel[(1,)](x, BLOCK=size, num_warps=warps))
    monkeypatch.setattr(compiled_kernels, "cases", lambda: [case])
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        (row,) = pool.submit(compiled_kernels.compile_part, 90, 0, 1).result()
    return row


def test_a_kernel_without_fault_has_none(monkeypatch):
    row = compiled(64, 4, monkeypatch)
    assert row.matrix_unit == "HGMMA"
    assert row.faults() == []


def test_a_spill_is_noticed(monkeypatch):
    row = compiled(128, 1, monkeypatch)
    assert "instructions spill registers" in row.faults()[0]


def test_shared_memory_beyond_the_chip_and_products_off_its_unit_are_noticed(monkeypatch):
    row = compiled(64, 4, monkeypatch)
    assert "more than the chip's 227 KiB" in replace(row, shared_memory=300 << 10).faults()[0]
    assert replace(row, matrix_unit="HMMA").faults() == ["its products run on HMMA"]
    assert replace(row, matrix_unit="").faults() == ["its products run on no matrix unit"]


def test_a_chip_that_it_does_not_know_is_refused():
    ran = subprocess.run(
        [sys.executable, BENCH / "compiled_kernels.py", "--chips", "75"], capture_output=True, text=True
    )
    assert ran.returncode == 2
    assert "invalid choice: 75" in ran.stderr
