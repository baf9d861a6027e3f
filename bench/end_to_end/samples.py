"""Random samples for the benchmark of a pre-training step, with the lengths of real sentence pairs."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from bench.harness import DEVICE
from bertfast.data.batches import Batch
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.data.samples import CorpusBoundaries, Sampling, plan_samples
from bertfast.data.shards import Shards
from bertfast.ops.sequences import Sequences

MASKED = 0.15  # share of masked tokens
LENGTHS = Path(__file__).with_name("wikipedia_lengths.json")  # written by `count_lengths`


def uniform_lengths(sequences: int, max_seqlen: int) -> list[int]:
    """Return lengths that are spread evenly from a quarter of the maximum to the maximum."""
    return torch.linspace(max_seqlen // 4, max_seqlen, sequences).round().int().tolist()


def wikipedia_lengths(sequences: int, max_seqlen: int) -> list[int]:
    """Return lengths drawn from those of Wikipedia's sentence pairs, always the same."""
    counts = np.array(json.loads(LENGTHS.read_text(encoding="utf-8"))[str(max_seqlen)])
    drawn = np.random.default_rng(0).choice(len(counts), sequences, p=counts / counts.sum())
    return [int(length) for length in drawn]


def count_lengths(data: Path) -> dict[int, list[int]]:
    """Return, by the largest length, how many of Wikipedia's sentence pairs have 0, 1, 2 … tokens."""
    text, vocabulary = data / "corpus" / "wikipedia-valid.txt.xz", data / "vocab" / "bert-base-uncased-vocab.txt"
    corpus = CorpusSettings([str(text)], tokenizer_name=str(vocabulary), validation_split_percentage=0, processes=1)
    counts = {}
    with TemporaryDirectory() as folder:
        boundaries = CorpusBoundaries.of(Shards.open(prepare(PrepareSettings(folder, corpus)) / "train"))
        for max_seqlen in (128, 512):
            sampling = Sampling(max_seq_length=max_seqlen)
            lengths = plan_samples(boundaries, sampling, np.random.default_rng(0)).lengths(sampling)
            counts[max_seqlen] = np.bincount(lengths, minlength=max_seqlen + 1).tolist()
    return counts


def random_samples(
    lengths: list[int], max_seqlen: int, vocab_size: int, *, pairs: bool = True, masked: float = MASKED
) -> tuple[dict[str, torch.Tensor], Batch]:
    """Return random samples of these lengths, padded for transformers and packed for bertfast, on DEVICE.

    Args:
        lengths: Tokens of each sample.
        max_seqlen: Length of a padded sample.
        vocab_size: Number of token ids.
        pairs: Whether samples are sentence pairs.
        masked: Share of masked tokens.
    """
    sequences, layout, ends = len(lengths), Sequences.from_lengths(lengths), torch.tensor(lengths)[:, None]
    attended = torch.arange(max_seqlen) < ends
    ids = torch.randint(1000, vocab_size, (sequences, max_seqlen)) * attended
    types = ((torch.arange(max_seqlen) > ends // 2) & attended).long()
    labels = torch.where((torch.rand(sequences, max_seqlen) < masked) & attended, ids, -100)
    order = torch.randint(0, 2, (sequences,))
    padded = {"input_ids": ids, "attention_mask": attended.long(), "labels": labels}
    if pairs:
        padded |= {"token_type_ids": types, "next_sentence_label": order}
    rows = (labels[attended] >= 0).nonzero().squeeze(1)
    packed = Batch(
        token_ids=ids[attended],
        token_type_ids=types[attended] if pairs else torch.zeros_like(ids[attended]),
        position_ids=layout.position,
        sequences=layout,
        masked_rows=rows,
        labels=labels[attended][rows],
        next_sentence_labels=order if pairs else None,
        masked=len(rows),
    )
    return {name: x.to(DEVICE) for name, x in padded.items()}, packed.to(DEVICE)
