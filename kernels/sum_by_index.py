"""The gradient of an embedding table: table[r] = sum of values[n] over all n with index[n] = r, deterministic.

One stable sort brings equal indices together, so that the rows of `values` for one table row form a group of sorted
positions. Tables that are indexed for the same `values` share the sort. The positions are cut into blocks of _BLOCK:
the first kernel sums every block that lies within one group, the second has one program per table row, which adds the
positions before and after the whole blocks of its group to the sums of these. So a group of n positions takes at most
n / _BLOCK + 2 · _BLOCK row reads in one program, in two launches. Nothing is added atomically, no launch depends on
the indices, and each table row is written once, zeros included.

PyTorch's embedding gradient sorts too, but uses atomic additions if there are many tokens and few rows, as for
positions and token types, unless `torch.use_deterministic_algorithms` forbids it (PyTorch pull request 172454).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertfast.kernels.jit import kernel
from bertfast.kernels.operation import operation
from bertfast.kernels.rows import add, load_rows, row_config, store_rows, zeros

_BLOCK = 32  # sorted positions of a block
_ROWS = 4  # rows of `values` that a program reads at a time; with 8, half as many programs fit on an SM


@kernel
def sum_blocks_kernel(
    values_ptr,  # [T, H]
    keys_ptr,  # int32 [N], sorted
    order_ptr,  # int64 [N], where each key came from; its row of values is that modulo T
    block_sums_ptr,  # fp32 [N // BLOCK, H], written where all keys of a block are equal
    tokens,  # T
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum one block of sorted positions, if all of its keys are equal."""
    block = tl.program_id(0).to(tl.int64)
    start = block * BLOCK
    if tl.load(keys_ptr + start) == tl.load(keys_ptr + start + BLOCK - 1):
        sums = zeros(H, CHUNK, 1)
        sums = _add_ordered_rows(sums, values_ptr, order_ptr, start, start + BLOCK, tokens, H, CHUNK, ROWS)
        store_rows(block_sums_ptr, block * H, True, sums, H, CHUNK)


@kernel
def sum_groups_kernel(
    values_ptr,  # as in the first kernel
    order_ptr,
    block_sums_ptr,
    starts_ptr,  # int32 [rows of all tables + 1], the sorted position at which each row's group starts
    table_ptr,  # [rows, H], written
    tokens,
    first_row,  # rows of the tables before this one
    zero_row,  # the table row that is zero, even if its group is not empty; -1: none
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the group of one table row: its whole blocks, and the positions before and after these."""
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(starts_ptr + first_row + row), tl.load(starts_ptr + first_row + row + 1)
    end = tl.where(row == zero_row, start, end)
    # The group's whole blocks are first_block … end_block - 1; where there are none, everything is read before them.
    first_block, end_block = tl.cdiv(start, BLOCK), end // BLOCK
    has_blocks = first_block < end_block
    head_end = tl.where(has_blocks, first_block * BLOCK, end)
    tail_start = tl.where(has_blocks, end_block * BLOCK, end)
    sums = zeros(H, CHUNK, 1)
    sums = _add_ordered_rows(sums, values_ptr, order_ptr, start, head_end, tokens, H, CHUNK, ROWS)
    for first in range(first_block, end_block, ROWS):
        block = (first + tl.arange(0, ROWS))[:, None]
        part = load_rows(block_sums_ptr, block.to(tl.int64) * H, block < end_block, H, CHUNK)
        sums = add(sums, _column_sums(part))
    sums = _add_ordered_rows(sums, values_ptr, order_ptr, tail_start, end, tokens, H, CHUNK, ROWS)
    store_rows(table_ptr, row * H, True, sums, H, CHUNK)


@triton.jit
def _add_ordered_rows(
    sums, values_ptr, order_ptr, start, end, tokens, H: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr
):
    """Add the rows of values at the sorted positions start … end - 1 to `sums`, fp32 chunks [1, CHUNK]."""
    for first in range(start, end, ROWS):
        position = (first + tl.arange(0, ROWS))[:, None]
        inside = position < end
        row = tl.load(order_ptr + position, mask=inside, other=0) % tokens
        sums = add(sums, _column_sums(load_rows(values_ptr, row * H, inside, H, CHUNK)))
    return sums


@triton.jit
def _column_sums(chunks):
    """Return the sum of each column over a tile's rows: chunks [ROWS, CHUNK] -> [1, CHUNK]."""
    sums: tl.tuple = ()
    for c in tl.static_range(len(chunks)):
        sums = sums + (tl.sum(chunks[c], 0, keep_dims=True),)
    return sums


@dataclass(frozen=True)
class Groups:
    """The rows of `values` grouped by index, for one or more tables.

    Attributes:
        keys: int32 [N], sorted: the indices, each plus the number of rows of all earlier tables.
        order: int64 [N], the position of each key in the concatenated indices.
        starts: int32 [rows + 1], the sorted position at which each row's group starts, over the rows of all tables.
    """

    keys: Tensor
    order: Tensor
    starts: Tensor


def group_by_index(indices: Sequence[Tensor], rows: Sequence[int]) -> Groups:
    """Group by one or more indices, each int [T] with values below its number of `rows`, with one sort."""
    keys = torch.empty((len(indices), len(indices[0])), dtype=torch.int32, device=indices[0].device)
    first_row = 0
    for table_keys, index, count in zip(keys, indices, rows, strict=True):
        torch.add(index, first_row, out=table_keys)
        first_row += count
    keys, order = keys.flatten().sort(stable=True)
    all_rows = torch.arange(first_row + 1, dtype=torch.int32, device=keys.device)
    return Groups(keys, order, torch.searchsorted(keys, all_rows, out_int32=True))


def sum_groups(
    values: Tensor, groups: Groups, tables: Sequence[tuple[int, torch.dtype]], zero_row: int = -1
) -> list[Tensor]:
    """Sum the rows of each group in fp32.

    Args:
        values: [T, H], contiguous.
        groups: Result of `group_by_index` for these tables' indices.
        tables: (rows, dtype) of each table.
        zero_row: Row of the first table that is set to zero; -1: none.

    Returns:
        One [rows, H] for each table.
    """
    tokens, hidden = values.shape
    constants = row_config(hidden, values, summing=True, warps_share_rows=True)
    constants = {**constants, "ROWS": max(_ROWS, constants["ROWS"]), "BLOCK": _BLOCK}
    blocks = len(groups.keys) // _BLOCK
    block_sums = values.new_empty((blocks, hidden), dtype=torch.float32)
    if blocks:
        sum_blocks_kernel[(blocks,)](values, groups.keys, groups.order, block_sums, tokens, **constants)
    results, first_row = [], 0
    for rows, dtype in tables:
        table = values.new_empty((rows, hidden), dtype=dtype)
        if rows:
            sum_groups_kernel[(rows,)](
                values, groups.order, block_sums, groups.starts, table, tokens, first_row, zero_row, **constants
            )
        results.append(table)
        first_row, zero_row = first_row + rows, -1
    return results


def sum_by_index(values: Tensor, index: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Sum the rows of `values` [T, H] that have the same `index` (int [T], below `rows`), in fp32 -> [rows, H]."""
    return sum_groups(values, group_by_index([index], [rows]), [(rows, dtype)])[0]


@operation
def gather_backward(rows, d_ys, tokens):
    """Return the gradient [tokens, H] of x for each d_y [R, H] of y = x[rows], with one sort for all."""
    groups = group_by_index([rows], [tokens])
    return [sum_groups(d_y.contiguous(), groups, [(tokens, d_y.dtype)])[0] for d_y in d_ys]
