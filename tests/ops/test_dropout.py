"""Dropout's masks: the generator against published vectors, their layout against a definition element by element."""

import math

import pytest
import torch

from bertfast.ops.dropout import (
    Dropout,
    RngCoordinates,
    attention_keep,
    attention_keep_at,
    hidden_keep,
    operation_id,
    philox,
)
from bertfast.ops.sequences import Sequences

SEED = torch.tensor(0x1234_5678_9ABC_DEF0)


def signed(value: int) -> torch.Tensor:
    """The int64 with these 64 bits."""
    return torch.tensor(value - (1 << 64) if value >> 63 else value)


def plain_philox(counter: list[int], seed: int) -> list[int]:
    """Philox4x32-10 in plain Python: the 16 bytes of its four words."""
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        low, high = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [high >> 32 ^ counter[1] ^ key[0], high, low >> 32 ^ counter[3] ^ key[1], low]
        counter = [word & 0xFFFFFFFF for word in counter]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return [byte for word in counter for byte in word.to_bytes(4, "little")]


def dropout_of(sequences: Sequences, p: float = 0.3, operation: int = 5, seed: torch.Tensor = SEED) -> Dropout:
    return Dropout(p, seed, operation, sequences.token_sequence_ids, sequences.position)


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (1 << 64) - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(counter, seed, words):
    expected = [byte for word in words.split() for byte in int(word, 16).to_bytes(4, "little")]
    assert philox(counter, signed(seed)).tolist() == expected
    assert plain_philox(list(counter), seed) == expected


def test_philox_does_not_depend_on_the_chunk_size(monkeypatch):
    counter = (torch.arange(7)[:, None], torch.arange(50), 3, 4)
    whole = philox(counter, SEED)
    monkeypatch.setattr("bertfast.ops.dropout._CHUNK", 16)
    assert torch.equal(philox(counter, SEED), whole)
    assert whole[6, 49].tolist() == plain_philox([6, 49, 3, 4], SEED.item())


def test_attention_layout_is_the_definition():
    sequence_id, operation, heads, length = 9, 11, 3, 37
    sequences = Sequences.from_lengths([length], sequence_ids=[sequence_id])
    dropout = dropout_of(sequences, operation=operation)
    keep = attention_keep(dropout, sequence_id, heads, length, range(length))

    def group(x: int) -> int:
        return (x >> 4) * 4 + (x >> 1 & 3)

    for head in range(heads):
        for i in range(length):
            for j in range(length):
                octets = plain_philox([group(j), group(i), sequence_id, operation << 8 | head], SEED.item())
                byte = octets[4 * (2 * (i >> 3 & 1) + (j >> 3 & 1)) + 2 * (i & 1) + (j & 1)]
                assert keep[head, i, j] == (byte >= dropout.threshold), (head, i, j)
    some = attention_keep(dropout, sequence_id, heads, 20, range(19, 35))
    assert torch.equal(some, keep[:, 19:35, :20])


