"""Shared by the row kernels: rows as chunks of registers, LayerNorm forward and backward, and sums over rows.

768 is not a power of two. A row is a tuple of chunks [ROWS, CHUNK], CHUNK the widest power of two that divides it, so
that memory is read and written once and no lane idles. A lane accesses 16 bytes of the widest dtype at a time; up to
1,024 columns a row belongs to one warp, and sums over a row need neither shared memory nor a barrier.

H columns of a row, CHUNK columns of a chunk, ROWS rows of a tile.
"""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertfast.kernels.device import sm_count

_CHUNKS = (2048, 1024, 512, 256, 128)
_ONE_WARP = 1024  # maximum columns of a row that one warp holds
# Columns of rows that a kernel that sums over rows holds as three chunks: 4 columns of each belong to a lane, so that
# it belongs to one, two, four or eight warps. (With another chunk of 4 columns, registers would be spilled.)
_THREE_CHUNKS = (384, 768, 1536, 3072)
_WARPS_PER_SM = 16  # of a kernel that sums over rows
# Pipeline stages of such a kernel's loop: the rows of the next two tiles are being copied to shared memory, or of the
# next one if rows are so wide that three stages exceed the shared memory of sm_120 (99 KiB).
STAGES, STAGES_IF_WIDE = tl.constexpr(3), tl.constexpr(2)
WIDE = tl.constexpr(2048)  # columns


def row_config(
    columns: int, *tensors: Tensor, summing: bool = False, warps_share_rows: bool = False
) -> Mapping[str, int]:
    """Return H, CHUNK, ROWS and the launch options of a kernel for rows of `columns` of these tensors.

    A kernel that is `summing` over rows keeps a sum of every column, so several warps share a row: one of three chunks,
    12 columns of a lane, if the width is in _THREE_CHUNKS (384 only in 16 bits), else one of a chunk whose lanes idle
    beyond the row's end. maxnreg is set where registers are scarce: by default the compiler spills one or two registers
    to fit more programs on an SM.

    Args:
        columns: Columns of a row.
        tensors: What is read.
        summing: Whether the kernel sums over rows.
        warps_share_rows: Whether all warps share a row at every width, which takes fewer registers, and lets a kernel
            add the rows of a tile without a barrier.
    """
    return _row_config(columns, max(tensor.element_size() for tensor in tensors), summing, warps_share_rows)


