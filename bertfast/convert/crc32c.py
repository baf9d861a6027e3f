"""CRC-32C (Castagnoli), with which TensorFlow protects tensors and the blocks of an index.

A CRC is linear over GF(2): the data is divided into lanes of equal length, whose registers are updated together, two
bytes at a time, by NumPy; the registers are then combined in pairs. Operators are uint32 [32], the images of the bits.
"""

from __future__ import annotations

from functools import cache

import numpy as np

_POLYNOMIAL = np.uint32(0x82F63B78)  # lowest bit first
_MASK_DELTA = 0xA282EAD8  # of TensorFlow's crc32c::Mask
_MAX_LANES, _MIN_LANE = 2**14, 2**10  # registers that stay in the L2 cache; bytes per lane that outweigh combining
_CHUNK = 2**25  # bytes processed at a time, which bounds memory
_BITS = np.arange(32, dtype=np.uint32)


def masked_crc32c(data: np.ndarray) -> int:
    """Return the CRC-32C of uint8 [n] as TensorFlow stores it: rotated, plus a constant."""
    value = crc32c(data)
    return ((value >> 15 | value << 17) + _MASK_DELTA) & 0xFFFFFFFF


def crc32c(data: np.ndarray) -> int:
    """Return the CRC-32C of uint8 [n]."""
    register = np.full(1, 0xFFFFFFFF, np.uint32)
    for start in range(0, len(data), _CHUNK):
        chunk = data[start : start + _CHUNK]
        register = _apply(_zeros(len(chunk)), register) ^ _register(chunk)
    return int(register[0]) ^ 0xFFFFFFFF


def _register(data: np.ndarray) -> np.ndarray:
    """Return the register, uint32 [1], after uint8 [n] if it was 0 before."""
    lanes = 1
    while lanes < _MAX_LANES and lanes * _MIN_LANE < len(data):
        lanes *= 2
    size = -(-len(data) // (2 * lanes)) * 2  # bytes of a lane
    padded = np.zeros(lanes * size, np.uint8)  # zeros in front leave the register 0
    padded[len(padded) - len(data) :] = data
    table, registers = _two_byte_table(), np.zeros(lanes, np.uint32)
    # One row per step: the next two bytes of each lane, uint16 [steps, lanes].
    for words in np.ascontiguousarray(padded.view("<u2").reshape(lanes, -1).T):
        registers = table[(registers & 0xFFFF) ^ words] ^ (registers >> 16)
    operator = _zeros(size)
    while len(registers) > 1:
        registers = _apply(operator, registers[0::2]) ^ registers[1::2]
        operator = _apply(operator, operator)
    return registers


def _apply(operator: np.ndarray, registers: np.ndarray) -> np.ndarray:
    """Return the images of registers, uint32 [n]."""
    bits = (registers[:, None] >> _BITS) & np.uint32(1)
    images: np.ndarray = np.bitwise_xor.reduce(bits * operator, axis=1)
    return images


@cache
def _zeros(count: int) -> np.ndarray:
    """Return the operator of `count` zero bytes."""
    units = np.uint32(1) << _BITS
    result, power = units, _byte_table()[units & 0xFF] ^ (units >> 8)
    while count:
        if count & 1:
            result = _apply(power, result)
        power, count = _apply(power, power), count >> 1
    return result


@cache
def _byte_table() -> np.ndarray:
    """Return uint32 [256]: the register after a zero byte, by the register's lowest byte, without its other bytes."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ _POLYNOMIAL, table >> 1)
    return table


@cache
def _two_byte_table() -> np.ndarray:
    """Return uint32 [65536]: the same after two zero bytes, by the register's lowest two bytes."""
    table = np.arange(2**16, dtype=np.uint32)
    for _ in range(2):
        table = _byte_table()[table & 0xFF] ^ (table >> 8)
    return table
