"""The packed layout."""

import pytest
import torch

from bertfast.sequences import Sequences


def test_lengths_and_cu_seqlens_say_the_same():
    ours = Sequences.from_lengths([3, 0, 2], tokens=7)
    again = Sequences.from_cu_seqlens(torch.tensor([0, 3, 3, 5], dtype=torch.int32), tokens=7)
    for sequences in (ours, again):
        assert sequences.cu_seqlens.tolist() == [0, 3, 3, 5]
        assert sequences.cu_seqlens.dtype == torch.int32
        assert sequences.lengths == (3, 0, 2)
        assert (sequences.used, sequences.tokens, sequences.longest) == (5, 7, 3)
        assert sequences.numbers.tolist() == [0, 1, 2]
        assert sequences.token_index.tolist() == [0, 0, 0, 2, 2, 2, 2]
        assert sequences.position.tolist() == [0, 1, 2, 0, 1, 0, 0]
        assert sequences.first.tolist() == [0, 3, 3]


def test_tokens_carry_the_number_of_their_sequence():
    sequences = Sequences.from_lengths([1, 2], numbers=[90, 7])
    assert sequences.token_number.tolist() == [90, 7, 7]
    assert sequences.token_number.dtype == torch.int64


def test_no_sequence_at_all():
    for sequences in (Sequences.from_lengths([]), Sequences.from_lengths([], tokens=4)):
        assert (sequences.used, sequences.longest) == (0, 0)
        assert len(sequences.position) == len(sequences.token_index) == len(sequences.token_number) == sequences.tokens


def test_moving_keeps_everything():
    sequences = Sequences.from_lengths([2, 3], numbers=[4, 5], tokens=6)
    moved = sequences.to("meta")
    assert moved.cu_seqlens.device.type == moved.numbers.device.type == "meta"
    assert (moved.lengths, moved.tokens) == (sequences.lengths, sequences.tokens)


@pytest.mark.parametrize(
    ("cu_seqlens", "sentence"),
    [
        (torch.tensor([1, 2]), "must start at 0, got 1"),
        (torch.tensor([0, 3, 2]), "must never decrease"),
        (torch.tensor([0.0, 1.0]), r"integer tensor of shape \[sequences \+ 1\], got torch.float32"),
        (torch.tensor([[0, 1]]), r"got torch.int64 of shape \(1, 2\)"),
        (torch.tensor([], dtype=torch.int32), r"of shape \(0,\)"),
        (torch.tensor([0, 9]), "hold 9 tokens, more than the 8 places"),
    ],
)
def test_wrong_cu_seqlens_are_refused(cu_seqlens, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sequences.from_cu_seqlens(cu_seqlens, tokens=8)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"lengths": [2, -1]}, "must not be negative, got -1"),
        ({"lengths": [2, 3], "tokens": 4}, "hold 5 tokens, more than the 4 places"),
        ({"lengths": [2, 3], "numbers": [1]}, r"2 sequences want as many numbers, got shape \(1,\)"),
        ({"lengths": [2], "tokens": 2**31}, r"fewer than 2\*\*31 tokens"),
    ],
)
def test_wrong_lengths_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sequences.from_lengths(**arguments)