@cache
def _row_config(columns: int, element_size: int, summing: bool, warps_share_rows: bool) -> Mapping[str, int]:
    warps = 4 if columns <= 2048 else 8
    # Lanes of one warp hold all addresses of a row, too many in fp32: ptxas spills on sm_100.
    in_one_warp = columns == _THREE_CHUNKS[0]
    three_chunks = columns in _THREE_CHUNKS and not (in_one_warp and element_size > 2)
    if summing and not warps_share_rows and three_chunks:
        chunk = columns // 3
        rows = warps * 32 * 4 // chunk
        return MappingProxyType({"H": columns, "CHUNK": chunk, "ROWS": rows, "num_warps": warps, "maxnreg": 128})
    warp = 32 * 16 // element_size
    padded = triton.next_power_of_2(columns)
    bounded = summing or columns > 2048
    options = {"num_warps": warps} | ({"maxnreg": 128 if columns <= 1024 else 255} if bounded else {})
    if summing:
        chunk = min(warps * warp, padded)
    else:
        widest = warp if columns <= _ONE_WARP else warps * warp
        chunk = next((size for size in _CHUNKS if size <= widest and columns % size == 0), padded)
    # Read-only, because all callers share it.
    return MappingProxyType({"H": columns, "CHUNK": chunk, "ROWS": max(warps * warp // chunk, 1), **options})


def summing_programs(tiles: int, device: torch.device, warps: int) -> int:
    """Return the number of programs of a kernel that sums over rows: as many as are resident on the GPU
    with 128 registers per lane.

    Args:
        tiles: Number of tiles of rows; no program is without one.
        device: The GPU.
        warps: Warps of a program. With up to 128 registers per lane, _WARPS_PER_SM warps fit on an SM; for most widths
            above 1,024 columns a lane has more, and half of the programs wait for the others to end.
    """
    return max(min(tiles, max(_WARPS_PER_SM // warps, 1) * sm_count(device)), 1)


def in_rows(x: Tensor) -> Tensor:
    """Return x [rows, columns] if its rows are contiguous, else a contiguous copy."""
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit
def inside(rows, start: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr):
    """Return the mask of the chunk from column `start`: `rows` [rows, 1], and the column bound where it is needed."""
    if start + CHUNK <= H:
        return rows
    else:
        return rows & (start + tl.arange(0, CHUNK)[None, :] < H)


@triton.jit
def load_rows(pointer, offset, rows, H: tl.constexpr, CHUNK: tl.constexpr):
    """Load the rows at `offset` [rows, 1], masked by `rows`, as fp32 chunks; masked elements are zero."""
    chunks: tl.tuple = ()
    for start in tl.static_range(0, H, CHUNK):
        columns = start + tl.arange(0, CHUNK)[None, :]
        x = tl.load(pointer + offset + columns, mask=inside(rows, start, H, CHUNK), other=0.0)
        chunks = chunks + (x.to(tl.float32),)
    return chunks


@triton.jit
def load_vector(pointer, H: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """Load a vector [H], repeated for each row of a tile, as fp32 chunks: every lane loads its own columns.

    If the pointer is None, the chunks are zeros.
    """
    if pointer is None:
        return zeros(H, CHUNK, ROWS)
    else:
        return load_rows(pointer, tl.zeros([ROWS, 1], tl.int32), tl.full([ROWS, 1], True, tl.int1), H, CHUNK)


@triton.jit
def store_rows(pointer, offset, rows, chunks, H: tl.constexpr, CHUNK: tl.constexpr):
    """Write chunks to the rows at `offset`, in the pointer's dtype."""
    for start in tl.static_range(0, H, CHUNK):
        columns = start + tl.arange(0, CHUNK)[None, :]
        x = chunks[start // CHUNK].to(pointer.dtype.element_ty)
        tl.store(pointer + offset + columns, x, mask=inside(rows, start, H, CHUNK))


@triton.jit
def zeros(H: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """Return accumulators: chunks of fp32 zeros."""
    chunks: tl.tuple = ()
    for _ in tl.static_range(0, H, CHUNK):
        chunks = chunks + (tl.zeros([ROWS, CHUNK], tl.float32),)
    return chunks


@triton.jit
def add(a, b):
    """Return a + b, of chunks."""
    chunks: tl.tuple = ()
    for c in tl.static_range(len(a)):
        chunks = chunks + (a[c] + b[c],)
    return chunks


@triton.jit
def multiply(a, b):
    """Return a · b, of chunks."""
    chunks: tl.tuple = ()
    for c in tl.static_range(len(a)):
        chunks = chunks + (a[c] * b[c],)
    return chunks


@triton.jit
def row_sums(chunks):
    """Return the sum of each row, [rows, 1]: over chunks first, so that there is one reduction over lanes."""
    total = chunks[0]
    for c in tl.static_range(1, len(chunks)):
        total += chunks[c]
    return tl.sum(total, 1, keep_dims=True)


@triton.jit
def store_sums(pointer, sums, H: tl.constexpr, CHUNK: tl.constexpr):
    """Write the sums over a program's rows to [H] fp32; the sum over programs is a second stage."""
    for start in tl.static_range(0, H, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        tl.store(pointer + columns, tl.sum(sums[start // CHUNK], 0), mask=columns < H)


@triton.jit
def layer_norm_statistics(z, eps, H: tl.constexpr, CHUNK: tl.constexpr):
    """Return mean and rstd of each row, [rows, 1]; the variance from differences, without cancellation."""
    mean = row_sums(z) / H
    squares: tl.tuple = ()
    for start in tl.static_range(0, H, CHUNK):
        difference = tl.where(inside(True, start, H, CHUNK), z[start // CHUNK] - mean, 0.0)
        squares = squares + (difference * difference,)
    return mean, 1.0 / tl.sqrt(row_sums(squares) / H + eps)


@triton.jit
def layer_norm_apply(z, mean, rstd, gamma, beta):
    """Return (z - mean) · rstd · gamma + beta."""
    y: tl.tuple = ()
    for c in tl.static_range(len(z)):
        y = y + ((z[c] - mean) * rstd * gamma[c] + beta[c],)
    return y


@triton.jit
def layer_norm_differentiate(d_y, z, mean, rstd, gamma, H: tl.constexpr):
    """Return (d_z, d_gamma) of each row, d_gamma not yet summed over rows; d_beta is the sum of d_y.

    With n = (z - mean) · rstd and g = d_y · gamma, zero out of bounds: d_z = rstd · (g - mean(g) - n · mean(g · n)) (Ba
    et al., 2016).
    """
    normalised: tl.tuple = ()
    for c in tl.static_range(len(z)):
        normalised = normalised + ((z[c] - mean) * rstd,)
    g = multiply(d_y, gamma)
    mean_g = row_sums(g) / H
    mean_gn = row_sums(multiply(g, normalised)) / H
    d_z: tl.tuple = ()
    for c in tl.static_range(len(z)):
        d_z = d_z + (rstd * (g[c] - mean_g - normalised[c] * mean_gn),)
    return d_z, multiply(d_y, normalised)


@triton.jit
def rms_norm_statistic(z, eps, H: tl.constexpr):
    """Return 1 / sqrt(mean(z²) + eps) of each row, [rows, 1]; columns out of bounds are zero."""
    return 1.0 / tl.sqrt(row_sums(multiply(z, z)) / H + eps)


@triton.jit
def rms_norm_apply(z, rstd, gamma):
    """Return z · rstd · gamma."""
    y: tl.tuple = ()
    for c in tl.static_range(len(z)):
        y = y + (z[c] * rstd * gamma[c],)
    return y


@triton.jit
def rms_norm_differentiate(d_y, z, rstd, gamma, H: tl.constexpr):
    """Return (d_z, d_gamma) of each row, d_gamma not yet summed over rows.

    With n = z · rstd and g = d_y · gamma: d_z = rstd · (g - n · mean(g · n)) (Zhang and Sennrich, 2019).
    """
    normalised: tl.tuple = ()
    for c in tl.static_range(len(z)):
        normalised = normalised + (z[c] * rstd,)
    g = multiply(d_y, gamma)
    mean_gn = row_sums(multiply(g, normalised)) / H
    d_z: tl.tuple = ()
    for c in tl.static_range(len(z)):
        d_z = d_z + (rstd * (g[c] - normalised[c] * mean_gn),)
    return d_z, multiply(d_y, normalised)
