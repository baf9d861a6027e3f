"""Host-side helpers for launches: properties of a GPU, and grid sizes."""

from functools import cache

import torch


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU; (9, 0) for a CPU, where kernels are interpreted."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@cache
def sm_count(device: torch.device) -> int:
    """Return the number of SMs of a GPU; 1 for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up. `triton.cdiv`, which also serves kernels, takes a microsecond on the host."""
    return -(-a // b)
