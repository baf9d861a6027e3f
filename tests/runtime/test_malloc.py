"""Freed memory is kept for the next batch, and given back when it has grown."""

import pytest

from bertfast.runtime import malloc


@pytest.mark.skipif(not malloc.keep_freed_memory(), reason="the allocator is not glibc's")
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
