"""The packed layout: `Sequences`, its checks on CPU and GPU, and buckets of token counts."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from bertfast.ops import sequences as module
from bertfast.ops.sequences import Sequences, bucket


def test_lengths_and_cu_seqlens_give_the_same_sequences():
    built = [
        Sequences.from_lengths([3, 0, 2], capacity=7),
        Sequences.from_lengths(torch.tensor([3, 0, 2]), capacity=7),
        Sequences.from_cu_seqlens(torch.tensor([0, 3, 3, 5]), capacity=7),
    ]
    for sequences in built:
        assert sequences.cu_seqlens.tolist() == [0, 3, 3, 5]
        assert sequences.cu_seqlens.dtype == torch.int32
        assert sequences.lengths == (3, 0, 2)
        assert (len(sequences), sequences.num_tokens, sequences.capacity, sequences.max_seqlen) == (3, 5, 7, 3)
        assert sequences.max_seqlen_bound == 3
        assert sequences.sequence_ids.tolist() == [0, 1, 2]
        assert sequences.sequence_index.tolist() == [0, 0, 0, 2, 2, 2, 2]
        assert sequences.position.tolist() == [0, 1, 2, 0, 1, 0, 0]
        assert sequences.is_token.tolist() == [True] * 5 + [False] * 2
        assert sequences.first.tolist() == [0, 1, 3]
        assert sequences.last.tolist() == [2, 2, 4]


def test_without_a_capacity_there_are_no_padding_slots():
    assert Sequences.from_lengths([3, 2]).capacity == 5
    assert Sequences.from_cu_seqlens(torch.tensor([0, 3, 5])).capacity == 5


def test_empty_sequences_have_different_first_slots():
    sequences = Sequences.from_lengths([4] + [0] * 6, capacity=8)
    assert len(set(sequences.first[1:].tolist())) == 6
    assert (sequences.first < 8).all()


def test_tokens_have_the_id_of_their_sequence():
    sequences = Sequences.from_lengths([1, 2], sequence_ids=[90, 7])
    assert sequences.token_sequence_ids.tolist() == [90, 7, 7]
    assert sequences.token_sequence_ids.dtype == torch.int64


def test_the_sequence_table_has_the_longest_first_and_empty_ones_without_rows():
    table = Sequences.from_lengths([5, 0, 7, 9], capacity=23).sequence_table.tolist()
    assert table[:3] == [[3, 12, 9, 0], [2, 5, 7, 0], [0, 0, 5, 0]]
    assert len(table) == 5
    assert table[3][3] >= table[3][2]  # its first row is beyond its end
    assert Sequences.from_lengths([]).sequence_table.shape == (1, 4)


def test_no_sequence_at_all():
    for sequences in (Sequences.from_lengths([]), Sequences.from_lengths([], capacity=4)):
        assert (len(sequences), sequences.num_tokens, sequences.max_seqlen) == (0, 0, 0)
        for x in (sequences.position, sequences.sequence_index, sequences.token_sequence_ids):
            assert len(x) == sequences.capacity


def test_sequences_move_to_a_device():
    sequences = Sequences.from_lengths([2, 3], sequence_ids=[4, 5], capacity=6, max_seqlen_bound=8)
    moved = sequences.to("meta")
    assert moved.cu_seqlens.device.type == moved.sequence_ids.device.type == "meta"
    assert (moved.capacity, moved.max_seqlen_bound) == (6, 8)
    assert moved.position.shape == moved.token_sequence_ids.shape == (6,)


@pytest.mark.parametrize(
    ("cu_seqlens", "sentence"),
    [
        (torch.tensor([1, 2]), "must start at 0, got 1"),
        (torch.tensor([0, 3, 2]), "must never decrease: a length is negative, got -1"),
        (torch.tensor([0, 200, 100], dtype=torch.uint8), r"int64 or int32 tensor .*, got torch.uint8"),
        (torch.tensor([0.0, 1.0]), r"int64 or int32 tensor of shape \[sequences \+ 1\], got torch.float32"),
        (torch.tensor([[0, 1]]), r"got torch.int64 of shape \(1, 2\)"),
        (torch.tensor([], dtype=torch.int32), r"of shape \(0,\)"),
        (torch.tensor([0, 9]), "more tokens than the 8 slots they are packed into, got 9"),
        (torch.tensor([0, 7]), "no sequence may be longer than max_seqlen_bound, 6 tokens, got 7"),
    ],
)
def test_wrong_cu_seqlens_are_refused(cu_seqlens, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sequences.from_cu_seqlens(cu_seqlens, capacity=8, max_seqlen_bound=6)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"lengths": [2, -1]}, "must not be negative, got -1"),
        ({"lengths": torch.tensor([0.5])}, r"integers of shape \[sequences\], got torch.float32"),
        ({"lengths": [2, 3], "capacity": 4}, "more tokens than the 4 slots they are packed into, got 5"),
        ({"lengths": [2, 3], "max_seqlen_bound": 2}, "max_seqlen_bound, 2 tokens, got 3"),
        ({"lengths": [2, 3], "sequence_ids": [1]}, r"2 sequences need as many sequence ids, got shape \(1,\)"),
        ({"lengths": [2], "capacity": 2**31}, r"fewer than 2\*\*31 tokens"),
    ],
)
def test_wrong_lengths_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sequences.from_lengths(**arguments)


@pytest.mark.parametrize(
    ("cu_seqlens", "rule"),
    [([1, 2], "must start at 0"), ([0, 3, 2], "never decrease"), ([0, 9], "more tokens"), ([0, 7], "longer than")],
)
def test_wrong_values_on_a_device_fail_a_device_side_assertion(cu_seqlens, rule, monkeypatch):
    """Emulated on the CPU, where the assertion fails at once."""
    monkeypatch.setattr(module, "is_readable", lambda x: False)
    with pytest.raises(RuntimeError, match=rule):
        Sequences.from_cu_seqlens(torch.tensor(cu_seqlens), capacity=8, max_seqlen_bound=6)
    sequences = Sequences.from_cu_seqlens(torch.tensor([0, 5]), capacity=8)
    assert sequences.max_seqlen_bound == 8
    with pytest.raises(ValueError, match="give capacity, the number of packed slots"):
        Sequences.from_cu_seqlens(torch.tensor([0, 5]))


def test_fake_tensors_have_the_same_shapes():
    with FakeTensorMode():
        sequences = Sequences.from_cu_seqlens(torch.tensor([0, 3, 5], dtype=torch.int32), capacity=7)
        assert not sequences.on_host
        for x in (sequences.position, sequences.token_sequence_ids, sequences.sequence_index, sequences.is_token):
            assert x.shape == (7,)
        assert sequences.first.shape == sequences.last.shape == (2,)


@given(st.integers(1, 1 << 24))
def test_a_bucket_wastes_at_most_an_eighth(count):
    size = bucket(count)
    assert count <= size
    assert size <= max(1.125 * count, count + 7)
    assert size % 8 == 0
    assert bucket(size) == size
    assert bucket(count + 1) >= size


def test_buckets_are_few():
    assert bucket(0) == 0
    assert len({bucket(count) for count in range(1, 65_537)}) <= 90


@pytest.mark.parametrize(
    "lengths", [[2.7, 3.2], torch.tensor([2.0, 3.0]), torch.tensor([True, True]), torch.tensor([2j, 3j])]
)
def test_lengths_of_other_types_are_refused(lengths):
    with pytest.raises((TypeError, ValueError), match="lengths must be integers"):
        Sequences.from_lengths(lengths)


def test_integers_of_every_type_are_lengths():
    lengths = [numpy.int32(2), torch.tensor(3)]
    assert Sequences.from_lengths(lengths).lengths == (2, 3)


def test_sequence_ids_of_other_types_are_refused():
    with pytest.raises(ValueError, match=r"sequence ids must be integers, got torch\.float32"):
        Sequences.from_lengths([2, 3], sequence_ids=[0.5, 1.5])


def test_a_list_of_cu_seqlens_is_refused():
    with pytest.raises(TypeError, match="cu_seqlens must be an integer tensor, got list"):
        Sequences.from_cu_seqlens([0, 3])
