"""The table of tiles that assigns work to the programs of attention in Triton."""

import pytest
import torch
import triton
import triton.language as tl
from helpers import DEVICE

from bertfast.kernels.attention import PADDING_PROGRAMS, blocks_per_tile, find_block
from bertfast.kernels.attention_shapes import _BLACKWELL, _BLACKWELL_CONSUMER, _HOPPER, _HOPPER_DROPOUT, _OTHER, _SINGLE
from bertfast.kernels.attention_tiles import TILE, tile_table
from bertfast.ops.sequences import Sequences


@triton.jit
def block_kernel(tile_ptr, tiles, found_ptr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    slot = tl.program_id(0)
    found = find_block(tile_ptr, tiles, slot, BLOCK, BLOCKS)
    for part in tl.static_range(4):
        tl.store(found_ptr + 4 * slot + part, found[part])


def blocks_of(sequences: Sequences, block: int) -> list[tuple[int, int, int, int]]:
    """(sequence, start, length, first row) of every block, in the order of the programs."""
    table, blocks = sequences.tile_table, blocks_per_tile(block, sequences.max_seqlen_bound)
    programs = (len(table) - 1) * blocks + PADDING_PROGRAMS
    found = torch.empty(programs, 4, dtype=torch.int64, device=DEVICE)
    block_kernel[(programs,)](table, len(table) - 1, found, BLOCK=block, BLOCKS=blocks)
    return [tuple(row) for row in found.tolist() if row[3] < row[2]]


@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("lengths", [[5, 300, 0, 128, 129, 1], [17, 3, 0], [1] * 40, [0, 0], []])
def test_every_row_has_one_block_and_the_longest_sequences_come_first(lengths, block):
    padding = 40
    sequences = Sequences.from_lengths(lengths, capacity=sum(lengths) + padding, device=DEVICE)
    starts = sequences.cu_seqlens.tolist()
    found = blocks_of(sequences, block)
    rows = [(s, starts[s], length, row) for s, length in enumerate(lengths) for row in range(0, length, block)]
    rows += [(len(lengths), sum(lengths), padding, row) for row in range(0, padding, block)]
    assert sorted(found) == sorted(rows)
    in_sequences = [length for sequence, _, length, _ in found if sequence < len(lengths)]
    assert in_sequences == sorted(in_sequences, reverse=True)


def test_is_built_without_reading_the_lengths_and_bounded_by_the_capacity():
    cu_seqlens = torch.empty(101, dtype=torch.int32, device="meta")  # reading a value would be an error
    assert tile_table(cu_seqlens, 1000, 128).shape == (100 + 1, 4)
    assert tile_table(cu_seqlens, 1000, 4096).shape == (1000 // TILE + 100 + 1, 4)


def test_blocks_of_all_shapes_divide_a_tile():
    """The first tile of a long sequence is also not mistaken for a short one: "short" blocks are no larger."""
    for table in (_HOPPER, _HOPPER_DROPOUT, _OTHER, _BLACKWELL, _BLACKWELL_CONSUMER, _SINGLE):
        for entries in table.values():
            for _, queries, keys, *_ in (entry for shapes in entries.values() for entry in shapes):
                assert TILE % queries == TILE % keys == 0
