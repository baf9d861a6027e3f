"""Read text files as UTF-8 lines: compressed or not, independently of the suffix, and with any line ends.

Errors name the file, the line and the remedy.
"""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, cast

from bertfast.data.arriving_input import ArrivingInput
from bertfast.data.decompression import decompressed
from bertfast.runtime.atomic_write import atomic_path

logger = logging.getLogger("bertfast")

STANDARD_INPUT = "standard input"
"""Name of standard input in messages."""
COMPRESSIONS = ("", ".gz", ".xz", ".bz2", ".zst")
_BLOCK = 2**16  # bytes read at a time
_PATIENCE = 0.02  # seconds that a line of standard input waits for others
_MAX_LINE = 2**30  # bytes of a line, which a small archive may hold
_MAX_JSON, _MAX_DATA = 2**28, 2**32  # characters of a configuration or tokenizer, and of data, that are read at once
_SPACE, _DECODER = re.compile(r"[ \t\n\r]*"), json.JSONDecoder()
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
UNREADABLE = {  # first bytes of a file: what it is and what to do
    LFS_POINTER: "a Git LFS pointer, not the file itself; run git lfs pull",
    b"PAR1": "a Parquet file; give it the suffix .parquet",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\xff\xfe": "UTF-16; convert the file to UTF-8",
    b"\xfe\xff": "UTF-16; convert the file to UTF-8",
}
_Source = io.BufferedReader | ArrivingInput  # of lines


def require_file(path: Path | str, flag: str) -> None:
    """Raise FileNotFoundError, naming the flag, if there is no file to read; a pipe is a file."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{flag} {path}: no such file")
    if Path(path).is_dir():
        raise FileNotFoundError(f"{flag} {path}: is a folder, not a file")


def read_lines(
    path: Path,
    progress: Callable[[int], None] = lambda position: None,
    *,
    universal: bool = False,
    longest: int = _MAX_LINE,
) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line including its end) of a text file.

    Lines end with a line feed, or with a carriage return and a line feed. A carriage return alone ends a line as well
    in a file whose first block has no line feed; elsewhere it may be part of a text. A compressed file is recognised by
    its first bytes.

    Args:
        path: A text file, compressed or not.
        progress: Called with the number of bytes of the file read so far.
        universal: Whether a carriage return alone always ends a line: for formats whose lines cannot contain one.
        longest: Maximum bytes of a line, of which no more are read.

    Raises:
        ValueError: The file is not text, a line is not UTF-8 or too long, or the compressed file is damaged; the
            message names file and line.
    """
    with path.open("rb") as raw:
        seekable = raw.seekable()  # a pipe has no position
        for numbered in _decoded_lines(str(path), decompressed(raw), universal, longest):
            progress(raw.tell() if seekable else 0)
            yield numbered


def require_rereadable(path: Path) -> None:
    """Raise ValueError if a file that is read more than once, for example to find its format first, is a pipe."""
    if path.is_fifo():
        raise ValueError(f"{path} is a pipe, which can be read only once: write its text to a file, and give that")


def standard_input() -> io.BufferedReader:
    """Return standard input as bytes; ValueError if it is closed. At a terminal, say how to end the input."""
    if sys.stdin is None or sys.stdin.closed:
        raise ValueError(f"{STANDARD_INPUT} is closed: pipe text into the command, or give a file")
    if sys.stdin.isatty():
        logger.info("reading lines from the keyboard; Ctrl-D ends the input")
    return cast(io.BufferedReader, sys.stdin.buffer)


