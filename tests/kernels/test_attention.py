"""The kernels of `attention`, against the reference."""

import math
from itertools import permutations

import pytest
import torch
from helpers import (
    DEVICE,
    HIGHEST_PRECISION,
    KERNELS,
    compare_with_torch,
    dropout_over,
    normal,
    tf32x3_factor,
    with_half,
)

from bertfast import ops
from bertfast.ops.dropout import attention_keep
from bertfast.ops.sequences import Sequences

HALF, BF16 = torch.float16, torch.bfloat16
LENGTHS = {
    "short32": [5, 32, 0, 1, 17],  # one per block shape of the tables: all within 32 tokens,
    "short64": [64, 33, 1],  # within 64,
    "short128": [65, 128, 3],  # within 128,
    "long": [130, 1, 0, 64, 200],  # and beyond, where short sequences have a separate kernel
}


def layout(lengths, padding=3, **options) -> Sequences:
    return Sequences.from_lengths(lengths, capacity=sum(lengths) + padding, device=DEVICE, **options)


def attend(qkv, sequences, p=0.0, implementation=KERNELS, **options):
    dropout = dropout_over(sequences, p) if p else None
    return ops.attention(qkv, sequences, dropout=dropout, implementation=implementation, **options)


def inputs(sequences, heads=2, head_dimension=32, dtype=torch.float64):
    return normal(sequences.capacity, 3, heads, head_dimension, dtype=dtype, device=DEVICE)


def compare(sequences, dtype=HIGHEST_PRECISION, p=0.0, heads=2, head_dimension=32, qkv=None, **options):
    compare_with_torch(
        lambda x: attend(x, sequences, p, **options),
        lambda x: attend(x, sequences, p, "reference", **options),
        [inputs(sequences, heads, head_dimension) if qkv is None else qkv],
        dtype,
        factor=tf32x3_factor(dtype),
    )


def output_and_gradient(qkv, sequences, p=0.0, **options):
    """Return output and gradient."""
    qkv = qkv.detach().requires_grad_()
    o = attend(qkv, sequences, p, **options)
    d_o = normal(*o.shape, seed=1, dtype=qkv.dtype, device=DEVICE)
    return o.detach(), torch.autograd.grad(o, qkv, d_o)[0]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("head_dimension", [32, 64, 128])
@pytest.mark.parametrize("dtype", [HIGHEST_PRECISION, BF16], ids=["highest", "bf16"])
def test_is_as_accurate_as_the_reference(lengths, head_dimension, dtype):
    for p in (0.0, 0.3):
        compare(layout(lengths), dtype, p, 1, head_dimension)


@with_half
def test_half_precision_and_three_heads():
    compare(layout([40, 7]), HALF, 0.1, heads=3)


@pytest.mark.parametrize("lengths", [LENGTHS["short64"], LENGTHS["long"]], ids=["short", "long"])
@pytest.mark.parametrize("options", [{"causal": True}, {"window": 20}, {"window": 1}, {"causal": True, "window": 70}])
def test_causal_and_window(lengths, options):
    compare(layout(lengths), p=0.3, heads=1, **options)


def test_scale():
    compare(layout([40, 7]), scale=0.3)


def test_a_long_sequence():
    compare(layout([8192 if DEVICE.type == "cuda" else 1100]), heads=1)


def test_max_seqlen_bound_changes_only_which_kernels_run():
    """As in a run whose batches all use the same kernels."""
    compare(layout([5, 32, 0, 1], max_seqlen_bound=512), p=0.3)


@pytest.mark.parametrize(
    ("length", "p"),
    [*((length, 0.3) for length in (1, 15, 16, 17, 31, 33, 63, 65, 127, 129)), (65, 0.5), (65, 0.7)],
)  # around the sizes of groups and tiles; with p >= 0.5 only bytes from 128 on are kept
def test_mask_is_bitwise_identical_to_the_reference(length, p):
    """With uniform probabilities and one-hot values the output shows which keys were kept, and d_v which queries."""
    sequences = layout([2, length], sequence_ids=[3, 1 << 31])
    dropout = dropout_over(sequences, p)
    expected = attention_keep(dropout, 1 << 31, 2, length, range(length))
    slots = torch.arange(2, 2 + length, device=DEVICE)
    for first in range(0, length, 128):
        keys = torch.arange(first, min(first + 128, length), device=DEVICE)
        identity = torch.zeros(sequences.capacity, 2, 128, dtype=HIGHEST_PRECISION, device=DEVICE)
        identity[2 + keys, :, keys - first] = 1
        qkv = torch.zeros(sequences.capacity, 3, 2, 128, dtype=HIGHEST_PRECISION, device=DEVICE)
        qkv[:, 2] = identity
        qkv.requires_grad_()
        o = attend(qkv, sequences, p)
        kept = (o[slots] != 0).permute(1, 0, 2)[..., : len(keys)]  # heads, queries, keys
        assert torch.equal(kept, expected[:, :, first : first + 128])
        d_v = torch.autograd.grad(o, qkv, identity)[0][slots, 2]
        assert torch.equal((d_v != 0).permute(1, 2, 0)[:, : len(keys)], expected[:, first : first + 128])


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [[40, 30], [40, 150]], ids=["short", "long"])
def test_scores_far_below_zero(lengths, p):
    """exp2(x) is 0 below -128 and infinite above 128: tails must be selected, not multiplied."""
    sequences = layout(lengths)
    qkv = 0.05 * inputs(sequences, 1, 64).detach()
    qkv[:, 0] += 5
    qkv[:, 1] -= 5
    compare(sequences, p=p, qkv=qkv)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 9}], ids=["all", "causal", "window"])
