"""Tokenized examples, concatenated without padding, and packed batches of them.

Shapes: E examples, each of one sequence or, in multiple choice, of `num_choices`; S sequences; T packed tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bertfast.data.text_files import unpaired_surrogate
from bertfast.data.truncation import set_truncation_side, truncation_side
from bertfast.encoder import PackedHead, pack
from bertfast.encoder.unpadding import Packed
from bertfast.ops.sequences import bucket
from bertfast.tasks.columns import Text

logger = logging.getLogger("bertfast")

TOKENIZER_BATCH = 10_000  # texts; bounds memory, as the tokenizer's objects are many times as large as the ids


class Buckets(NamedTuple):
    """Which sizes of a batch are padded to one of a few, so that few shapes occur: tokens, and examples."""

    tokens: bool
    examples: bool


EXACT, BUCKETED = Buckets(tokens=False, examples=False), Buckets(tokens=True, examples=True)


@dataclass(frozen=True, eq=False)
class Features:
    """Tokenized examples.

    Attributes:
        token_ids: int32 [T], including [CLS] and [SEP].
        token_type_ids: uint8 [T], 0 in the first text of a pair and 1 in the second.
        cu_seqlens: int64 [S + 1], cumulative sequence lengths: where each sequence starts, and T.
        num_truncated: Number of sequences truncated to the maximum length.
        labels: Labels by argument name: [E, …], or [T] if each token has one. Integer labels of -100 are ignored.
        inputs: Further per-token inputs [T, …] by argument name.
        num_choices: Sequences per example.
    """

    token_ids: np.ndarray
    token_type_ids: np.ndarray
    cu_seqlens: np.ndarray
    num_truncated: int = 0
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    num_choices: int = 1

    def __len__(self) -> int:
        return (len(self.cu_seqlens) - 1) // self.num_choices

    @property
    def lengths(self) -> np.ndarray:
        """int64 [E], tokens of each example."""
        return np.diff(self.cu_seqlens[:: self.num_choices])

    @cached_property
    def max_seqlen(self) -> int:
        """Length of the longest sequence."""
        return int(np.diff(self.cu_seqlens).max(initial=0))

    def batch(self, rows: np.ndarray, device: torch.device | None = None) -> dict[str, Tensor]:
        """Return the packed model input of the examples at `rows` (int [R]), with labels if there are any."""
        sequences = (rows[:, None] * self.num_choices + np.arange(self.num_choices)).ravel()
        indices, cu_seqlens = self._tokens_of(sequences)
        arrays = {
            "input_ids": self.token_ids[indices][None].astype(np.int64),
            "token_type_ids": self.token_type_ids[indices][None].astype(np.int64),
            "cu_seq_lens_q": cu_seqlens.astype(np.int32),
        }
        for name, values in (self.labels | self.inputs).items():
            arrays[name] = values[indices][None] if len(values) == len(self.token_ids) else values[rows]
        return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}

    def single_sequences(self, sequences: np.ndarray) -> Features:
        """Return the sequences at `sequences` (int [R]) as examples of their own, without labels and further inputs."""
        indices, cu_seqlens = self._tokens_of(sequences)
        return Features(self.token_ids[indices], self.token_type_ids[indices], cu_seqlens)

    def _tokens_of(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the tokens of sequences, [T of these], and where each starts, int64 [R + 1]."""
        lengths = np.diff(self.cu_seqlens)[sequences]
        ends = np.cumsum(lengths)
        # The sequence that starts at slot ends - lengths of the batch starts at cu_seqlens[sequence] of all tokens;
        # shift the batch's own slot numbers by the difference.
        indices = np.repeat(self.cu_seqlens[sequences] - (ends - lengths), lengths) + np.arange(lengths.sum())
        return indices, np.concatenate([[0], ends])

    def model_inputs(self, rows: np.ndarray, *, labels: bool = True, buckets: Buckets = EXACT) -> ModelInputs:
        """Return the packed input of the examples at `rows` (int [R]) in host memory.

        Args:
            rows: Indices of examples.
            labels: Whether to include labels, if there are any.
            buckets: Which sizes of the batch to pad to one of a few: tokens with padding slots and, without labels,
                examples with empty sequences, to a power of two. The model's outputs for those are meaningless.
        """
        arguments = self.batch(rows)
        if not labels:
            arguments = {name: value for name, value in arguments.items() if name not in self.labels}
        if buckets.tokens:
            self._pad_tokens(arguments)
        if buckets.examples and not labels:
            # Empty sequences up to the next power of two of examples; repeating the last cu_seqlen makes one.
            empty_sequences = ((1 << (len(rows) - 1).bit_length()) - len(rows)) * self.num_choices
            cu_seqlens = arguments["cu_seq_lens_q"]
            arguments["cu_seq_lens_q"] = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(empty_sequences)])
        return ModelInputs(arguments, self.num_choices, self.max_seqlen if buckets.tokens else None)

    def _pad_tokens(self, arguments: dict[str, Tensor]) -> None:
        """Append padding slots to a batch, in place, up to one of few numbers of tokens."""
        num_tokens = arguments["input_ids"].shape[1]
        padding_slots = bucket(num_tokens) - num_tokens
        per_token = [name for name, x in (self.labels | self.inputs).items() if len(x) == len(self.token_ids)]
        for name in {"input_ids", "token_type_ids", *per_token} & arguments.keys():
            value = arguments[name]
            is_class = name in self.labels and not value.is_floating_point()
            padding = value.new_full((1, padding_slots, *value.shape[2:]), -100 if is_class else 0)
            arguments[name] = torch.cat([value, padding], dim=1)

    def split_by_example(self, rows: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
        """Split a model's outputs [T, …] for the batch of `rows` by example, dropping padding slots."""
        return np.split(values, np.cumsum(self.lengths[rows]))[:-1]


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """A packed batch and its labels.

    Attributes:
        arguments: Tensors by argument name.
        num_choices: Sequences per example.
        max_seqlen_bound: Bound on the sequence lengths, the same for all batches of a shape; None: that of the batch.
    """

    arguments: dict[str, Tensor]
    num_choices: int = 1
    max_seqlen_bound: int | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> ModelInputs:
        """Return a copy whose tensors are on `device`."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def packed(self, model: PackedHead) -> Packed:
        """Return the input of the model's encoder."""
        token_ids, token_type_ids = self.arguments["input_ids"], self.arguments["token_type_ids"]
        return pack(model, token_ids, self.arguments["cu_seq_lens_q"], token_type_ids, self.max_seqlen_bound)

    def pin_memory(self) -> ModelInputs:
        """Return a copy in pinned host memory, from which `to(device, non_blocking=True)` is asynchronous."""
        return self._map(Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """Return the tensors."""
        return list(self.arguments.values())

    def options(self) -> Hashable:
        """Return what, besides the tensors' shapes, must match for a CUDA graph to be replayed."""
        return tuple(self.arguments), self.num_choices, self.max_seqlen_bound

    def _map(self, function: Callable[[Tensor], Tensor]) -> ModelInputs:
        return replace(self, arguments={name: function(x) for name, x in self.arguments.items()})


@dataclass
class CutTexts:
    """Counts the texts of a file that are cut to the maximum length.

    Attributes:
        source: The file.
        length: Maximum tokens of a sequence.
        cut: Texts that were cut.
        texts: All texts.
    """

    source: str
    length: int
    cut: int = 0
    texts: int = 0

    def add(self, features: Features) -> None:
        """Count the texts of some features."""
        self.cut += features.num_truncated
        self.texts += len(features.cu_seqlens) - 1

    def report(self) -> None:
        """Warn of the texts that were cut, if any was."""
        if self.cut:
            logger.warning("%s: cut %d of %d texts to %d tokens", self.source, self.cut, self.texts, self.length)


def count_labels(batch: Mapping[str, Tensor]) -> int:
    """Return the number of labels of a batch that are not ignored, over which its mean loss is taken."""
    labels = batch["labels"] if "labels" in batch else batch["start_positions"]
    return len(labels) if labels.is_floating_point() else int((labels >= 0).sum())


def tokenize(tokenizer: Tokenizer, texts: Sequence[Text], max_length: int) -> Features:
    """Tokenize texts or pairs of texts.

    Args:
        tokenizer: The tokenizer, whose side of truncation is used; it truncates nothing on return.
        texts: Texts, or pairs of texts.
        max_length: Maximum tokens per sequence; of a pair that exceeds it, the longer text is truncated first.

    Raises:
        ValueError: A text has characters that are none; the message counts texts from 1.
    """
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    lengths: list[int] = []
    num_truncated = 0
    side = truncation_side(tokenizer)
    tokenizer.enable_truncation(max_length, strategy="longest_first", direction=side)
    for start in range(0, len(texts), TOKENIZER_BATCH):
        try:
            encodings = tokenizer.encode_batch_fast(texts[start : start + TOKENIZER_BATCH])
        except TypeError:
            require_characters(texts)
            raise
        ids.append(np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32))
        types.append(np.fromiter(chain.from_iterable(encoding.type_ids for encoding in encodings), np.uint8))
        lengths += map(len, encodings)
        num_truncated += sum(bool(encoding.overflowing) for encoding in encodings)
    set_truncation_side(tokenizer, side)  # the caller owns the tokenizer
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    # Without texts there is no array to concatenate: begin with an empty one.
    token_ids = np.concatenate([np.empty(0, np.int32), *ids])
    return Features(token_ids, np.concatenate([np.empty(0, np.uint8), *types]), cu_seqlens, num_truncated)


def require_characters(texts: Sequence[Text]) -> None:
    """Raise ValueError if a text, or one of a pair, has an unpaired surrogate, which tokenizers do not take."""
    for number, text in enumerate(texts, 1):
        problems = map(unpaired_surrogate, (text,) if isinstance(text, str) else text)
        if (problem := next(filter(None, problems), None)) is not None:
            raise ValueError(f"text {number}: {problem}: replace it by one")


def shuffled_batches(num_examples: int, size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Yield batches of `size` indices that shuffle range(num_examples), as `seed` and `epoch` determine."""
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return (order[start : start + size] for start in range(0, num_examples, size))


def within_budget(features: Features, rows: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Split `rows`, in order, into batches of about `tokens` tokens, exceeded by less than one example."""
    if not len(rows):
        return []  # np.split returns one empty part
    lengths = features.lengths[rows]
    # A new batch starts wherever the number of tokens before an example passes a multiple of `tokens`.
    batch = (np.cumsum(lengths) - lengths) // tokens
    return np.split(rows, np.flatnonzero(np.diff(batch)) + 1)


def batches_by_length(features: Features, tokens: int, examples: int | None = None) -> list[np.ndarray]:
    """Split all rows, longest first, into batches of about `tokens` tokens, and of at most `examples` rows if given."""
    batches = within_budget(features, np.argsort(-features.lengths, kind="stable"), tokens)
    if examples is None:
        return batches
    return [batch[first : first + examples] for batch in batches for first in range(0, len(batch), examples)]
