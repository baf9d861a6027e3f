"""Freed memory is kept for the next batch, and given back when it has grown."""

import subprocess
import sys

import pytest

from bertfast.runtime import malloc

GLIBC = pytest.mark.skipif(not malloc.keep_freed_memory(), reason="the allocator is not glibc's")

# Allocates 2.5 GiB five times, writes to each page, and prints the page faults of the last time. The second time still
# has some: where a small object lies in the gap that aligning a block left, glibc cannot put an aligned block there
# again, and takes fresh pages for it. How many blocks that concerns differs from one process to the next.
REFILLED = """
import resource

import torch

from bertfast.runtime.malloc import keep_freed_memory

keep_freed_memory()
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.empty(64 << 20, dtype=torch.uint8) for _ in range(40)]
    for block in blocks:
        block[::4096] = 1
    del block, blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@GLIBC
def test_no_freed_memory_is_given_back_even_if_it_is_gibibytes():
    ran = subprocess.run([sys.executable, "-c", REFILLED], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 65_536  # a tenth of the pages


@GLIBC
def test_freed_memory_is_given_back_each_time_memory_has_grown_by_a_tenth(monkeypatch):
    # At each check, 64 calls apart: a baseline, growth below and above a tenth, a new baseline, growth again.
    memory = iter([100, 109, 111, 130, 140, 144, 100, 120])
    given_back = []
    monkeypatch.setattr(malloc, "resident_memory", lambda: next(memory))
    monkeypatch.setattr(malloc, "give_freed_memory_back", lambda: given_back.append(reuse.calls))
    reuse = malloc._Reuse()
    for _ in range(8 * 64 + 63):
        reuse()
    assert given_back == [3 * 64, 6 * 64, 8 * 64]