def test_nan_does_not_leak_between_sequences(options):
    sequences = layout([40, 70, 150, 20])
    clean = inputs(sequences, 1, dtype=HIGHEST_PRECISION).detach()
    with_nan = clean.clone()
    with_nan[40:110] = math.nan
    with_nan[sequences.num_tokens :] = math.nan
    others = torch.cat([torch.arange(40), torch.arange(110, sequences.capacity)]).to(DEVICE)
    for actual, expected in zip(
        output_and_gradient(with_nan, sequences, 0.3, **options),
        output_and_gradient(clean, sequences, 0.3, **options),
        strict=True,
    ):
        assert torch.equal(actual[others], expected[others])


def test_blocks_outside_of_a_window_are_not_visited():
    """If they were, their NaN would reach the result: 0 times NaN is NaN."""
    length, window = 768, 64
    far = window + 2 * 128  # no block has more than 128 queries or keys
    clean = inputs(layout([length], 0), 1, dtype=HIGHEST_PRECISION).detach()
    for begin, end, others in ((0, 100, slice(100 + far, None)), (length - 100, length, slice(length - 100 - far))):
        with_nan = clean.clone()
        with_nan[begin:end] = math.nan
        for actual, expected in zip(
            output_and_gradient(with_nan, layout([length], 0), window=window),
            output_and_gradient(clean, layout([length], 0), window=window),
            strict=True,
        ):
            assert torch.equal(actual[others], expected[others])


@pytest.mark.parametrize("lengths", [[5, 20], [5, 200]], ids=["short", "long"])
@pytest.mark.parametrize("padding", [1, 300])
def test_padding_slots_are_zero(lengths, padding):
    sequences = layout(lengths, padding)
    for result in output_and_gradient(inputs(sequences, dtype=HIGHEST_PRECISION), sequences, 0.3):
        assert torch.equal(result[sequences.num_tokens :], torch.zeros_like(result[sequences.num_tokens :]))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
@pytest.mark.parametrize("padding", [0, 5])
def test_sequences_without_tokens_give_zeros(lengths, padding):
    sequences = layout(lengths, padding)
    for result in output_and_gradient(inputs(sequences, dtype=HIGHEST_PRECISION), sequences):
        assert torch.equal(result, torch.zeros_like(result))


def test_a_sequence_does_not_depend_on_its_position_in_the_batch():
    lengths, sequence_ids = [5, 150, 33], [7, 11, 2]
    qkv = inputs(layout(lengths, 0), dtype=HIGHEST_PRECISION).detach().split(lengths)
    alone = [
        output_and_gradient(x, layout([len(x)], 0, sequence_ids=[sequence_id], max_seqlen_bound=150))[0]
        for x, sequence_id in zip(qkv, sequence_ids, strict=True)
    ]
    for order in permutations(range(3)):
        sequences = layout([lengths[i] for i in order], 0, sequence_ids=[sequence_ids[i] for i in order])
        together = output_and_gradient(torch.cat([qkv[i] for i in order]), sequences)[0]
        assert torch.equal(together, torch.cat([alone[i] for i in order]))


def test_tokens_may_have_any_stride_and_gradients_be_expanded():
    sequences = layout([20, 140])
    dense = inputs(sequences, dtype=HIGHEST_PRECISION).detach()
    apart = torch.stack([dense, dense], 1)[:, 0]
    assert torch.equal(attend(apart, sequences), attend(dense, sequences))
    dense.requires_grad_()
    expanded = torch.autograd.grad(attend(dense, sequences).sum(), dense)[0]
    ones = torch.ones(sequences.capacity, 2, 32, dtype=HIGHEST_PRECISION, device=DEVICE)
    assert torch.equal(expanded, torch.autograd.grad(attend(dense, sequences), dense, ones)[0])


def test_is_bitwise_reproducible():
    sequences = layout([20, 140])
    qkv = inputs(sequences, dtype=BF16)
    for a, b in zip(output_and_gradient(qkv, sequences, 0.3), output_and_gradient(qkv, sequences, 0.3), strict=True):
        assert torch.equal(a, b)


def test_unsupported_inputs_are_refused_with_the_reason():
    sequences = layout([4], 0)
    with pytest.raises(ValueError, match="head dimensions of 32, 64 and 128, qkv has 20; pass implementation='ref"):
        attend(inputs(sequences, head_dimension=20, dtype=HIGHEST_PRECISION), sequences)
    with pytest.raises(ValueError, match="require a positive scale, got -1"):
        attend(inputs(sequences, dtype=HIGHEST_PRECISION), sequences, scale=-1.0)
