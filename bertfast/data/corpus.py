"""Text files as streams of documents; a document is a list of paragraphs, each one line.

`.txt` holds one paragraph a line with a blank line between documents; `.jsonl` one document a line, in a field whose
lines are paragraphs; both also compressed (`.gz`, `.xz`, `.zst`). `.parquet` holds one document a row, like a field.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

COMPRESSIONS = ("", ".gz", ".xz", ".zst")
SUFFIXES = (*(f"{form}{compression}" for form in (".txt", ".jsonl") for compression in COMPRESSIONS), ".parquet")
LONGEST_DOCUMENT = 1_000_000  # characters; a longer text goes on as another document, so that memory stays bounded


def find_files(inputs: Iterable[Path | str]) -> list[Path]:
    """The corpus files among `inputs`, files and folders (searched to any depth), in a fixed order.

    Raises FileNotFoundError for what is not there and ValueError for what is no text.
    """
    files = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
            if not found:
                raise ValueError(f"the folder {path} holds no text: looked for {', '.join(SUFFIXES)}")
            files += found
        elif not path.exists():
            raise FileNotFoundError(f"there is no text at {path}")
        elif not path.name.endswith(SUFFIXES):
            raise ValueError(f"{path} is of an unknown kind; known are {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    return list(dict.fromkeys(file.resolve() for file in files))


def read_documents(
    path: Path, text_column: str = "text", progress: Callable[[int], None] = lambda position: None
) -> Iterator[list[str]]:
    """Stream the documents of one corpus file, each a list of paragraphs that are not empty.

    `text_column` is the field of `.jsonl` and `.parquet` that holds the text. `progress` is called at each document
    with the bytes of the file read so far. Raises ValueError, naming file and line, at what cannot be read.
    """
    if path.suffix == ".parquet":
        documents = _rows(path, text_column, progress)
    elif ".jsonl" in path.suffixes[-2:]:
        documents = _records(path, text_column, progress)
    else:
        documents = _paragraph_lines(path, progress)
    empty = True
    for document in documents:
        paragraphs = [stripped for line in document if (stripped := line.strip())]
        if paragraphs:
            empty = False
            yield paragraphs
    if empty:
        raise ValueError(f"{path} holds no text")


def held_out(paragraphs: list[str], percentage: float) -> bool:
    """Whether a document is for validation: decided by its text alone, so equal documents stay together."""
    digest = hashlib.blake2b("\n".join(paragraphs).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < percentage / 100 * 2**64


def read_lines(path: Path, progress: Callable[[int], None] = lambda position: None) -> Iterator[tuple[int, str]]:
    """Number, from 1 on, and text of each line of a text file, compressed or not, its end included.

    `progress` is called at each line with the bytes of the file read so far. Raises ValueError, naming file and line,
    at what cannot be read.
    """
    number = 0
    with path.open("rb") as raw, _decompressed(path, raw) as stream:
        try:
            for number, line in enumerate(stream, 1):
                progress(raw.tell())
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02x} at column {error.start + 1}"
            raise ValueError(f"{path}, line {number}: not UTF-8 ({byte}); convert the file to UTF-8") from None
        except Exception as error:  # every compression has its own kinds
            raise ValueError(f"{path}: cannot be read beyond line {number} ({error})") from error


def _paragraph_lines(path: Path, progress: Callable[[int], None]) -> Iterator[list[str]]:
    document, characters = [], 0
    for _, line in read_lines(path, progress):
        if not line.strip() or characters > LONGEST_DOCUMENT:
            yield document
            document, characters = [], 0
        document.append(line)
        characters += len(line)
    yield document


def json_object(path: Path, number: int, line: str, example: str) -> dict:
    """The object in a line of a .jsonl file; ValueError, naming file and line, where it is none like `example`."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}, line {number}: not an object like {example}")
    return value


def _records(path: Path, text_column: str, progress: Callable[[int], None]) -> Iterator[list[str]]:
    for number, line in read_lines(path, progress):
        if not line.strip():
            continue
        record = json_object(path, number, line, f'{{"{text_column}": "…"}}')
        text = record.get(text_column)
        if not isinstance(text, str):
            fields = ", ".join(record) or "none"
            raise ValueError(f"{path}, line {number}: no field {text_column!r} with a text (fields here: {fields})")
        if re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{path}, line {number}: half a surrogate pair in {text_column!r}, which is no character")
        yield text.splitlines()


def _rows(path: Path, text_column: str, progress: Callable[[int], None]) -> Iterator[list[str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f'{path}: reading Parquet needs pyarrow; run pip install "bertfast[parquet]"') from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged or not Parquet ({error})") from None
    if text_column not in file.schema_arrow.names:
        raise ValueError(f"{path}: no column {text_column!r} (columns here: {', '.join(file.schema_arrow.names)})")
    row = 0
    for batch in file.iter_batches(batch_size=1000, columns=[text_column]):
        for text in batch.column(0).to_pylist():
            row += 1
            if not isinstance(text, str):
                raise ValueError(f"{path}, row {row}: column {text_column!r} holds {text!r} where a text is wanted")
            progress(path.stat().st_size * row // file.metadata.num_rows)
            yield text.splitlines()


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(raw)
    if path.suffix == ".xz":
        return lzma.open(raw)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstandardFrames(path, raw))
    return raw


class _ZstandardFrames(io.RawIOBase):
    """What Zstandard frames hold; unlike the library's own reader it notices that the last one is cut off."""

    def __init__(self, path: Path, raw: BinaryIO):
        try:
            import zstandard
        except ImportError:
            raise ImportError(f'{path}: reading .zst needs zstandard; run pip install "bertfast[zstd]"') from None
        self.new_frame = zstandard.ZstdDecompressor().decompressobj
        self.raw, self.frame, self.content = raw, None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self.content:
            compressed = (self.frame and self.frame.unused_data) or self.raw.read(2**14)
            if not compressed:
                if self.frame and not self.frame.eof:
                    raise EOFError("the file is cut off")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = self.new_frame()
            self.content = self.frame.decompress(compressed)
        count = min(len(buffer), len(self.content))
        buffer[:count], self.content = self.content[:count], self.content[count:]
        return count
