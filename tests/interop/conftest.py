"""Fixtures of the tests of patched models."""

import pytest

from bertfast.encoder import kernel_support


@pytest.fixture
def small_batches_are_packed(monkeypatch):
    """Run batches of any size packed, also without the native library and with heads of any size."""
    monkeypatch.setattr(kernel_support, "MIN_SLOTS", 0)
    monkeypatch.setattr(kernel_support, "MIN_COLUMNS", 0)
    monkeypatch.setattr(kernel_support, "HEAD_DIMENSIONS", range(1, 129))