def read_standard_input() -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line including its end) of standard input, which is read as `read_lines` reads a file.

    Each line is yielded as soon as it has arrived. The locale does not matter: text is UTF-8.

    Raises:
        ValueError: Standard input is closed, is not text, or a line is not UTF-8; the message names the line.
    """
    return _decoded_lines(STANDARD_INPUT, decompressed(standard_input()))


def read_arriving_lines(most: int, least: int = 1) -> Iterator[list[tuple[int, str]]]:
    """Yield the lines of standard input, as `read_standard_input`, in groups of those that have arrived.

    A line waits for others no longer than an instant, unless the input is compressed or has carriage returns as line
    ends: then all groups but the last are full.

    Args:
        most: Lines of a full group.
        least: Lines of the first group, or all of them if there are fewer.

    Raises:
        ValueError: See `read_standard_input`.
    """
    raw = standard_input()
    stream = decompressed(raw)
    arriving = ArrivingInput(raw) if stream is raw else None
    group: list[tuple[int, str]] = []
    until = 0.0
    for line in _decoded_lines(STANDARD_INPUT, arriving or stream):
        until = until if group else time.monotonic() + _PATIENCE
        group.append(line)
        if len(group) < least or (len(group) < most and (arriving is None or arriving.line_arrives(until))):
            continue
        yield group
        group, least = [], 1
    if group:
        yield group


def is_standard_input(input_file: str | None) -> bool:
    """Return whether an --input-file is standard input: "-", or none."""
    return input_file is None or input_file == "-"


def require_input(input_file: str | None) -> None:
    """Raise FileNotFoundError if an --input-file is neither standard input nor a file."""
    if input_file is not None and not is_standard_input(input_file):
        require_file(input_file, "--input-file")


def is_stream(name: Path | str) -> bool:
    """Return whether a text can be read only once: "-", which is standard input, or a pipe."""
    return name == "-" or Path(name).is_fifo()


def copy_stream(name: str, path: Path) -> None:
    """Copy what can be read only once to a file, in bytes."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        if name == "-":
            shutil.copyfileobj(standard_input(), file)
        else:
            with open(name, "rb") as pipe:
                shutil.copyfileobj(pipe, file)


@contextmanager
def named_stream(name: str, *copies: Path) -> Iterator[None]:
    """Have errors in a copy of what can be read only once, or in its temporary file, name that."""
    shown = STANDARD_INPUT if name == "-" else name
    try:
        yield
    except ValueError as error:
        message = str(error)
        for path in [path for copy in copies for path in (copy.with_name(f".{copy.name}"), copy)]:
            message = message.replace(str(path), shown)
        if type(error) is not ValueError or message == str(error):
            raise
        raise ValueError(message) from error


def json_object(where: str, text: str, example: str) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        where: File and line or row, for messages.
        text: The line of a .jsonl file or of standard input, or a value of a list.
        example: A valid object, shown in messages.

    Raises:
        ValueError: It is not a JSON object, or a string in it is not Unicode text.
    """
    try:
        value = decode_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg.removesuffix(' at')} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not an object like {example}")
    if "\\u" in text and (problem := unpaired_surrogate(json.dumps(value, ensure_ascii=False))) is not None:
        raise ValueError(f"{where}: {problem}")
    return value


def decode_json(text: str) -> Any:
    """Parse JSON; ValueError if a key of an object is repeated, of which the json module would keep the last value."""
    return json.loads(text, object_pairs_hook=_unique_keys)


def read_json_list(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, JSON text) of the values in a file that holds one list of them, perhaps on a single line.

    Raises:
        ValueError: The file is not UTF-8 text, or not a list in JSON; the message names file and value.
    """
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n")  # values contain no line ends
    start = _after_space(text, 0)
    if not text.startswith("[", start):
        raise ValueError(f"{path}: not a list in JSON, [{{…}}, …]")
    position, number = _after_space(text, start + 1), 0
    goes_on = not text.startswith("]", position)
    while goes_on:
        number += 1
        try:
            _, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, row {number}: not JSON ({error})") from None
        yield number, text[position:end]
        position = _after_space(text, end)
        goes_on = text.startswith(",", position)
        position = _after_space(text, position + goes_on)
    ended = text.startswith("]", position)
    position = _after_space(text, position + ended)
    if not ended or position < len(text):
        problem = "text after the end of the list" if ended else "',' or the ']' at the end of the list is missing"
        where = f"line {text.count(chr(10), 0, position) + 1} column {position - text.rfind(chr(10), 0, position)}"
        raise ValueError(f"{path}, after row {number}: not JSON ({problem}: {where})")


def _after_space(text: str, position: int) -> int:
    """Return the first position from `position` on that holds no white space of JSON."""
    space = _SPACE.match(text, position)
    return position if space is None else space.end()


