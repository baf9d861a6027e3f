"""How a program of attention in Triton finds its tile."""

import torch
import triton
import triton.language as tl
from helpers import DEVICE

from bertfast.kernels.attention import find_tile, slots
from bertfast.sequences import Sequences


@triton.jit
def tile_kernel(cu_ptr, sequences, tokens, slot_ptr, found_ptr, BLOCK: tl.constexpr):
    place = tl.program_id(0)
    found = find_tile(cu_ptr, sequences, tokens, tl.load(slot_ptr + place), BLOCK)
    for part in tl.static_range(4):
        tl.store(found_ptr + 4 * place + part, found[part])


def test_every_tile_has_a_slot():
    """Also among more sequences than a program looks through at a time, many of them empty."""
    block, inert = 16, 40
    lengths = [(7 * i) % 50 if i % 3 else 0 for i in range(2100)]
    sequences = Sequences.from_lengths(lengths, capacity=sum(lengths) + inert, device=DEVICE)
    starts = sequences.cu_seqlens.tolist()
    some = [1, 2, 1000, 1024, 1025, 2048, 2098]
    tiles = [(s, starts[s], lengths[s], row) for s in some for row in range(0, lengths[s], block)]
    tiles += [(2100, sequences.num_tokens, inert, row) for row in range(0, inert, block)]
    places = torch.tensor([start // block + s + row // block for s, start, _, row in tiles], device=DEVICE)
    assert places.max() < slots(sequences.capacity, 2100, block)
    found = torch.empty(len(tiles), 4, dtype=torch.int64, device=DEVICE)
    tile_kernel[(len(tiles),)](sequences.cu_seqlens, 2100, sequences.capacity, places, found, BLOCK=block)
    assert [tuple(row) for row in found.tolist()] == tiles
