"""What launchers compute on the host: properties of a GPU, and how many programs a grid has."""

from functools import cache

import torch


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; a CPU, where kernels are interpreted, stands in for Hopper."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up. `triton.cdiv`, made for kernels too, takes a microsecond on the host."""
    return -(-a // b)
