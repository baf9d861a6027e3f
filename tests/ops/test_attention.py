"""`attention`: against PyTorch on one sequence at a time, and independence of packing."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import compare_with_torch, dropout_over, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from bertfast import ops
from bertfast.ops import attention_fallback, reference
from bertfast.ops import sequences as sequences_module
from bertfast.ops.dropout import attention_keep
from bertfast.ops.sequences import Sequences

LENGTHS = [5, 0, 1, 19, 7]  # an empty sequence, a single token, more than one tile of 16
OPTIONS = [{}, {"causal": True}, {"window": 3}, {"causal": True, "window": 2}, {"scale": 0.7}]


def packed(lengths=LENGTHS, tokens=None, heads=2, dimension=4, sequence_ids=None):
    sequences = Sequences.from_lengths(lengths, capacity=tokens, sequence_ids=sequence_ids)
    return normal(sequences.capacity, 3, heads, dimension), sequences


def one_at_a_time(qkv, sequences, *, causal=False, window=None, scale=None, dropout=None):
    """Compute attention with scaled_dot_product_attention; with dropout, step by step."""
    outputs = []
    for sequence_id, part in zip(
        sequences.sequence_ids, qkv[: sequences.num_tokens].split(list(sequences.lengths)), strict=True
    ):
        length = len(part)
        query, key, value = part.permute(1, 2, 0, 3)
        i, j = torch.arange(length)[:, None], torch.arange(length)
        mask = (j <= i if causal else i == i) & ((i - j).abs() <= (length if window is None else window))
        if dropout is None:
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        else:
            scores = query @ key.mT * (scale or 1 / math.sqrt(query.shape[-1]))
            keep = attention_keep(dropout, sequence_id, len(query), length, range(length))
            probabilities = scores.masked_fill(~mask, -math.inf).softmax(-1)
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
def test_dropout_is_the_mask_of_the_specification(options):
    qkv, sequences = packed(tokens=40)
    options = options | {"dropout": dropout_over(sequences, 0.4)}
    output = ops.attention(qkv, sequences, **options)
    torch.testing.assert_close(output, one_at_a_time(qkv, sequences, **options))
    assert not torch.equal(output, ops.attention(qkv, sequences))


@pytest.mark.parametrize("p", [0, 0.4])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradient_is_the_derivative(options, p):
    qkv, sequences = packed([3, 0, 1, 4], tokens=9, heads=2, dimension=3)
    dropout = dropout_over(sequences, p) if p else None
    assert torch.autograd.gradcheck(lambda qkv: ops.attention(qkv, sequences, dropout=dropout, **options), [qkv])


@given(lengths=st.lists(st.integers(0, 20), max_size=5), padding=st.integers(0, 3), data=st.data())
@settings(max_examples=25, deadline=None)
def test_order_does_not_matter(lengths, padding, data):
    order = data.draw(st.permutations(range(len(lengths))))
    qkv, sequences = packed(lengths, tokens=sum(lengths) + padding)
    parts = qkv[: sequences.num_tokens].split(lengths)
    permuted = Sequences.from_lengths(
        [lengths[i] for i in order], sequence_ids=list(order), capacity=sequences.capacity
    )
    shuffled = torch.cat([*(parts[i] for i in order), qkv[sequences.num_tokens :]])

    def attention(qkv, sequences):
        return ops.attention(qkv, sequences, dropout=dropout_over(sequences))

    straight = attention(qkv, sequences)[: sequences.num_tokens].split(lengths)
    permuted_output = attention(shuffled, permuted)[: sequences.num_tokens].split(list(permuted.lengths))
    for index, i in enumerate(order):
        assert torch.equal(permuted_output[index], straight[i])


def test_nan_does_not_leak_between_sequences():
    qkv, sequences = packed()
    poisoned = qkv.detach().clone()
    poisoned[:5] = math.nan
    poisoned[6:25] = 1e30
    poisoned.requires_grad_()
    dropout = dropout_over(sequences)
    for part in (slice(5, 6), slice(25, 32)):
        outputs = [ops.attention(x, sequences, dropout=dropout)[part] for x in (qkv, poisoned)]
        assert torch.equal(*outputs)
        gradients = [torch.autograd.grad(o.square().sum(), x)[0] for o, x in zip(outputs, (qkv, poisoned), strict=True)]
        assert torch.equal(gradients[0][part], gradients[1][part])


def test_padding_slots_are_zero_even_if_they_hold_nan():
    qkv, sequences = packed([3, 2], tokens=8)
    poisoned = qkv.detach().clone()
    poisoned[5:] = math.nan
    poisoned.requires_grad_()
    output = ops.attention(poisoned, sequences)
    assert torch.equal(output[5:], torch.zeros_like(output[5:]))
    weights = torch.ones_like(output)
    weights[5:] = math.nan
    (gradient,) = torch.autograd.grad(output, poisoned, weights)
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


def test_errors_name_the_wrong_argument():
    qkv, sequences = packed([3, 2])
    with pytest.raises(ValueError, match="qkv holds 4 tokens, the sequences are packed into 5"):
        ops.attention(qkv[:4], sequences)
    with pytest.raises(ValueError, match=r"qkv must have shape \[5, 3, 2, 4\], got \[5, 2, 2, 4\]"):
        ops.attention(qkv[:, :2], sequences)
    with pytest.raises(ValueError, match="window must not be negative, got -1"):
        ops.attention(qkv, sequences, window=-1)
    with pytest.raises(TypeError, match="window must be an integer or None, got float"):
        ops.attention(qkv, sequences, window=1.5)
    with pytest.raises(ValueError, match=r"dropout.sequence_ids must have shape \[5\], got \[6\]"):
        ops.attention(qkv, sequences, dropout=dropout_over(Sequences.from_lengths([6])))
    with pytest.raises(ValueError, match="cu_seqlens is on meta"):
        ops.attention(qkv, sequences.to("meta"))
    many = normal(5, 3, 256, 1)
    with pytest.raises(ValueError, match="fewer than 256 heads, got 256"):
        ops.attention(many, sequences, dropout=dropout_over(sequences))
    assert ops.attention(many, sequences).shape == (5, 256, 1)


# The reference, and the fallback where there is no kernel.


@pytest.fixture
def on_a_device(monkeypatch):
    """As on a GPU, where the host reads no values: the fallback runs the reference on a few sequences at a time."""
    monkeypatch.setattr(sequences_module, "is_readable", lambda x: False)
    monkeypatch.setattr(attention_fallback, "_SCORE_ELEMENTS", 2 * 19**2 * 2)  # two sequences of LENGTHS


@pytest.mark.parametrize("p", [0, 0.4])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_reference_equals_pytorch(options, p):
    qkv, sequences = packed(tokens=40)
    dropout = dropout_over(sequences, p) if p else None
    weights = normal(40, 2, 4, seed=1).detach()
    results = []
    for function in (
        lambda: ops.attention(qkv, sequences, implementation="reference", dropout=dropout, **options),
        lambda: one_at_a_time(qkv, sequences, dropout=dropout, **options),
    ):
        output = function()
        results.append((output, *torch.autograd.grad(output, qkv, weights)))
    for x, expected in zip(*results, strict=True):
        torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_reference_has_a_second_derivative(options):
    qkv, sequences = packed([3, 0, 1], tokens=6, heads=1, dimension=2)
    dropout = dropout_over(sequences, 0.4)

    def definition(qkv):
        return ops.attention(qkv, sequences, implementation="reference", dropout=dropout, **options)

    assert torch.autograd.gradgradcheck(definition, [qkv])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_on_a_device_the_fallback_is_as_accurate_as_torch(options, dtype, on_a_device):
    qkv, sequences = packed(tokens=40, dimension=20)
    assert len(sequences) > attention_fallback._SCORE_ELEMENTS // (2 * 19**2), "in several chunks"
    compare_with_torch(
        lambda qkv: attention_fallback.attention(
            qkv, sequences, options.get("scale", 20**-0.5), options.get("causal", False), options.get("window"), None
        ),
        lambda qkv: one_at_a_time(qkv, sequences, **options),
        [qkv],
        dtype,
    )


def test_on_a_device_the_fallback_draws_the_same_dropout(monkeypatch):
    qkv, sequences = packed(tokens=40)
    arguments = (qkv, sequences, 0.5, False, None, dropout_over(sequences, 0.4))
    by_length = attention_fallback.attention(*arguments)
    monkeypatch.setattr(sequences_module, "is_readable", lambda x: False)
    monkeypatch.setattr(attention_fallback, "_SCORE_ELEMENTS", 1)
    torch.testing.assert_close(attention_fallback.attention(*arguments), by_length)


@pytest.mark.parametrize("poisoned", [slice(0, 5), slice(32, 40)], ids=["another sequence", "padding slots"])
def test_nan_does_not_leak_between_sequences_in_the_reference(poisoned):
    qkv, sequences = packed(tokens=40)
    other = qkv.detach().clone()
    other[poisoned] = math.nan
    other.requires_grad_()
    weights = torch.ones(40, 2, 4, dtype=qkv.dtype)
    weights[poisoned] = math.nan
    kept = torch.ones(40, dtype=torch.bool)
    kept[poisoned] = False
    outputs = [ops.attention(x, sequences, implementation="reference") for x in (qkv, other)]
    assert torch.equal(outputs[0][kept], outputs[1][kept])
    gradients = [torch.autograd.grad(o, x, weights)[0] for o, x in zip(outputs, (qkv, other), strict=True)]
    assert torch.equal(gradients[0][kept], gradients[1][kept])
    assert gradients[0][kept].isfinite().all()


def test_the_reference_supports_fake_tensors():
    with FakeTensorMode():
        cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
        sequences = Sequences.from_cu_seqlens(cu_seqlens, capacity=7, max_seqlen_bound=4)
        qkv = torch.randn(7, 3, 2, 5, requires_grad=True)
        output = ops.attention(qkv, sequences, dropout=dropout_over(sequences))
        output.sum().backward()
        assert (output.shape, qkv.grad.shape) == ((7, 2, 5), (7, 3, 2, 5))


@pytest.mark.parametrize("p", [0, 0.4])
@pytest.mark.parametrize("window", [None, 3])
def test_a_query_only_token_is_a_query_but_not_a_key(window, p):
    qkv, sequences = packed(tokens=40)
    dropout = dropout_over(sequences, p) if p else None
    query = normal(len(LENGTHS), 2, 4)
    output = reference.query_only_attention(query, qkv, sequences, 0.5, False, window, dropout)
    for row, part in enumerate(qkv[:32].split(LENGTHS)):
        key, value = part[:, 1:].permute(1, 2, 0, 3)
        scores = (query[row][:, None] @ key.mT * 0.5).masked_fill(torch.arange(len(part)) > (window or 99), -math.inf)
        probabilities = scores.softmax(-1)
        if dropout is not None:
            last = range(len(part), len(part) + 1)
            probabilities = probabilities * attention_keep(dropout, row, 2, len(part), last) * dropout.scale
        torch.testing.assert_close(output[row], (probabilities @ value)[:, 0])
    assert torch.equal(output[1], torch.zeros_like(output[1])), "an empty sequence gives zero"
    causal = reference.query_only_attention(query, qkv, sequences, 0.5, True, window, dropout)
    assert torch.equal(causal, torch.zeros_like(causal))
    gradients = torch.autograd.grad(output.sum(), (query, qkv))
    assert all(x.isfinite().all() for x in gradients)
