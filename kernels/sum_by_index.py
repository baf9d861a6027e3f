"""The gradient of a table of embeddings: sums of the rows that share an index, the same every time.

The indices are sorted, so that equal ones stand in a run. Each program adds up the runs in its own block of places. Its
first and its last run may go on in the blocks beside it, so their sums are the places of a next, 16 times shorter
round; every other run is complete. Long runs and short ones cost the same, nothing is added atomically, and no launch
depends on the indices.

The gradient that PyTorch has for an embedding sorts too, but adds atomically where tokens are many and rows few, as
those of positions and of types are, unless `torch.use_deterministic_algorithms` forbids it (its pull request 172454).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertfast.kernels.jit import kernel
from bertfast.kernels.rows import cut, load_rows, store_sums, zeros

_BLOCK = 32  # places of a program, which takes one after another


@kernel
def sum_runs_kernel(
    values_ptr,  # [N, H]
    index_ptr,  # int [N], sorted
    order_ptr,  # int64 [N], the row of values that has each index; None: they are in order
    table_ptr,  # [rows, H]
    edges_ptr,  # fp32 [programs, 2, H], zeros: sums of the programs' first and last runs; None: all are complete
    edge_index_ptr,  # int [programs, 2]
    places,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,  # 1
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK
    end = tl.minimum(start + BLOCK, places)
    first, last = tl.load(index_ptr + start), tl.load(index_ptr + end - 1)
    if edges_ptr is not None:
        edge = 2 * tl.program_id(0).to(tl.int64)
        tl.store(edge_index_ptr + edge, first)
        tl.store(edge_index_ptr + edge + 1, last)
    sums, before = zeros(H, CHUNK, ROWS), first
    for place in range(start, end):
        index = tl.load(index_ptr + place)
        row = tl.cast(place, tl.int64) if order_ptr is None else tl.load(order_ptr + place)
        sums = _continue(sums, load_rows(values_ptr, row * H, True, H, CHUNK), index == before)
        before = index
        if tl.load(index_ptr + place + 1, mask=place + 1 < end, other=-1) != index:
            if edges_ptr is None:
                complete = True
            else:
                complete = (index != first) & (index != last)
                if not complete:
                    store_sums(edges_ptr + (edge + (index != first)) * H, sums, H, CHUNK)
            if complete:
                store_sums(table_ptr + index.to(tl.int64) * H, sums, H, CHUNK)


@triton.jit
def _continue(sums, values, same):
    """sums + values if the run is the `same`, else values: a run that is no number spoils no other."""
    chunks = ()
    for c in tl.static_range(len(sums)):
        chunks = chunks + (tl.where(same, sums[c], 0.0) + values[c],)
    return chunks


def sum_by_index(values: Tensor, index: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Sum the rows of `values` [N, H] that have the same `index` (int [N], below `rows`), in fp32 -> [rows, H]."""
    hidden = values.shape[1]
    table = values.new_zeros((rows, hidden), dtype=dtype)
    index, order = index.sort(stable=True)
    while len(index):
        programs = triton.cdiv(len(index), _BLOCK)
        edges, edge_index = None, index[:0]
        if programs > 1:
            edges = values.new_zeros((2 * programs, hidden), dtype=torch.float32)
            edge_index = index.new_empty(2 * programs)
        constants = cut(hidden, values, summing=True) | {"ROWS": 1, "BLOCK": _BLOCK}
        sum_runs_kernel[(programs,)](values, index, order, table, edges, edge_index, len(index), **constants)
        values, index, order = edges, edge_index, None
    return table