def unpaired_surrogate(text: str) -> str | None:
    """Return which part of a text is not a character, for messages; None: it is Unicode text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"unpaired surrogate \\u{ord(text[error.start]):04x}, which is not a character"
    return None


def read_text(path: Path, limit: int = _MAX_DATA) -> str:
    """Return the text of a file.

    Args:
        path: A text file, compressed or not.
        limit: Maximum number of characters, as a small archive may hold a text that exhausts memory.

    Raises:
        ValueError: The file is not UTF-8 text, or longer; the message names it.
    """
    pieces, size = [], 0
    for _, line in read_lines(path, longest=4 * limit):  # a character has at most four bytes
        pieces.append(line)
        size += len(line)
        if size > limit:
            raise ValueError(f"{path} has more than {limit:,} characters, too many for a file that is read at once")
    return "".join(pieces)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object, as the configurations of models and tokenizers do.

    Raises:
        ValueError: The file is not UTF-8 text, or is not a whole JSON object; the message names it.
    """
    text = read_text(path, _MAX_JSON)
    if not text.strip():
        raise ValueError(f"{path} is empty: copy or download it again")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is cut off or not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, {{…}}, got {text.strip():.40}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; ValueError if a key is repeated."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is repeated")
    return value


def _decoded_lines(
    name: str, stream: _Source, universal: bool = False, longest: int = _MAX_LINE
) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(_lines(name, stream, universal, longest), 1):
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at column {error.start + 1}"
        raise ValueError(f"{name}, line {number}: not UTF-8 ({byte}); convert the text to UTF-8") from None
    except _NotText:
        raise
    except Exception as error:  # each decompressor raises exceptions of its own
        beyond = f" beyond line {number}" if number else ""
        raise ValueError(f"{name}: cannot be read{beyond} ({error}); copy or download it again") from error


class _NotText(ValueError):
    """A file is not text, as its first bytes or the length of a line show."""


def _lines(name: str, stream: _Source, universal: bool = False, longest: int = _MAX_LINE) -> Iterator[bytes]:
    first = stream.peek()
    for start, what in UNREADABLE.items():
        if first.startswith(start):
            raise _NotText(f"{name} is {what}")
    if b"\0" in first:
        raise _NotText(f"{name} is not a text file: byte {first.index(0)} is 0")
    # A carriage return at the very end may be the first half of a line end of which the rest has not arrived yet.
    carriage_returns = b"\r" in first[:-1] and b"\n" not in first
    if carriage_returns:
        return _lines_of_blocks(name, stream, longest)
    lines = _bounded_lines(name, stream, longest)
    return chain.from_iterable(line.splitlines(keepends=True) for line in lines) if universal else lines


def _bounded_lines(name: str, stream: _Source, longest: int) -> Iterator[bytes]:
    """Yield the lines of a stream; raise `_NotText` once a line has more than `longest` bytes."""
    while line := stream.readline(longest + 1):
        if len(line) > longest:
            raise _too_long(name, longest)
        yield line


def _too_long(name: str, longest: int) -> _NotText:
    return _NotText(f"{name} has a line of more than {longest:,} bytes: it is damaged, or not text; give another file")


def _lines_of_blocks(name: str, stream: _Source, longest: int) -> Iterator[bytes]:
    """Yield the lines of a stream which begins with lines that end with carriage returns: it may have no line feed."""
    pieces: list[bytes] = []  # of a line that goes on in the next block
    while block := stream.read1(_BLOCK):
        if pieces and pieces[-1].endswith(b"\r"):
            rest_of_end = block.startswith(b"\n")  # of the line end of which the last block had the first half
            yield b"".join([*pieces, block[:rest_of_end]])
            block, pieces = block[rest_of_end:], []
        for line in block.splitlines(keepends=True):
            if pieces and pieces[-1].endswith((b"\r", b"\n")):
                yield b"".join(pieces)
                pieces = []
            pieces.append(line)
        if len(pieces) * _BLOCK > longest and sum(map(len, pieces)) > longest:
            raise _too_long(name, longest)
        if pieces and pieces[-1].endswith(b"\n"):  # nothing can follow, so a reader need not wait
            yield b"".join(pieces)
            pieces = []
    if pieces:
        yield b"".join(pieces)
