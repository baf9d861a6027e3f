"""Every test here runs with unwritten memory poisoned."""

import pytest


@pytest.fixture(autouse=True)
def _poisoned(unwritten_memory_is_nan):
    pass
