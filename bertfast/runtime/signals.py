"""Ctrl-C and SIGTERM stop a run after the current step, and other commands at once."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn


class RunStopped(Exception):
    """A run stopped before its end.

    Args:
        message: What was kept, and how to continue.
        status: Exit status of the program.
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


@contextmanager
def continued_by(program: str) -> Iterator[None]:
    """Context of a program that resumes its runs by itself: of a run that a signal stops, the message says so.

    Args:
        program: What the same command continues, such as "sweep".
    """
    try:
        yield
    except RunStopped as stopped:
        if stopped.status == 1:  # it has diverged: the same command would not help
            raise
        step = re.split("[:;]", str(stopped))[0]
        raise RunStopped(f"{step}: run the same command again to continue the {program}", stopped.status) from None


def exit_on_sigterm() -> AbstractContextManager[None]:
    """Context in which SIGTERM raises SystemExit, so that locks and temporary files are removed; a second one kills."""
    return _handled(signal.SIGTERM, _exit)


def interrupts_ignored() -> AbstractContextManager[None]:
    """Context in which Ctrl-C is ignored, also by processes that are started in it: their parent ends them."""
    return _handled(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """Context in which a signal has another handler."""
    if threading.current_thread() is not threading.main_thread():  # no other thread may handle signals
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before or signal.SIG_DFL)  # None: not installed by Python


def _exit(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(128 + number)


class Interrupt:
    """Context in which the first Ctrl-C or SIGTERM sets `requested`; a second one has its usual effect.

    Args:
        sigterm_status: Exit status of a program ended by SIGTERM.

    Attributes:
        requested: Whether a signal has arrived.
        status: Exit status of a program ended by the signal, 130 for Ctrl-C; without a signal, that of SIGTERM.
    """

    def __init__(self, sigterm_status: int = 128 + signal.SIGTERM) -> None:
        self.requested, self.status = False, sigterm_status
        self._handlers: dict[signal.Signals, Any] = {}  # that were installed before

    def __enter__(self) -> Interrupt:
        # Python delivers signals to the main thread only; a run in another thread leaves them alone.
        if threading.current_thread() is threading.main_thread():
            self._handlers = {
                number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        if number != signal.SIGTERM:
            self.status = 128 + number
        self.__exit__()
