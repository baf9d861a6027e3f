"""More CUDA C++ kernels whose time is predicted: the masked-LM head and its loss, as in `training_cases.py`."""

from __future__ import annotations

from collections.abc import Iterator

from bench.sass_model.cases import HALF, SINGLE, TOKENS, ceil_div
from bench.sass_model.constants import H200
from bench.sass_model.control_flow import Choice
from bench.sass_model.cuda_cases import ROW_BLOCKS_PER_SM, CudaCase
from bench.sass_model.kernel_time import Work
from bench.sass_model.training_cases import CHUNK_ROWS, HIDDEN, LOGITS, LOSS, VOCAB

LOSS_WARPS, GRADIENT_WARPS, GRADIENT_COLUMNS = 8, 16, 256  # csrc/cuda/cross_entropy.cu
_LOADED, _UNROLLED = 8, 4  # elements that a thread loads at once; rows of an iteration of the gradient's loop


def cuda_training_cases() -> Iterator[CudaCase]:
    """Yield all cases."""
    yield from _gelu_layer_norm()
    yield _loss()
    yield _gradient()


def _gelu_layer_norm() -> Iterator[CudaCase]:
    warps, row = ceil_div(HIDDEN, 32 * _LOADED), HIDDEN * HALF
    for name, reads, writes in (
        ("forward", row, row + 2 * SINGLE),
        ("backward", 2 * row + 2 * SINGLE, row),
    ):
        blocks = ROW_BLOCKS_PER_SM[name] * H200.sms
        choice = Choice({"memory": ceil_div(TOKENS, blocks), "other": 0}, frozenset({"load", "store"}))
        work = Work(blocks, choice, 0, reads * TOKENS, writes * TOKENS, reads * TOKENS)
        kernel = f"gelu_layer_norm_{name}_kernel<BFloat16, BFloat16, RowShape<{warps}, 1, true>>"
        yield CudaCase(kernel, f"{HIDDEN} columns", warps, 0, work)


def _loss() -> CudaCase:
    """Return the case of the losses of a chunk of logits; the biases, which all blocks read, come from L2."""
    trips = {"memory": ceil_div(VOCAB, LOSS_WARPS * 32 * _LOADED), "other": 0}
    logits = CHUNK_ROWS * LOGITS * HALF
    choice = Choice(trips, frozenset({"load", "store"}))
    work = Work(CHUNK_ROWS, choice, 0, logits, 0, logits + CHUNK_ROWS * LOGITS * SINGLE)
    return CudaCase("loss_kernel<BFloat16, true>", LOSS, LOSS_WARPS, 0, work)


def _gradient() -> CudaCase:
    """Return the case of the gradients of these logits, which replace them."""
    trips = {"memory": ceil_div(CHUNK_ROWS, GRADIENT_WARPS * _UNROLLED), "other": GRADIENT_WARPS}
    logits = CHUNK_ROWS * LOGITS * HALF
    choice = Choice(trips, frozenset({"load", "store"}))
    work = Work(ceil_div(VOCAB, GRADIENT_COLUMNS), choice, 0, logits, logits, logits)
    return CudaCase("gradient_kernel<BFloat16, true>", LOSS, GRADIENT_WARPS, 0, work)
