"""Dropout masks inside kernels: the random bytes of `bertfast.ops.dropout`, generated on the fly and never stored.

A mask is computed element by element. Elements that share a Philox call compute the same one, and the compiler merges
the calls of a thread's elements by common-subexpression elimination. For that it must recognise them as equal: a tile's
first row or column is kept separate from the range within the tile, and is a multiple of 16.
"""

import triton
import triton.language as tl

# One instruction for both halves of a · b; LLVM emits two for the portable form, which the interpreter needs.
_WIDE_MULTIPLY = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def _multiply_wide(a, factor: tl.constexpr):
    """Return the high and low 32 bits of a · factor, uint32."""
    if _WIDE_MULTIPLY:
        return tl.inline_asm_elementwise(
            "{.reg .u64 t; mul.wide.u32 t, $2, $3; mov.b64 {$1, $0}, t;}",
            "=r,=r,r,r",
            [a, factor],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        wide = a.to(tl.uint64) * factor
        return (wide >> 32).to(tl.uint32), wide.to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """Return the four words of Philox4x32-10 (Salmon et al., 2011) for four counter words, which broadcast."""
    key = seed.to(tl.uint64)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    c0, c1, c2, c3 = c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = _multiply_wide(c0, 0xD2511F53)
        high1, low1 = _multiply_wide(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _kept(word, byte, threshold):
    """Return whether byte 0 … 3 of a 32-bit word is at least the threshold."""
    return (word << (24 - 8 * byte).to(tl.uint32)) >= (threshold << 24).to(
        tl.uint32
    )  # the lower bytes cannot change the comparison


@triton.jit
def keep_hidden(first, columns, sequence_id, position, counter_word, seed, threshold):
    """Return the mask [rows, columns] of kept activations at columns `first` + `columns`.

    `first` is a multiple of 16 and `columns` [1, columns] a range; `sequence_id` and `position` [rows, 1] are RNG
    coordinates of the tokens, and `counter_word` is operation << 8.
    """
    w0, w1, w2, w3 = philox((first >> 4) + (columns >> 4), position, sequence_id, counter_word, seed)
    upper, odd = (columns & 8) != 0, (columns & 4) != 0
    return _kept(tl.where(upper, tl.where(odd, w3, w2), tl.where(odd, w1, w0)), columns & 3, threshold)


@triton.jit
def hidden_factors(row, rows, rng_ptr, counter_word, threshold, H: tl.constexpr, CHUNK: tl.constexpr):
    """Return the dropout factors of the tokens `row` [rows, 1], 0 or the scale, in chunks as in `kernels/rows.py`.

    `rows` masks the tokens in bounds; `rng_ptr` points to their RNG coordinates: (seed int64 [], sequence ids
    int [T], positions int [T]).
    """
    seed = tl.load(rng_ptr[0])
    sequence_id = tl.load(rng_ptr[1] + row, mask=rows, other=0)
    position = tl.load(rng_ptr[2] + row, mask=rows, other=0)
    scale = scale_of(threshold)
    factors: tl.tuple = ()
    for start in tl.static_range(0, H, CHUNK):
        keep = keep_hidden(start, tl.arange(0, CHUNK)[None, :], sequence_id, position, counter_word, seed, threshold)
        factors = factors + (tl.where(keep, scale, 0.0),)
    return factors


@triton.jit
def scale_of(threshold):
    """Return the scale of kept elements, 256 / (256 - threshold), correctly rounded."""
    return tl.math.div_rn(256.0, 256.0 - threshold)


@triton.jit
def attention_dropout(seed_ptr, sequence_id_ptr, counter_word, threshold):
    """Return the `rng` of `keep_attention` and the scale of kept probabilities; (zeros, 1) if `seed_ptr` is None."""
    if seed_ptr is None:
        return (0, 0, 0, 0), 1.0
    else:
        return (tl.load(seed_ptr), tl.load(sequence_id_ptr), counter_word, threshold), scale_of(threshold)


@triton.jit
def keep_attention(first_query, query, first_key, key, rng):
    """Return the mask of kept probabilities at queries `first_query` + `query` and keys `first_key` + `key`.

    `first_query` and `first_key` are multiples of 16; `query` and `key` are ranges, one a column and the other a row.
    `rng` is (seed, the sequence's id, counter word operation << 8 | head, threshold).
    """
    seed, sequence_id, counter, threshold = rng
    # A Philox call covers 4 x 4 elements of a 16 x 16 block: rows and columns with equal bits 1 and 2. Bit 3 of query
    # and key selects the word, and bit 0 of both the byte.
    query_group = ((first_query >> 4) << 2) + (((query >> 4) << 2) | ((query >> 1) & 3))
    key_group = ((first_key >> 4) << 2) + (((key >> 4) << 2) | ((key >> 1) & 3))
    w0, w1, w2, w3 = philox(key_group, query_group, sequence_id, counter, seed)
    lower, right = (query & 8) != 0, (key & 8) != 0
    word = tl.where(lower, tl.where(right, w3, w2), tl.where(right, w1, w0))
    return _kept(word, ((query & 1) << 1) | (key & 1), threshold)
