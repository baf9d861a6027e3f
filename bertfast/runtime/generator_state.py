"""States of the generators from which a device draws random numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def generator_state(device: torch.device) -> Tensor:
    """Return the state of a device's generator, uint8 on the CPU; that of the CPU for a device without its own."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_generator_state(device: torch.device, state: Tensor) -> None:
    """Restore what `generator_state` has returned."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
