"""Checkpoints as TensorFlow writes them, written without TensorFlow."""

import struct
from pathlib import Path

import numpy as np
import torch

from bertfast.convert.crc32c import masked_crc32c

CODES = {"float32": 1, "int32": 3, "int64": 9, "bool": 10}


def original_name(name: str) -> tuple[str, bool]:
    """Return the TensorFlow name of a PyTorch parameter, and whether it is transposed."""
    name = name.replace(".layer.", ".layer_")
    name = name.removesuffix(".weight") if "_embeddings" in name else name
    for pytorch, tensorflow in (
        ("cls.predictions.bias", "cls.predictions.output_bias"),
        ("cls.seq_relationship.weight", "cls.seq_relationship.output_weights"),
        ("cls.seq_relationship.bias", "cls.seq_relationship.output_bias"),
        ("qa_outputs.weight", "cls.squad.output_weights"),
        ("qa_outputs.bias", "cls.squad.output_bias"),
        ("classifier.weight", "output_weights"),
        ("classifier.bias", "output_bias"),
        ("LayerNorm.weight", "LayerNorm.gamma"),
        ("LayerNorm.bias", "LayerNorm.beta"),
    ):
        name = name.replace(pytorch, tensorflow)
    transposed = name.endswith(".weight")
    return (name.removesuffix("weight") + "kernel" if transposed else name).replace(".", "/"), transposed


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """A protocol buffer of integers and byte strings by field number."""
    parts = [
        varint(number << 3) + varint(value)
        if isinstance(value, int)
        else varint(number << 3 | 2) + varint(len(value)) + value
        for number, value in fields
    ]
    return b"".join(parts)


def checksum(content: bytes) -> bytes:
    """The masked CRC-32C of bytes."""
    return struct.pack("<I", masked_crc32c(np.frombuffer(content, np.uint8)))


def entry_of(array: np.ndarray, offset: int) -> bytes:
    """The BundleEntryProto of a tensor at an offset of the data."""
    shape = b"".join(message((2, message((1, size)))) for size in array.shape)
    entry = message((1, CODES[array.dtype.name]), (2, shape), (4, offset), (5, array.nbytes))
    return entry + varint(6 << 3 | 5) + checksum(array.tobytes())


def block(entries: dict[str, bytes]) -> bytes:
    """A block of a sorted table, without shared prefixes, and its trailer."""
    content = b"".join(
        varint(0) + varint(len(name)) + varint(len(value)) + name.encode() + value for name, value in entries.items()
    )
    content += struct.pack("<II", 0, 1) + bytes(1)
    return content + checksum(content)


def write_index(prefix: Path, entries: dict[str, bytes]) -> None:
    """Write the index of a checkpoint with these entries."""
    first = block(entries)
    index = block({max(entries): varint(0) + varint(len(first) - 5)})
    footer = (bytes(2) + varint(len(first)) + varint(len(index) - 5)).ljust(40, b"\0")
    Path(f"{prefix}.index").write_bytes(first + index + footer + struct.pack("<Q", 0xDB4775248B80FB57))


def write_bundle(prefix: Path, tensors: dict[str, np.ndarray]) -> str:
    """Write a checkpoint as TensorFlow does, without TensorFlow."""
    entries, data = {"": message((1, 1))}, b""
    for name, array in sorted(tensors.items()):
        entries[name] = entry_of(array, len(data))
        data += array.tobytes()
    write_index(prefix, entries)
    Path(f"{prefix}.data-00000-of-00001").write_bytes(data)
    return str(prefix)


def tensors_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Return the weights of a model by the names of TensorFlow, in its layout."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if "decoder" not in name:
            original, transposed = original_name(name)
            tensors[original] = np.ascontiguousarray((parameter.T if transposed else parameter).detach().numpy())
    return tensors
