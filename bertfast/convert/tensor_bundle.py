"""Read TensorFlow checkpoints, `PREFIX.index` and `PREFIX.data-00000-of-00001`, without TensorFlow.

The index is a sorted table in LevelDB's format (leveldb/doc/table_format.md): blocks of entries with prefix-compressed
keys, and a footer with the position of the block that lists all blocks. Its values are protocol buffers with the
position of each tensor (tensorflow/core/protobuf/tensor_bundle.proto).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TypeVar, cast

import numpy as np

from bertfast.convert.crc32c import masked_crc32c

_FOOTER, _MAGIC = 48, 0xDB4775248B80FB57
Value = TypeVar("Value", int, bytes)
Fields = dict[int, list[int | bytes]]
"""Values of a protocol buffer by field number: integers for varints, bytes for all other wire types."""

# enum DataType of types.proto
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 4: "<u1", 5: "<i2", 6: "<i1", 9: "<i8", 10: "?", 17: "<u2", 19: "<f2"}
# Limits for damaged or malicious files: an index has about 100 bytes per tensor, and names share prefixes.
_MAX_INDEX_BYTES, _MAX_NAME_BYTES = 2**26, 4096
_DAMAGE = (IndexError, KeyError, OverflowError, TypeError, UnicodeDecodeError, struct.error)


def read_tensors(prefix: str | Path) -> dict[str, np.ndarray]:
    """Return all tensors of a checkpoint by name, as memory-mapped arrays.

    Args:
        prefix: Path of the checkpoint without ".index".

    Raises:
        FileNotFoundError: A file of the checkpoint is missing.
        ValueError: A file is damaged, or an entry is not an array of numbers.
    """
    index = find_index(prefix)
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise ValueError(f"{index} is not the index of a TensorFlow checkpoint: it has {index.stat().st_size:,} bytes")
    try:
        entries = {key.decode(): _fields(value) for key, value in _table(index.read_bytes())}
        shards = _first(entries.pop("", {}), 1, 1)
    except _DAMAGE as error:
        raise ValueError(f"{index} is damaged or not the index of a TensorFlow checkpoint: {error}") from error
    if "_CHECKPOINTABLE_OBJECT_GRAPH" in entries:
        raise ValueError(
            f"{prefix} is a checkpoint of TensorFlow 2 objects, whose names are not those of Google's BERT: write its "
            "variables with tf.compat.v1.train.Saver, or convert it with transformers 4"
        )
    data: list[tuple[Path, np.ndarray]] = []
    for number in range(shards):
        file = Path(f"{prefix}.data-{number:05}-of-{shards:05}")
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, although {index.name} refers to it")
        data.append((file, np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)))
    tensors = {}
    for name, entry in entries.items():
        try:
            tensors[name] = _tensor(name, entry, index, data)
        except _DAMAGE as error:
            raise ValueError(f"{index} is damaged: its entry of {name} cannot be read ({error})") from error
    for shard, (file, content) in enumerate(data):
        ends = [_first(entry, 4, 0) + _first(entry, 5, 0) for entry in entries.values() if _first(entry, 3, 0) == shard]
        end = max(ends, default=0)
        if len(content) != end:  # there are more, which have perhaps shifted the tensors
            raise ValueError(f"{file} is damaged, copy or download it again: it has {len(content)} of {end} bytes")
    for name, entry in entries.items():
        _require_checksum(name, entry, data)
    return tensors


def find_index(prefix: str | Path) -> Path:
    """Return the index file of a checkpoint; FileNotFoundError if there is none."""
    index = Path(f"{prefix}.index")
    if not index.is_file():
        raise FileNotFoundError(
            f"there is no checkpoint {prefix}, since {index} is missing: name a TensorFlow checkpoint without its "
            "suffix, such as bert_model.ckpt"
        )
    return index


def _tensor(name: str, entry: Fields, index: Path, data: list[tuple[Path, np.ndarray]]) -> np.ndarray:
    """Return the array of a BundleEntryProto: 1 dtype, 2 shape, 3 shard, 4 offset, 5 size, 7 slices."""
    code = _first(entry, 1, 0)
    if code not in _DTYPES or 7 in entry:
        raise ValueError(f"{index}: {name} is not an unpartitioned array of numbers (data type {code})")
    dimensions = _fields(_first(entry, 2, b"")).get(2, [])
    shape = [_first(_fields(dimension), 1, 0) for dimension in dimensions if isinstance(dimension, bytes)]
    start, size = _first(entry, 4, 0), _first(entry, 5, 0)
    file, content = data[_first(entry, 3, 0)]
    content = content[start : start + size]
    if len(content) != size or size != prod(shape) * np.dtype(_DTYPES[code]).itemsize:
        raise ValueError(
            f"{file} is damaged, copy or download it again: {name} of shape {shape} has {len(content)} of {size} bytes"
        )
    if not size:
        return np.empty(0, _DTYPES[code])  # not reshaped, as the shape may be absurd
    array: np.ndarray = content.view(_DTYPES[code]).reshape(shape)
    return array


def _require_checksum(name: str, entry: Fields, data: list[tuple[Path, np.ndarray]]) -> None:
    """Raise ValueError if the content of a tensor does not have the checksum in its BundleEntryProto, field 6."""
    start, size = _first(entry, 4, 0), _first(entry, 5, 0)
    file, content = data[_first(entry, 3, 0)]
    stored = _first(entry, 6, b"")
    if size and masked_crc32c(content[start : start + size]).to_bytes(4, "little") != stored:
        raise ValueError(f"{file} is damaged, copy or download it again: the checksum of {name} is wrong")


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the (key, value) entries of a sorted table in order."""
    footer = data[-_FOOTER:]
    if len(footer) < _FOOTER or struct.unpack("<Q", footer[-8:])[0] != _MAGIC:
        raise IndexError("the footer is not that of a sorted table")
    # The footer holds two handles of two varints each: of the meta-index block, which is unused, and the index block.
    _, position = _varint(footer, 0)
    _, position = _varint(footer, position)
    for _, handle in _block(data, *_two_varints(footer, position)):
        yield from _block(data, *_two_varints(handle, 0))


