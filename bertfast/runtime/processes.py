"""The processes that `torchrun` starts, by its environment variables; without it there is one."""

from __future__ import annotations

import os


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Return whether this process is alone, or the one of rank 0."""
    return os.environ.get("RANK", "0") == "0"


def refuse_several(what: str) -> None:
    """Raise ValueError if there are several processes, which `what` cannot use."""
    if (processes := world_size()) > 1:
        raise ValueError(f"{what} runs in one process, not in {processes}: start it without torchrun")
