"""Ctrl-C and SIGTERM ask a run to stop at its next whole step."""

from __future__ import annotations

import signal
import threading


class RunStopped(Exception):
    """A run ended before its time; its message says what is kept and how to go on."""


class Interrupt:
    """While it is entered, the first of either signal sets `requested`; a second one acts as it always does."""

    def __enter__(self) -> Interrupt:
        self.requested = False
        # Python delivers signals to its main thread alone; a run in another leaves them be.
        signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._request) for number in signals}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number, frame) -> None:
        self.requested = True
        self.__exit__()