def _block(data: bytes, start: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the (key, value) entries of a block.

    A block ends with an array of uint32 restart offsets and their number; after it come the kind of compression, one
    byte, and a checksum. An entry is the number of bytes that its key shares with the previous key, the number of other
    key bytes, the number of value bytes, the other key bytes, and the value.
    """
    block = data[start : start + size]
    if data[start + size]:
        raise IndexError("its blocks are compressed, which TensorFlow does not write")
    _require_block_checksum(data, start, start + size + 1)  # with the kind of compression
    restarts = struct.unpack("<I", block[-4:])[0]
    position, end, key = 0, len(block) - 4 * (restarts + 1), b""
    while position < end:
        shared, position = _varint(block, position)
        unshared, position = _varint(block, position)
        length, position = _varint(block, position)
        key = key[:shared] + block[position : position + unshared]
        if len(key) > _MAX_NAME_BYTES:
            raise IndexError("the name of a tensor is too long")
        yield key, block[position + unshared : position + unshared + length]
        position += unshared + length


def _require_block_checksum(data: bytes, start: int, end: int) -> None:
    """Raise IndexError if the bytes from `start` to `end` do not have the checksum that follows them."""
    if masked_crc32c(np.frombuffer(data, np.uint8)[start:end]).to_bytes(4, "little") != data[end : end + 4]:
        raise IndexError("the checksum of a block is wrong")


def _fields(message: bytes) -> Fields:
    """Parse a protocol buffer."""
    fields: Fields = {}
    value: int | bytes
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, position = _varint(message, position)
        elif wire_type == 2:
            length, position = _varint(message, position)
            value, position = message[position : position + length], position + length
        else:
            width = {1: 8, 5: 4}[wire_type]
            value, position = message[position : position + width], position + width
        fields.setdefault(number, []).append(value)
    return fields


def _first(fields: Fields, number: int, default: Value) -> Value:
    """Return the first value of a field, which has the type of `default`, its value if the message lacks it."""
    return cast(Value, fields.get(number, [default])[0])


def _two_varints(data: bytes, position: int) -> tuple[int, int]:
    first, position = _varint(data, position)
    return first, _varint(data, position)[0]


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Decode an integer, seven bits per byte and lowest bits first; return it and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise IndexError("an integer has more than 64 bits")
