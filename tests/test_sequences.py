"""The packed layout."""

import pytest
import torch

from bertfast.sequences import Sequences


def test_lengths_and_cu_seqlens_say_the_same():
    ours = Sequences.from_lengths([3, 0, 2], capacity=7)
    again = Sequences.from_cu_seqlens(torch.tensor([0, 3, 3, 5], dtype=torch.int32), capacity=7)
    for sequences in (ours, again):
        assert sequences.cu_seqlens.tolist() == [0, 3, 3, 5]
        assert sequences.cu_seqlens.dtype == torch.int32
        assert sequences.lengths == (3, 0, 2)
        assert (sequences.num_tokens, sequences.capacity, sequences.max_seqlen) == (5, 7, 3)
        assert sequences.sequence_ids.tolist() == [0, 1, 2]
        assert sequences.sequence_index.tolist() == [0, 0, 0, 2, 2, 2, 2]
        assert sequences.position.tolist() == [0, 1, 2, 0, 1, 0, 0]
        assert sequences.first.tolist() == [0, 3, 3]


def test_tokens_carry_the_number_of_their_sequence():
    sequences = Sequences.from_lengths([1, 2], sequence_ids=[90, 7])
    assert sequences.token_sequence_ids.tolist() == [90, 7, 7]
    assert sequences.token_sequence_ids.dtype == torch.int64


def test_no_sequence_at_all():
    for sequences in (Sequences.from_lengths([]), Sequences.from_lengths([], capacity=4)):
        assert (sequences.num_tokens, sequences.max_seqlen) == (0, 0)
        for x in (sequences.position, sequences.sequence_index, sequences.token_sequence_ids):
            assert len(x) == sequences.capacity


def test_moving_keeps_everything():
    sequences = Sequences.from_lengths([2, 3], sequence_ids=[4, 5], capacity=6)
    moved = sequences.to("meta")
    assert moved.cu_seqlens.device.type == moved.sequence_ids.device.type == "meta"
    assert (moved.lengths, moved.capacity) == (sequences.lengths, sequences.capacity)


@pytest.mark.parametrize(
    ("cu_seqlens", "sentence"),
    [
        (torch.tensor([1, 2]), "must start at 0, got 1"),
        (torch.tensor([0, 3, 2]), "must never decrease"),
        (torch.tensor([0.0, 1.0]), r"integer tensor of shape \[sequences \+ 1\], got torch.float32"),
        (torch.tensor([[0, 1]]), r"got torch.int64 of shape \(1, 2\)"),
        (torch.tensor([], dtype=torch.int32), r"of shape \(0,\)"),
        (torch.tensor([0, 9]), "hold 9 tokens, more than the 8 slots"),
    ],
)
def test_wrong_cu_seqlens_are_refused(cu_seqlens, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sequences.from_cu_seqlens(cu_seqlens, capacity=8)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"lengths": [2, -1]}, "must not be negative, got -1"),
        ({"lengths": [2, 3], "capacity": 4}, "hold 5 tokens, more than the 4 slots"),
        ({"lengths": [2, 3], "sequence_ids": [1]}, r"2 sequences need as many sequence ids, got shape \(1,\)"),
        ({"lengths": [2], "capacity": 2**31}, r"fewer than 2\*\*31 tokens"),
    ],
)
def test_wrong_lengths_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sequences.from_lengths(**arguments)
