"""The kernels that a call launches on a GPU and the time of each, by PyTorch's profiler.

An operator launches several kernels, whose times `bench.sass_model` predicts one by one; what times a whole call does
not say which of them took how long, and includes the gaps between them.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

_NAME = 120  # characters of a kernel's name that are kept: PyTorch's have template arguments of several lines


def kernel_times(calls: Sequence[Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Run each call once, and return the kernels by name, in the order in which they first start; see `by_kernel`.

    The result is empty if the driver does not let this user profile.
    """
    # As PyTorch does for its own CUDA graphs: otherwise a process that has captured one can crash before CUDA 12.6.
    os.environ["DISABLE_CUPTI_LAZY_REINIT"], os.environ["TEARDOWN_CUPTI"] = "1", "0"
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for call in calls:
            call()
        torch.cuda.synchronize()
    events = sorted(recorded.events() or [], key=lambda event: event.time_range.start)
    on_gpu = (event for event in events if event.device_type.name == "CUDA")
    return by_kernel(((event.name, 1e-6 * event.time_range.elapsed_us()) for event in on_gpu), len(calls))


def by_kernel(launches: Iterable[tuple[str, float]], calls: int) -> dict[str, dict[str, float]]:
    """Group launches by the short name of the kernel.

    Args:
        launches: The name and the seconds of each.
        calls: In how many calls they were launched.

    Returns:
        "launches" per call, and "median_s" of a launch.
    """
    seconds: dict[str, list[float]] = defaultdict(list)
    for name, elapsed in launches:
        seconds[short_name(name)].append(elapsed)
    return {name: {"launches": len(found) / calls, "median_s": median(found)} for name, found in seconds.items()}


def short_name(kernel: str) -> str:
    """Return the name of a kernel with its template arguments, without return type, namespaces and parameters."""
    name = re.sub(r"^void |\((?:anonymous namespace|int|bool)\)(?:::)?", "", kernel).partition("(")[0]
    return re.sub(r"\w+::| (?=>)", "", name)[:_NAME]
