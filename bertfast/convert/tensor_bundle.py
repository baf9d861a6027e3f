"""TensorFlow's checkpoints, read without TensorFlow: `PREFIX.index` and `PREFIX.data-00000-of-00001`.

The index is a sorted table as LevelDB writes it: blocks of entries whose keys share a prefix with the one before, and a
footer that says where the block of blocks is. Its values are protocol buffers that say where each tensor lies
(tensorflow/core/protobuf/tensor_bundle.proto, and leveldb/doc/table_format.md).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

_FOOTER, _MAGIC = 48, 0xDB4775248B80FB57
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}  # of types.proto


def read_tensors(prefix: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint by name.

    Raises FileNotFoundError if one of its files is missing; ValueError if one is damaged, or holds what is no array of
    numbers.
    """
    index = Path(f"{prefix}.index")
    if not index.is_file():
        raise FileNotFoundError(
            f"there is no {index}: name a TensorFlow checkpoint without its ending, as bert_model.ckpt"
        )
    try:
        entries = {key.decode(): _fields(value) for key, value in _table(index.read_bytes())}
    except (IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{index} is damaged, or no index of a TensorFlow checkpoint: {error}") from error
    shards = _first(entries.pop("", {}), 1, 1)
    data = []
    for number in range(shards):
        file = Path(f"{prefix}.data-{number:05}-of-{shards:05}")
        if not file.is_file():
            raise FileNotFoundError(f"{index} also wants {file.name}, which is not beside it")
        data.append(np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8))
    return {name: _tensor(name, entry, data) for name, entry in entries.items()}


def _tensor(name: str, entry: dict[int, list], data: list[np.ndarray]) -> np.ndarray:
    code = _first(entry, 1, 0)
    if code not in _DTYPES or 7 in entry:
        raise ValueError(f"{name} is not a whole array of numbers (type {code}), which weights are")
    shape = [_first(_fields(dimension), 1, 0) for dimension in _fields(_first(entry, 2, b"")).get(2, [])]
    start, size = _first(entry, 4, 0), _first(entry, 5, 0)
    held = data[_first(entry, 3, 0)][start : start + size]
    if len(held) != size or size != prod(shape) * np.dtype(_DTYPES[code]).itemsize:
        raise ValueError(
            f"{name} wants {size} bytes for shape {shape}, and the data file gives {len(held)}: it is damaged"
        )
    return held.view(_DTYPES[code]).reshape(shape)


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The entries of a sorted table, in order."""
    footer = data[-_FOOTER:]
    if len(footer) < _FOOTER or struct.unpack("<Q", footer[-8:])[0] != _MAGIC:
        raise IndexError("its footer is another")
    _, place = _varint(footer, 0)  # where the block of other data is, which no checkpoint has
    _, place = _varint(footer, place)
    for _, handle in _block(data, *_two_varints(footer, place)):
        yield from _block(data, *_two_varints(handle, 0))


def _block(data: bytes, start: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    block = data[start : start + size]
    if data[start + size]:
        raise IndexError("its blocks are compressed, as TensorFlow does not write them")
    restarts = struct.unpack("<I", block[-4:])[0]
    place, end, key = 0, len(block) - 4 * (restarts + 1), b""
    while place < end:
        shared, place = _varint(block, place)
        own, place = _varint(block, place)
        length, place = _varint(block, place)
        key = key[:shared] + block[place : place + own]
        yield key, block[place + own : place + own + length]
        place += own + length


def _fields(message: bytes) -> dict[int, list]:
    """The fields of a protocol buffer by number: integers, and bytes for what has a length."""
    fields: dict[int, list] = {}
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, place = _varint(message, place)
        elif kind == 2:
            length, place = _varint(message, place)
            value, place = message[place : place + length], place + length
        else:
            width = {1: 8, 5: 4}[kind]
            value, place = message[place : place + width], place + width
        fields.setdefault(number, []).append(value)
    return fields


def _first(fields: dict[int, list], number: int, default):
    return fields.get(number, [default])[0]


def _two_varints(data: bytes, place: int) -> tuple[int, int]:
    first, place = _varint(data, place)
    return first, _varint(data, place)[0]


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """An integer, seven bits a byte, the lowest first; and the place behind it."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
