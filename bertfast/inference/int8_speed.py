"""Compare the speed of int8 with that of fp32 on CPUs that have no dot products of int8, where it may be slower."""

from __future__ import annotations

import logging
import time
from weakref import WeakSet

import torch
from torch import nn

from bertfast.encoder.packed_linear import PackedLinear
from bertfast.ops.packed_linear import PackedWeight, pack, packed_linear

logger = logging.getLogger("bertfast")

_MAX_SECONDS = 0.1  # after which no further round begins
_ROUNDS = 5  # of which the shortest time counts
_MAX_TOKENS = 512  # more do not change which one is faster
_MAX_OPERATIONS = 5 * 10**7  # multiplications per call: a few milliseconds
_measured: WeakSet[nn.Module] = WeakSet()


def log_int8_speed(model: nn.Module, tokens: int) -> None:
    """Log both times of a linear layer of a quantised model if this CPU has no dot products of int8, once per model.

    It is a warning where int8 is slower. The measurement takes less than 0.2 s. A model that is not quantised has none.

    Args:
        model: The model.
        tokens: Tokens of a batch; of large ones, a part is measured.
    """
    quantised = [module for module in model.modules() if isinstance(module, PackedLinear) and module.is_int8]
    if not quantised or model in _measured or torch.ops.bertfast.has_quad_instruction():
        return
    _measured.add(model)
    linear = min(quantised, key=_weight_size)
    tokens = max(min(tokens, _MAX_TOKENS, _MAX_OPERATIONS // _weight_size(linear)), 1)
    int8, fp32 = seconds_of([linear.packed, pack(linear.weight)], tokens)
    logger.log(
        logging.WARNING if int8 > fp32 else logging.INFO,
        "this CPU has no dot products of int8: %d tokens through a linear layer of %d x %d take %.2f ms in int8 and "
        "%.2f ms in fp32, so that int8 is %s here than fp32",
        *(tokens, linear.out_features, linear.in_features, 1e3 * int8, 1e3 * fp32),
        "slower" if int8 > fp32 else "faster",
    )


def _weight_size(linear: PackedLinear) -> int:
    """Return the number of weights, each a multiplication per token."""
    return linear.in_features * linear.out_features


@torch.no_grad()
def seconds_of(weights: list[PackedWeight], tokens: int) -> list[float]:
    """Return the shortest time of multiplying some tokens by each of the weights, which take turns."""
    x = torch.randn(tokens, weights[0].depth, generator=torch.Generator().manual_seed(0))
    shortest = [float("inf")] * len(weights)
    for weight in weights:
        packed_linear(x, weight)
    started = time.perf_counter()
    for _ in range(_ROUNDS):
        for index, weight in enumerate(weights):
            before = time.perf_counter()
            packed_linear(x, weight)
            shortest[index] = min(shortest[index], time.perf_counter() - before)
        if time.perf_counter() - started > _MAX_SECONDS:
            break
    return shortest
