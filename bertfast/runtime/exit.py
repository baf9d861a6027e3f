"""The end of a process that torchrun started."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from typing import NoReturn

from bertfast.runtime.processes import world_size


def end_process(status: int = 0) -> NoReturn:
    """End this process; a worker of torchrun ends without the shutdown of Python.

    A thread of Gloo can hold the tensors of the last collective a little longer than the collective takes. If it
    releases them while Python shuts down, the whole process aborts, and torchrun reports a finished run as failed
    (PyTorch 2.13, https://github.com/pytorch/pytorch/pull/179291). Freeing the process group would end the threads, but
    caches of DTensor keep the group of a sharded model.

    Args:
        status: Exit status.
    """
    if world_size() == 1:
        sys.exit(status)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):  # its reader has gone, or it is closed
                stream.flush()
    os._exit(status)
