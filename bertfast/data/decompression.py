"""Compressed streams, recognised by their first bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from bertfast.runtime.extras import install_command

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BLOCK = 2**16  # bytes decompressed at a time


def decompressed(raw: io.BufferedReader) -> io.BufferedReader:
    """Return a stream of the content of a compressed one; one that is not compressed is returned itself."""
    start = raw.peek()
    for magic, decompressor in _DECOMPRESSORS.items():
        if start.startswith(magic):
            return io.BufferedReader(cast(io.RawIOBase, decompressor(raw)), _BLOCK)
    return raw


class _ZstandardFrames(io.RawIOBase):
    """The content of Zstandard frames; unlike the library's own reader, it detects a truncated last frame."""

    def __init__(self, raw: io.BufferedReader):
        try:
            import zstandard
        except ImportError:
            raise ImportError(f"reading Zstandard requires zstandard: {install_command('zstd')}") from None
        self.new_frame = zstandard.ZstdDecompressor().decompressobj
        self.raw, self.content = raw, b""
        self.frame: zstandard.ZstdDecompressionObj | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        out = memoryview(buffer)
        while not self.content:
            compressed = (self.frame and self.frame.unused_data) or self.raw.read(2**14)
            if not compressed:
                if self.frame and not self.frame.eof:
                    raise EOFError("the file is truncated")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = self.new_frame()
            self.content = self.frame.decompress(compressed)
        count = min(len(out), len(self.content))
        out[:count], self.content = self.content[:count], self.content[count:]
        return count


_DECOMPRESSORS: dict[bytes, Callable[[io.BufferedReader], io.IOBase]] = {  # by the first bytes of a file
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"BZh": bz2.BZ2File,
    b"\x28\xb5\x2f\xfd": _ZstandardFrames,
}
