"""Operators called directly: `cu_seqlens` or lengths instead of `Sequences`, a probability instead of `Dropout`."""

import pytest
import torch
from helpers import normal

from bertfast import ops
from bertfast.ops.dropout import Dropout
from bertfast.ops.sequences import Sequences

LENGTHS = [5, 0, 9]
TOKENS = sum(LENGTHS)


def qkv() -> torch.Tensor:
    return normal(TOKENS, 3, 2, 32, dtype=torch.float32)


@pytest.mark.parametrize(
    "sequences", [torch.tensor([0, 5, 5, 14]), torch.tensor([0, 5, 5, 14]).int(), LENGTHS, (5, 0, 9)]
)
def test_attention_takes_cu_seqlens_and_lengths(sequences):
    expected = ops.attention(qkv(), Sequences.from_lengths(LENGTHS))
    assert torch.equal(ops.attention(qkv(), sequences), expected)


@pytest.mark.parametrize("sequences", [torch.tensor([0, 5, 13]), [5, 8], torch.tensor([0, 5, 9])])
def test_sequences_that_do_not_cover_all_tokens_are_refused(sequences):
    """A tensor of lengths that starts with 0 would pass for cu_seqlens otherwise."""
    with pytest.raises(
        ValueError, match=r"must cover all 14 tokens of qkv \(pass Sequences if some are padding\), got"
    ):
        ops.attention(qkv(), sequences)


def test_a_tensor_of_lengths_is_refused():
    with pytest.raises(ValueError, match="cu_seqlens must start at 0, got 5"):
        ops.attention(qkv(), torch.tensor([5, 0, 9]))


@pytest.mark.parametrize("sequences", [None, 14, "14", {5: 9}])
def test_other_types_of_sequences_are_named(sequences):
    with pytest.raises(TypeError, match=f"attention: sequences must be .* got {type(sequences).__name__}"):
        ops.attention(qkv(), sequences)


def calls(dropout):
    """Every operator that drops, on fixed inputs."""
    x, vector = normal(TOKENS, 64, dtype=torch.float32), normal(64, dtype=torch.float32)
    ids = torch.arange(TOKENS)
    yield ops.attention(qkv(), LENGTHS, dropout=dropout)
    yield ops.add_layer_norm(x, x, vector, vector, vector, 1e-12, dropout)
    yield ops.pre_norm(x, x, vector, vector, vector, 1e-12, dropout)[0]
    yield ops.embeddings(ids % 5, ids % 2, ids, x, x, x[:2], vector, vector, 1e-12, dropout)


def test_a_probability_draws_from_torchs_generator():
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(list(calls(0.3)))
    for first, again, other in zip(*results, strict=True):
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_a_probability_of_zero_is_no_dropout():
    state = torch.get_rng_state()
    for zero, none in zip(calls(0.0), calls(None), strict=True):
        assert torch.equal(zero, none)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_probability_is_the_rate_and_keeps_the_expectation():
    x, zeros = torch.ones(400, 500), torch.zeros(400, 500)
    ids = torch.arange(400)
    y = ops.embeddings(
        ids, ids % 2, ids, x, zeros, zeros[:2], zeros[0], zeros[0] + 1, 1e-12, 0.3
    )  # LN gives beta, ones
    kept = (y != 0).float().mean().item()
    assert kept == pytest.approx(Dropout(0.3, ids[0], 0, ids, ids).scale ** -1, abs=0.01)
    assert y.mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("dropout", ["0.1", True, torch.tensor(0.1)])
def test_other_types_of_dropout_are_named(dropout):
    with pytest.raises(TypeError, match=f"dropout must be a probability, .* got {type(dropout).__name__}"):
        list(calls(dropout))


@pytest.mark.parametrize("dropout", [1.0, -0.1, float("nan")])
def test_a_probability_outside_its_range_is_refused(dropout):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        list(calls(dropout))


@pytest.mark.parametrize("lengths", [[5, 9.5], [5, "9"], [5, None]])
def test_lengths_that_are_not_integers_are_refused(lengths):
    """5.9 would pass for 5 otherwise."""
    with pytest.raises(TypeError, match=f"lengths must be integers, got {lengths[1]!r}"):
        ops.attention(qkv(), lengths)


@pytest.mark.parametrize("window", [-1, 1.5, "1", (1, 1)])
def test_an_invalid_window_is_refused(window):
    with pytest.raises((TypeError, ValueError), match=r"attention: window must (be an integer|not be negative)"):
        ops.attention(qkv(), LENGTHS, window=window)


def test_a_tensor_as_scale_is_refused():
    with pytest.raises(TypeError, match="attention: scale must be a number, got Tensor: multiply the queries by it"):
        ops.attention(qkv(), LENGTHS, scale=torch.tensor(0.5, requires_grad=True))


def test_a_missing_tensor_is_named():
    x = torch.ones(2, 8)
    with pytest.raises(TypeError, match="bias_gelu: bias must be a tensor, got NoneType"):
        ops.bias_gelu(x, None)
    with pytest.raises(TypeError, match="attention: qkv must be a tensor, got NoneType"):
        ops.attention(None, Sequences.from_lengths(LENGTHS))
    with pytest.raises(TypeError, match="gather: at least one tensor is required"):
        ops.gather(torch.tensor([0]))


def test_an_invalid_compute_dtype_is_refused():
    x = torch.ones(2, 8)
    with pytest.raises(TypeError, match=r"compute_dtype must be a floating-point torch\.dtype, got 'bf16'"):
        ops.add_layer_norm(x, x, None, x[0], x[0], 1e-12, compute_dtype="bf16")
