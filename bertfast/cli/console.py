"""Standard output and standard error of a command: UTF-8 in every locale, log messages, and readers that go away."""

from __future__ import annotations

import codecs
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from bertfast.runtime.display import SHOW_ERRORS


def say(message: str) -> None:
    """Print a message to standard error, if anybody can read it."""
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def use_utf8() -> None:
    """Start the program again in Python's UTF-8 mode if the locale is C and Python was told not to switch it on.

    Python does so itself in the C locale (PEP 540), where ASCII says nothing about arguments and the names of files.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name == "ascii" and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"  # for its worker processes
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


@contextmanager
def console() -> Iterator[None]:
    """Context in which a command prints and logs.

    Log messages of bertfast go to standard error. At the end, what was printed has been written.

    Raises:
        BrokenPipeError: The reader of standard output has gone, as in `bertfast … | head -1`.
        OSError: Standard output cannot be written, for example to a full disk.
    """
    for stream in ("stdout", "stderr"):
        _make_writable(stream)
    handler = _StandardError()
    handler.setFormatter(_Format())
    logger = logging.getLogger("bertfast")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        try:
            sys.stdout.flush()
        except OSError:
            _discard(sys.stdout)
            raise


def require_standard_output() -> None:
    """Raise ValueError if standard output was closed when the context began, so that results would be lost."""
    if getattr(sys.stdout, "name", None) == os.devnull:
        raise ValueError("standard output is closed, and the results go there: redirect it to a file (> FILE)")


class _StandardError(logging.Handler):
    """Write log messages to what is standard error at the time, which tests and progress bars replace."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(sys.stderr):  # clears progress bars, and draws them again below the message
            say(self.format(record))


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return f"warning: {message}" if record.levelno >= logging.WARNING else message


def _make_writable(name: str) -> None:
    """Make a standard stream accept every character, and open the null device in place of a closed one."""
    stream = getattr(sys, name)
    if stream is None:
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the end
    elif isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors=SHOW_ERRORS)


def _discard(stream: TextIO) -> None:
    """Send what a stream still holds to the null device, so that Python does not fail to write it at its end."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
