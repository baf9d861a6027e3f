"""Examples as token ids, end to end, and the packed batches made of them.

E examples, each of one sequence or, where there are choices, of several; S sequences, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bertfast.encoder import PackedHead, pack
from bertfast.encoder.unpadding import Packed
from bertfast.ops.sequences import bucket

_TEXTS_AT_A_TIME = 10_000  # tokenized together: the tokenizer's objects are many times as large as the ids


@dataclass(frozen=True, eq=False)
class Features:
    """Tokenized examples.

    Attributes:
        token_ids: int32 [T], [CLS] and [SEP] included.
        token_type_ids: uint8 [T], 0 in the first text and 1 in the second.
        starts: int64 [S + 1], where each sequence starts in them, and the end.
        cut: how many sequences were cut to the greatest length.
        labels: what a model learns from, by the name of its argument: [E, …], or [T] where each token has a label.
            Integers of -100 count as none.
        inputs: what else it is given, by the name of its argument: [T, …].
        choices: sequences of each example.
    """

    token_ids: np.ndarray
    token_type_ids: np.ndarray
    starts: np.ndarray
    cut: int = 0
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    choices: int = 1

    def __len__(self) -> int:
        return (len(self.starts) - 1) // self.choices

    @property
    def lengths(self) -> np.ndarray:
        """int64 [E], tokens of each example."""
        return np.diff(self.starts[:: self.choices])

    @cached_property
    def max_seqlen(self) -> int:
        """Length of the longest sequence."""
        return int(np.diff(self.starts).max(initial=0))

    def batch(self, rows: np.ndarray, device: torch.device | None = None) -> dict[str, Tensor]:
        """The examples at `rows` (int [R]) as packed input of a model, with their labels where there are some."""
        sequences = (rows[:, None] * self.choices + np.arange(self.choices)).ravel()
        lengths = np.diff(self.starts)[sequences]
        ends = np.cumsum(lengths)
        places = np.repeat(self.starts[sequences] - (ends - lengths), lengths) + np.arange(ends[-1])
        arrays = {
            "input_ids": self.token_ids[places][None].astype(np.int64),
            "token_type_ids": self.token_type_ids[places][None].astype(np.int64),
            "cu_seq_lens_q": np.concatenate([[0], ends]).astype(np.int32),
        }
        for name, values in (self.labels | self.inputs).items():
            arrays[name] = values[places][None] if len(values) == len(self.token_ids) else values[rows]
        batch = {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}
        return batch | ({"num_choices": self.choices} if self.choices > 1 else {})

    def model_inputs(self, rows: np.ndarray, *, labels: bool = True, bucketed: bool = False) -> ModelInputs:
        """Build the packed input of the examples at `rows` (int [R]) on the host.

        Args:
            labels: with the labels, where there are some.
            bucketed: fill it up to one of few shapes: tokens with padding slots and, without labels, examples with
                empty sequences, to a power of two. What a model gives for those means nothing.
        """
        arguments = self.batch(rows)
        if not labels:
            arguments = {name: value for name, value in arguments.items() if name not in self.labels}
        if not bucketed:
            return ModelInputs(arguments)
        tokens = arguments["input_ids"].shape[1]
        slots = bucket(tokens) - tokens
        per_token = [name for name, x in (self.labels | self.inputs).items() if len(x) == len(self.token_ids)]
        for name in {"input_ids", "token_type_ids", *per_token} & arguments.keys():
            value = arguments[name]
            counts_as_none = name in self.labels and not value.is_floating_point()
            rest = value.new_full((1, slots, *value.shape[2:]), -100 if counts_as_none else 0)
            arguments[name] = torch.cat([value, rest], dim=1)
        if not labels:
            empty = ((1 << (len(rows) - 1).bit_length()) - len(rows)) * self.choices
            cu_seqlens = arguments["cu_seq_lens_q"]
            arguments["cu_seq_lens_q"] = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(empty)])
        return ModelInputs(arguments | {"max_length_q": self.max_seqlen})

    def parts(self, rows: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
        """Split what a model gives for the tokens [T, …] of the batch of `rows` by example, without padding slots."""
        return np.split(values, np.cumsum(self.lengths[rows]))[:-1]


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """A packed batch and its labels: tensors, and integers that are the same for all batches of a shape."""

    arguments: dict[str, Tensor | int]

    def to(self, device: torch.device, non_blocking: bool = False) -> ModelInputs:
        """Return the same with its tensors on a device."""
        return self._each(lambda x: x.to(device, non_blocking=non_blocking))

    def packed(self, model: PackedHead) -> Packed:
        """Return what the encoder of a model takes."""
        names = ("input_ids", "cu_seq_lens_q", "token_type_ids", "max_length_q")
        return pack(model, *map(self.arguments.get, names))

    def pin_memory(self) -> ModelInputs:
        """Return the same in pinned host memory, from where `to(device, non_blocking=True)` does not wait."""
        return self._each(Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """Return its tensors."""
        return [value for value in self.arguments.values() if isinstance(value, Tensor)]

    def options(self) -> tuple:
        """Return the names of its tensors, and its integers."""
        return tuple((name, None if isinstance(value, Tensor) else value) for name, value in self.arguments.items())

    def _each(self, change: Callable[[Tensor], Tensor]) -> ModelInputs:
        changed = {name: change(x) if isinstance(x, Tensor) else x for name, x in self.arguments.items()}
        return ModelInputs(changed)


def labels_in(batch: dict[str, Tensor]) -> int:
    """How many labels of a batch count: what its mean loss is a mean over."""
    labels = batch["labels"] if "labels" in batch else batch["start_positions"]
    return len(labels) if labels.is_floating_point() else int((labels >= 0).sum())


def tokenize(tokenizer: Tokenizer, texts: Sequence[str | tuple[str, str]], max_length: int) -> Features:
    """Tokenize texts and pairs of texts; of a pair that is longer than `max_length` tokens, the longer text is cut."""
    ids, types, lengths, cut = [], [], [], 0
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    for start in range(0, len(texts), _TEXTS_AT_A_TIME):
        encodings = tokenizer.encode_batch_fast(texts[start : start + _TEXTS_AT_A_TIME])
        ids.append(np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32))
        types.append(np.fromiter(chain.from_iterable(encoding.type_ids for encoding in encodings), np.uint8))
        lengths += map(len, encodings)
        cut += sum(bool(encoding.overflowing) for encoding in encodings)
    tokenizer.no_truncation()  # it belongs to the caller
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Features(np.concatenate(ids), np.concatenate(types), starts, cut)


def shuffled_batches(examples: int, size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """All of range(examples) in an order that `seed` and `epoch` decide, `size` at a time."""
    order = np.random.default_rng([seed, epoch]).permutation(examples)
    return (order[start : start + size] for start in range(0, examples, size))


def within_budget(features: Features, rows: np.ndarray, tokens: int) -> list[np.ndarray]:
    """`rows` in their order, in batches of about `tokens` tokens: over it by less than an example."""
    lengths = features.lengths[rows]
    batch = (np.cumsum(lengths) - lengths) // tokens
    return np.split(rows, np.flatnonzero(np.diff(batch)) + 1)


def batches_by_length(features: Features, tokens: int) -> list[np.ndarray]:
    """All rows, the longest first, in batches of about `tokens` tokens."""
    return within_budget(features, np.argsort(-features.lengths, kind="stable"), tokens)
