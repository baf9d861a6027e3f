"""The cases of `bench.end_to_end.pretraining_step`: a model, a batch and a precision each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import BertConfig

import bertfast
from bench.end_to_end.samples import random_samples, uniform_lengths, wikipedia_lengths
from bertfast.architectures.presets import ArchitectureName, Preset
from bertfast.data.batches import Batch


@dataclass(frozen=True)
class Case:
    """A model and a batch.

    Attributes:
        preset: Size of the model.
        sequences: Number of samples.
        max_seqlen: Largest length of a sample in tokens.
        dtype: Precision of the matmuls.
        lengths: "uniform", "wikipedia" or "full": all samples have the largest length.
        target: Speedup to reach.
        compiled: Whether transformers is also timed with torch.compile.
        architecture: Family of the model. BERT is pre-trained on sentence pairs with 15 % masked tokens and dropout
            0.1, other families without pairs, with 30 % and without dropout, as ModernBERT was.
    """

    preset: Preset
    sequences: int
    max_seqlen: int
    dtype: torch.dtype
    lengths: str = "uniform"
    target: float | None = None
    compiled: bool = True
    architecture: ArchitectureName = "bert"

    @property
    def dropout(self) -> float:
        """Dropout probability of the timed steps."""
        return 0.1 if self.architecture == "bert" else 0.0

    def config(self, dropout: float = 0.0) -> BertConfig:
        """Return the configuration of the model."""
        options = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        return bertfast.preset_config(self.preset, architecture=self.architecture, **options)

    def sample_lengths(self) -> list[int]:
        """Return the tokens of each sample."""
        if self.lengths == "full":
            return [self.max_seqlen] * self.sequences
        draw = wikipedia_lengths if self.lengths == "wikipedia" else uniform_lengths
        return draw(self.sequences, self.max_seqlen)

    def samples(self) -> tuple[dict[str, torch.Tensor], Batch]:
        """Return random samples, padded for transformers and packed for bertfast."""
        pairs = self.architecture == "bert"
        lengths, vocab_size = self.sample_lengths(), self.config().vocab_size
        return random_samples(lengths, self.max_seqlen, vocab_size, pairs=pairs, masked=0.15 if pairs else 0.3)


SIZES: dict[str, tuple[Preset, int, int]] = {
    "base-128": ("base", 16, 128),
    "base-512": ("base", 4, 512),
    "small-128": ("small", 16, 128),
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = {
    f"{size}{'-wikipedia' * (lengths == 'wikipedia')}-{precision}": Case(*SIZES[size], dtype, lengths, 3.0)
    for size in SIZES
    for lengths in ("uniform", "wikipedia")
    for precision, dtype in PRECISIONS.items()
}
# 8,192 tokens per update in sequences of 1,024, as ModernBERT was pre-trained, or 256 to 1,024 tokens in each of them.
MODERNBERT_CASES = {
    f"modernbert-base-1024{'-uniform' * (lengths == 'uniform')}-{precision}": Case(
        "base", 8, 1024, dtype, lengths, compiled=False, architecture="modernbert"
    )
    for lengths in ("full", "uniform")
    for precision, dtype in PRECISIONS.items()
}
# Updates of 2,048 and of 8,192 tokens in sequences of 128, without padding.
FULL_CASES = {
    f"base-128-full-{sequences}-{precision}": Case("base", sequences, 128, dtype, "full", compiled=False)
    for sequences in (16, 64)
    for precision, dtype in PRECISIONS.items()
}
GPU_CASES = {
    "gpu-base-128": Case("base", 256, 128, torch.bfloat16, "wikipedia"),
    "gpu-base-512": Case("base", 64, 512, torch.bfloat16, "wikipedia"),
    "gpu-large-512": Case("large", 16, 512, torch.bfloat16, "wikipedia"),
    "gpu-large-128": Case("large", 128, 128, torch.bfloat16, "wikipedia"),
}
TRIAL = {  # to try the program
    "trial": Case("tiny", 4, 32, torch.float32, compiled=False),
    "trial-wikipedia": Case("tiny", 4, 128, torch.float32, "wikipedia", compiled=False),
    "trial-modernbert": Case("tiny", 2, 64, torch.float32, "full", compiled=False, architecture="modernbert"),
}
ALL = CASES | FULL_CASES | MODERNBERT_CASES | GPU_CASES | TRIAL
