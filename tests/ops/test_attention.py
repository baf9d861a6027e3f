"""`attention`: against torch's own, one sequence at a time, and what packing must not change."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import compare_with_torch, dropout_over, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from bertfast import ops
from bertfast.dropout import attention_keep
from bertfast.sequences import Sequences

LENGTHS = [5, 0, 1, 19, 7]  # an empty sequence, a single token, more than one tile of 16
OPTIONS = [{}, {"causal": True}, {"window": 3}, {"causal": True, "window": 2}, {"scale": 0.7}]


def packed(lengths=LENGTHS, tokens=None, heads=2, dimension=4, numbers=None):
    sequences = Sequences.from_lengths(lengths, capacity=tokens, sequence_ids=numbers)
    return normal(sequences.capacity, 3, heads, dimension), sequences


def one_at_a_time(qkv, sequences, *, causal=False, window=None, scale=None, dropout=None):
    """The same by scaled_dot_product_attention; with dropout, by its parts."""
    outputs = []
    for number, part in zip(
        sequences.sequence_ids, qkv[: sequences.num_tokens].split(list(sequences.lengths)), strict=True
    ):
        length = len(part)
        query, key, value = part.permute(1, 2, 0, 3)
        i, j = torch.arange(length)[:, None], torch.arange(length)
        visible = (j <= i if causal else i == i) & ((i - j).abs() <= (length if window is None else window))
        if dropout is None:
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)
        else:
            scores = query @ key.mT * (scale or 1 / math.sqrt(query.shape[-1]))
            keep = attention_keep(dropout, number, len(query), length, range(length))
            probabilities = scores.masked_fill(~visible, -math.inf).softmax(-1)
            output = (probabilities * keep * dropout.scale) @ value
        outputs.append(output.transpose(0, 1))
    return torch.cat([*outputs, qkv.new_zeros(sequences.capacity - sequences.num_tokens, *qkv.shape[2:])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_is_as_accurate_as_torch(options, dtype):
    qkv, sequences = packed(tokens=40, dimension=20)
    compare_with_torch(
        lambda qkv: ops.attention(qkv, sequences, **options),
        lambda qkv: one_at_a_time(qkv, sequences, **options),
        [qkv],
        dtype,
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_dropout_is_the_definition(options):
    qkv, sequences = packed(tokens=40)
    options = options | {"dropout": dropout_over(sequences, 0.4)}
    ours = ops.attention(qkv, sequences, **options)
    torch.testing.assert_close(ours, one_at_a_time(qkv, sequences, **options))
    assert not torch.equal(ours, ops.attention(qkv, sequences))


@pytest.mark.parametrize("p", [0, 0.4])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradient_is_the_derivative(options, p):
    qkv, sequences = packed([3, 0, 1, 4], tokens=9, heads=2, dimension=3)
    dropout = dropout_over(sequences, p) if p else None
    assert torch.autograd.gradcheck(lambda qkv: ops.attention(qkv, sequences, dropout=dropout, **options), [qkv])


@given(lengths=st.lists(st.integers(0, 20), max_size=5), inert=st.integers(0, 3), data=st.data())
@settings(max_examples=25, deadline=None)
def test_order_does_not_matter(lengths, inert, data):
    order = data.draw(st.permutations(range(len(lengths))))
    qkv, sequences = packed(lengths, tokens=sum(lengths) + inert)
    parts = qkv[: sequences.num_tokens].split(lengths)
    permuted = Sequences.from_lengths(
        [lengths[i] for i in order], sequence_ids=list(order), capacity=sequences.capacity
    )
    shuffled = torch.cat([*(parts[i] for i in order), qkv[sequences.num_tokens :]])

    def attention(qkv, sequences):
        return ops.attention(qkv, sequences, dropout=dropout_over(sequences))

    straight = attention(qkv, sequences)[: sequences.num_tokens].split(lengths)
    other = attention(shuffled, permuted)[: sequences.num_tokens].split(list(permuted.lengths))
    for place, i in enumerate(order):
        assert torch.equal(other[place], straight[i])


def test_neighbours_do_not_matter_even_if_they_are_not_numbers():
    qkv, sequences = packed()
    spoilt = qkv.detach().clone()
    spoilt[:5] = math.nan
    spoilt[6:25] = 1e30
    spoilt.requires_grad_()
    dropout = dropout_over(sequences)
    for part in (slice(5, 6), slice(25, 32)):
        outputs = [ops.attention(x, sequences, dropout=dropout)[part] for x in (qkv, spoilt)]
        assert torch.equal(*outputs)
        gradients = [torch.autograd.grad(o.square().sum(), x)[0] for o, x in zip(outputs, (qkv, spoilt), strict=True)]
        assert torch.equal(gradients[0][part], gradients[1][part])


def test_inert_places_are_zero_whatever_they_hold():
    qkv, sequences = packed([3, 2], tokens=8)
    spoilt = qkv.detach().clone()
    spoilt[5:] = math.nan
    spoilt.requires_grad_()
    output = ops.attention(spoilt, sequences)
    assert torch.equal(output[5:], torch.zeros_like(output[5:]))
    weights = torch.ones_like(output)
    weights[5:] = math.nan
    (gradient,) = torch.autograd.grad(output, spoilt, weights)
    assert torch.equal(gradient[5:], torch.zeros_like(gradient[5:]))
    assert gradient[:5].isfinite().all()


@pytest.mark.parametrize("tokens", [0, 4])
def test_no_sequence_at_all(tokens):
    qkv, sequences = packed([], tokens=tokens)
    output = ops.attention(qkv, sequences)
    output.sum().backward()
    assert torch.equal(output, torch.zeros(tokens, 2, 4, dtype=qkv.dtype))
    assert torch.equal(qkv.grad, torch.zeros_like(qkv))


def test_one_token_attends_to_itself():
    qkv, sequences = packed([1])
    assert torch.equal(ops.attention(qkv, sequences), qkv[:, 2])


def test_output_lies_within_the_values_of_its_sequence():
    qkv, sequences = packed()
    for output, part in zip(ops.attention(qkv, sequences).split(LENGTHS), qkv.split(LENGTHS), strict=True):
        if len(part):
            assert (output <= part[:, 2].amax(0) + 1e-12).all()
            assert (output >= part[:, 2].amin(0) - 1e-12).all()


def test_a_constant_added_to_the_keys_changes_nothing():
    qkv, sequences = packed()
    shift = torch.zeros(3, 2, 4, dtype=qkv.dtype)
    shift[1] = 3
    torch.testing.assert_close(ops.attention(qkv + shift, sequences), ops.attention(qkv, sequences))


def test_wrong_arguments_are_refused():
    qkv, sequences = packed([3, 2])
    with pytest.raises(ValueError, match="qkv holds 4 tokens, the sequences are packed into 5"):
        ops.attention(qkv[:4], sequences)
    with pytest.raises(
        ValueError, match=r"qkv must have shape \[tokens, 3, heads, head_dimension\], got \[5, 2, 2, 4\]"
    ):
        ops.attention(qkv[:, :2], sequences)
    with pytest.raises(ValueError, match="window must not be negative, got -1"):
        ops.attention(qkv, sequences, window=-1)
    with pytest.raises(ValueError, match=r"dropout.sequence_number must have shape \[5\], got \[6\]"):
        ops.attention(qkv, sequences, dropout=dropout_over(Sequences.from_lengths([6])))
    with pytest.raises(ValueError, match="cu_seqlens is on meta"):
        ops.attention(qkv, sequences.to("meta"))
    many = normal(5, 3, 256, 1)
    with pytest.raises(ValueError, match="fewer than 256 heads, got 256"):
        ops.attention(many, sequences, dropout=dropout_over(sequences))
    assert ops.attention(many, sequences).shape == (5, 256, 1)
