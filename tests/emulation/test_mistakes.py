"""Typical mistakes in Hopper kernels, each planted in a correct kernel and detected by the emulation."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from guard_page import guarded

pytestmark = pytest.mark.slow

M, N, K = 100, 200, 264

MESSAGES = {  # None: the result is wrong
    "swizzle_of_descriptor": None,
    "swizzle_of_load": None,
    "parity": "while a TMA load to it is in flight",
    "no_wait_for_load": "while a TMA load to it is in flight",
    "one_warp_waits_for_load": "while a TMA load to it is in flight",
    "no_wait_for_empty_stage": "TMA load|more arrivals",
    "no_arrival": r"deadlock(.|\n)*wait for the mbarrier at shared",
    "too_few_bytes": "TMA load|more arrivals|deadlock",
    "no_wgmma_wait": "without waiting for a wgmma|in flight",
    "no_commit": "in flight",
    "no_wgmma_fence": "without fence_wgmma",
    "release_before_wait": "in flight",
    "late_wait": "in flight",
    "no_fence_init": "without fence_init",
    "tile_at_512_bytes": "must start at a multiple of 8 x 128 bytes",
    "wrong_accumulator": None,
    "too_many_registers": "setmaxnreg asks for",
    "write_past_shared_memory": "past the launch's shared memory",
    "write_far_past_shared_memory": r"accesses shared\+\d+, out of bounds",
    "write_past_result": "accesses no memory, out of bounds",
    "no_fence_proxy": "written without fence_proxy",
    "barrier_thread_count_too_high": "deadlock(.|\n)*named barrier 1",
    "barrier_overwritten": "was overwritten",
}


def bfloat16(x: torch.Tensor) -> np.ndarray:
    return x.bfloat16().view(torch.uint16).numpy()


def error(mistakes, mistake: str) -> float:
    """Return the largest error of the matmul."""
    a, b = (torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).bfloat16() for rows in (M, N))
    c = guarded(torch.zeros(M, N))
    mistakes.matmul_with(getattr(mistakes.Mistake, mistake), bfloat16(a), bfloat16(b), c.data_ptr())
    return float((c.double() - a.double() @ b.double().T).abs().max())


def test_all_are_tested(mistakes):
    assert set(MESSAGES) | {"none"} == set(mistakes.Mistake.__members__)


@pytest.mark.usefixtures("seed")
def test_without_a_mistake_the_matmul_is_correct(mistakes):
    assert error(mistakes, "none") < 1e-3


@pytest.mark.parametrize("mistake", MESSAGES)
def test_a_mistake_is_detected(mistakes, mistake):
    message = MESSAGES[mistake]
    if message is None:
        assert not error(mistakes, mistake) < 1e-3
        return
    with pytest.raises(RuntimeError, match=message):
        error(mistakes, mistake)


def test_the_error_names_the_location(mistakes):
    with pytest.raises(RuntimeError, match=r"^block \d+, thread \d+: "):
        error(mistakes, "no_wgmma_fence")
