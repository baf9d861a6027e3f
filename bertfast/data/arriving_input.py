"""A stream that knows whether its next line has arrived, so that a program need not wait for a writer that pauses."""

from __future__ import annotations

import io
import select
import time

_BLOCK = 2**16  # bytes received at a time; more than the buffer of the stream, which is therefore empty afterwards


class ArrivingInput:
    """The bytes of a stream, with the methods of `io.BufferedReader` that read lines.

    Args:
        stream: Standard input, a pipe or a terminal; of others, such as files, all lines count as arrived.
    """

    def __init__(self, stream: io.BufferedReader):
        self._stream = stream
        self._received = bytearray()
        self._searched = 0  # bytes of them that hold no line feed
        self._ended = self._in_blocks = False

    def peek(self) -> bytes:
        """Return what has been received and not read; if that is nothing, receive a block first."""
        if not self._received:
            self._receive()
        return bytes(self._received)

    def readline(self, size: int) -> bytes:
        """Read a line with its end, or the first `size` bytes of a longer one; empty: the stream has ended."""
        while (end := self._received.find(b"\n", self._searched, size)) < 0:
            self._searched = len(self._received)
            if self._searched >= size or self._ended:
                break
            self._receive()
        return self._take(size if end < 0 else end + 1)

    def read1(self, size: int) -> bytes:
        """Read what has been received, or else a block, of at most `size` bytes; empty: the stream has ended.

        A caller that reads blocks splits them into lines itself: from now on, `line_arrives` returns True at once.
        """
        self._in_blocks = True
        if not self._received:
            self._receive()
        return self._take(size)

    def line_arrives(self, until: float) -> bool:
        """Wait until a time of `time.monotonic` for a whole line, or the end; return whether it has arrived."""
        while not (self._ended or self._in_blocks) and self._received.find(b"\n", self._searched) < 0:
            self._searched = len(self._received)
            if not _is_readable(self._stream, max(until - time.monotonic(), 0)):
                return False
            self._receive()
        return True

    def _receive(self) -> None:
        block = self._stream.read1(_BLOCK)
        self._received += block
        self._ended = not block

    def _take(self, size: int) -> bytes:
        taken = bytes(self._received[:size])
        del self._received[:size]
        self._searched = 0
        return taken


def _is_readable(stream: io.BufferedReader, seconds: float) -> bool:
    """Wait until a stream can be read without waiting; return whether it can."""
    try:
        return bool(select.select([stream], [], [], seconds)[0])
    except (OSError, ValueError):  # it has no descriptor that can be waited for
        return True