def test_hidden_layout_is_the_definition():
    sequences = Sequences.from_lengths([3, 0, 4], sequence_ids=[8, 2, 5])
    dropout = dropout_of(sequences, operation=7)
    keep = hidden_keep(dropout, 37)
    assert keep.shape == (7, 37)
    for token, (sequence_id, position) in enumerate([(8, 0), (8, 1), (8, 2), (5, 0), (5, 1), (5, 2), (5, 3)]):
        for column in range(37):
            octets = plain_philox([column // 16, position, sequence_id, 7 << 8], SEED.item())
            assert keep[token, column] == (octets[column % 16] >= dropout.threshold), (token, column)


def test_masks_do_not_depend_on_the_slot_of_a_token():
    lengths, sequence_ids = [5, 2, 9], [70, 3, 41]
    masks = {}
    for order in ([0, 1, 2], [2, 0, 1]):
        sequences = Sequences.from_lengths(
            [lengths[i] for i in order],
            sequence_ids=[sequence_ids[i] for i in order],
            capacity=20 if order[0] else None,
        )
        whole = hidden_keep(dropout_of(sequences), 24)[: sequences.num_tokens].split(list(sequences.lengths))
        masks[order[0]] = dict(zip(order, whole, strict=True))
    for i, (length, sequence_id) in enumerate(zip(lengths, sequence_ids, strict=True)):
        alone = hidden_keep(dropout_of(Sequences.from_lengths([length], sequence_ids=[sequence_id])), 24)
        assert torch.equal(masks[0][i], alone), "a micro-batch of one sequence"
        assert torch.equal(masks[2][i], alone), "another order, with padding slots"


def test_gathered_rows_keep_their_masks():
    sequences = Sequences.from_lengths([5, 2, 9])
    rng = RngCoordinates(SEED, sequences.token_sequence_ids, sequences.position)
    rows = torch.tensor([15, 3, 3, 6])
    of_rows = hidden_keep(rng.at(rows).dropout(0.4, "output", 1), 40)
    assert torch.equal(of_rows, hidden_keep(rng.dropout(0.4, "output", 1), 40)[rows])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_expectation_is_exact_and_the_rate_is_near_p(p):
    sequences = Sequences.from_lengths([64, 64])
    dropout = dropout_of(sequences, p)
    keep_probability = (256 - dropout.threshold) / 256
    assert abs(1 - keep_probability - p) <= 1 / 512
    assert keep_probability * dropout.scale == 1
    for keep in (hidden_keep(dropout, 256), attention_keep(dropout, 1, 4, 128, range(128))):
        deviation = math.sqrt(keep_probability * (1 - keep_probability) / keep.numel())
        assert abs(keep.double().mean() - keep_probability) < 4 * deviation


def test_masks_differ_between_seeds_operations_sequences_positions_and_heads():
    base = Sequences.from_lengths([16, 16])
    masks = [
        hidden_keep(dropout_of(base), 64),
        hidden_keep(dropout_of(base, operation=6), 64),
        hidden_keep(dropout_of(base, seed=SEED + 1), 64),
        hidden_keep(dropout_of(base, seed=SEED + (1 << 40)), 64),
    ]
    tokens = torch.cat(masks)  # every row another token, operation or seed
    assert len(tokens.unique(dim=0)) == len(tokens)
    heads = attention_keep(dropout_of(base), 3, 8, 16, range(16)).flatten(1)
    assert len(heads.unique(dim=0)) == 8


def test_operation_ids_are_distinct():
    layers = 48
    sites = ("attention", "attention_output", "output")
    ids = [operation_id("embeddings"), operation_id("classifier")]
    ids += [operation_id(site, layer) for layer in range(layers) for site in sites]
    assert len(set(ids)) == len(ids)
    assert max(ids) << 8 < 1 << 32


@pytest.mark.parametrize(("p", "threshold"), [(0.0, 0), (1e-9, 1), (0.1, 26), (0.5, 128), (0.9999, 255)])
def test_threshold_is_clamped(p, threshold):
    sequences = Sequences.from_lengths([8])
    dropout = dropout_of(sequences, p)
    assert dropout.threshold == threshold
    keep = hidden_keep(dropout, 4096)
    assert keep.all() == (p == 0)
    assert keep.any()


def test_a_probability_of_zero_is_no_dropout():
    sequences = Sequences.from_lengths([8])
    assert RngCoordinates(SEED, sequences.token_sequence_ids, sequences.position).dropout(0.0, "embeddings") is None


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan])
def test_probability_outside_its_range_is_refused(p):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        dropout_of(Sequences.from_lengths([8]), p)


def test_masks_of_one_query_per_sequence_are_rows_of_the_whole_mask():
    sequences = Sequences.from_lengths([8, 8, 8, 8], sequence_ids=[5, 1, 70, 2])
    dropout = dropout_of(sequences)
    positions = torch.tensor([0, 21, 8, 47])
    keep = attention_keep_at(dropout, sequences.sequence_ids, 3, 37, positions)
    assert keep.shape == (4, 3, 37)
    for row, (sequence_id, position) in enumerate(zip(sequences.sequence_ids, positions.tolist(), strict=True)):
        whole = attention_keep(dropout, sequence_id, 3, 37, range(position, position + 1))
        assert torch.equal(keep[row], whole[:, 0])
