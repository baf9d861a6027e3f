"""What the row kernels share: rows in chunks of registers, LayerNorm of a row each way, and sums over all rows.

A row of 768 is no power of two. It is held as a tuple of chunks [rows, chunk], the widest power of two that divides it,
so that memory is read and written once and no lane idles. A lane takes 16 bytes of the widest dtype at a time; up to
1,024 columns a warp has rows of its own, and sums over a row need neither shared memory nor a barrier.

H columns of a row, CHUNK columns of a chunk, ROWS rows of a tile.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertfast.kernels.device import processors

_CHUNKS = (2048, 1024, 512, 256, 128)
_ONE_WARP = 1024  # the most columns that one warp takes alone
_PROGRAMS_PER_PROCESSOR = 4  # of a kernel that sums over rows
# Stages of such a kernel's loop: the rows of two later tiles are on their way to shared memory, or of one later tile
# where rows are so wide that three stages take more shared memory than sm_120 has (99 KiB).
STAGES, STAGES_IF_WIDE = tl.constexpr(3), tl.constexpr(2)
WIDE = tl.constexpr(2048)  # columns


def cut(columns: int, *tensors: Tensor, summing: bool = False) -> dict[str, int]:
    """How rows of `columns` of these tensors are cut: H, CHUNK, ROWS and the launch options of a kernel.

    A kernel that is `summing` over rows keeps a sum of every column, so all its warps share a row, and lanes idle where
    the width is no power of two. Where registers run short they are bounded by how many programs are to run at a time:
    by itself the compiler spills one or two to make room for more.
    """
    return _cut(columns, max(tensor.element_size() for tensor in tensors), summing)


@cache
def _cut(columns: int, element_size: int, summing: bool) -> dict[str, int]:
    warps = 4 if columns <= 2048 else 8
    warp = 32 * 16 // element_size
    padded = triton.next_power_of_2(columns)
    bounded = summing or columns > 2048
    options = {"num_warps": warps} | ({"maxnreg": 128 if columns <= 1024 else 255} if bounded else {})
    if summing:
        chunk = min(warps * warp, padded)
    else:
        widest = warp if columns <= _ONE_WARP else warps * warp
        chunk = next((size for size in _CHUNKS if size <= widest and columns % size == 0), padded)
    return {"H": columns, "CHUNK": chunk, "ROWS": max(warps * warp // chunk, 1), **options}


def summing_programs(tiles: int, device: torch.device) -> int:
    """Programs that share the tiles of a kernel which sums over rows: as many as run at a time."""
    return max(min(tiles, _PROGRAMS_PER_PROCESSOR * processors(device)), 1)


def in_rows(x: Tensor) -> Tensor:
    """x [rows, columns] with no gap between columns and any between rows: itself, or a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit
def inside(rows, start: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr):
    """Mask of the chunk from column `start`: `rows` [rows, 1], and the columns too where the chunk sticks out."""
    if start + CHUNK <= H:
        return rows
    else:
        return rows & (start + tl.arange(0, CHUNK)[None, :] < H)


@triton.jit
def load_rows(pointer, offset, rows, H: tl.constexpr, CHUNK: tl.constexpr):
    """The rows at `offset` [rows, 1], where the mask `rows` has one, in fp32 chunks; zero elsewhere."""
    chunks = ()
    for start in tl.static_range(0, H, CHUNK):
        columns = start + tl.arange(0, CHUNK)[None, :]
        x = tl.load(pointer + offset + columns, mask=inside(rows, start, H, CHUNK), other=0.0)
        chunks = chunks + (x.to(tl.float32),)
    return chunks


@triton.jit
def load_vector(pointer, H: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """One vector [H] for each row of a tile, in fp32 chunks: every lane reads what its own columns need."""
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
    """fp32 zeros in chunks, to sum into."""
    chunks = ()
    for _ in tl.static_range(0, H, CHUNK):
        chunks = chunks + (tl.zeros([ROWS, CHUNK], tl.float32),)
    return chunks


@triton.jit
def add(a, b):
    """a + b, of chunks."""
    chunks = ()
    for c in tl.static_range(len(a)):
        chunks = chunks + (a[c] + b[c],)
    return chunks


@triton.jit
def multiply(a, b):
    """a · b, of chunks."""
    chunks = ()
    for c in tl.static_range(len(a)):
        chunks = chunks + (a[c] * b[c],)
    return chunks


@triton.jit
def row_sums(chunks):
    """The sum of each row, [rows, 1]: chunks first, so that lanes meet once."""
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
    """Mean and 1 / sqrt(variance + eps) of each row, [rows, 1]; the variance from differences, which do not cancel."""
    mean = row_sums(z) / H
    squares = ()
    for start in tl.static_range(0, H, CHUNK):
        difference = tl.where(inside(True, start, H, CHUNK), z[start // CHUNK] - mean, 0.0)
        squares = squares + (difference * difference,)
    return mean, 1.0 / tl.sqrt(row_sums(squares) / H + eps)


@triton.jit
def layer_norm_apply(z, mean, rstd, gamma, beta):
    """(z - mean) · rstd · gamma + beta."""
    y = ()
    for c in tl.static_range(len(z)):
        y = y + ((z[c] - mean) * rstd * gamma[c] + beta[c],)
    return y


@triton.jit
def layer_norm_differentiate(d_y, z, mean, rstd, gamma, H: tl.constexpr):
    """(d_z, d_gamma) of each row, d_gamma not yet summed over rows; d_beta is the sum of d_y.

    With n = (z - mean) · rstd and g = d_y · gamma, zero outside: d_z = rstd · (g - mean(g) - n · mean(g · n)) (Ba et
    al., 2016).
    """
    normalised = ()
    for c in tl.static_range(len(z)):
        normalised = normalised + ((z[c] - mean) * rstd,)
    g = multiply(d_y, gamma)
    mean_g = row_sums(g) / H
    mean_gn = row_sums(multiply(g, normalised)) / H
    d_z = ()
    for c in tl.static_range(len(z)):
        d_z = d_z + (rstd * (g[c] - mean_g - normalised[c] * mean_gn),)
    return d_z, multiply(d_y, normalised)
