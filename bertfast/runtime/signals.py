"""Ctrl-C and SIGTERM ask a run to stop at its next whole step."""

from __future__ import annotations

import signal
import threading


class RunStopped(Exception):
    """A run ended before its time; its message says what is kept and how to go on, `status` is the program's."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


class Interrupt:
    """While it is entered, the first of either signal sets `requested`; a second one acts as it always does.

    Attributes:
        requested: Whether one has come.
        status: What a program that a signal has ended returns: 128 and the signal's number; 143 after SIGTERM.
    """

    def __enter__(self) -> Interrupt:
        self.requested, self.status = False, 128 + signal.SIGTERM
        # Python delivers signals to its main thread alone; a run in another leaves them be.
        signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._request) for number in signals}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number, frame) -> None:
        self.requested, self.status = True, 128 + number
        self.__exit__()
