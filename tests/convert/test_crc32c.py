"""CRC-32C: published values, and a bitwise computation at lengths around those of lanes and chunks."""

import numpy as np
import pytest

from bertfast.convert import crc32c as implementation
from bertfast.convert.crc32c import crc32c, masked_crc32c


def bitwise(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_values_are_the_published_ones(data, value):
    assert crc32c(np.frombuffer(data, np.uint8)) == value


def test_a_value_is_masked_as_tensorflow_masks_it():
    value = 0xE3069283
    masked = masked_crc32c(np.frombuffer(b"123456789", np.uint8))
    rotated = (masked - 0xA282EAD8) % 2**32
    assert (rotated >> 17 | rotated << 15) % 2**32 == value  # crc32c::Unmask


def test_lanes_and_chunks_do_not_change_the_value(monkeypatch):
    monkeypatch.setattr(implementation, "_MIN_LANE", 8)
    monkeypatch.setattr(implementation, "_MAX_LANES", 16)
    monkeypatch.setattr(implementation, "_CHUNK", 300)
    generator = np.random.default_rng(0)
    for length in (1, 2, 7, 8, 9, 63, 64, 65, 127, 129, 255, 256, 257, 299, 300, 301, 600, 601, 1000):
        data = generator.integers(0, 256, length, np.uint8)
        assert crc32c(data) == bitwise(data.tobytes()), length
