"""`embeddings` vs PyTorch's composition, eager and compiled. Token frequencies follow Zipf's law, as in a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import (
    BACKEND,
    EPS,
    PREDICTED_TOKENS,
    VOCAB_SIZE,
    Factory,
    Function,
    RowsCase,
    Work,
    compiled,
    definition,
    dropout_over,
    in_both_precisions,
    packed,
)
from bench.harness import DEVICE
from bertfast import ops
from bertfast.ops import reference
from bertfast.ops.dropout import Dropout
from bertfast.ops.sequences import Sequences

MASK_ID = 99  # of the masked tokens


@dataclass(frozen=True, kw_only=True)
class EmbeddingsCase(RowsCase):
    """Rows of tokens from a vocabulary of `vocab_size` entries; `masked` of them have the same token id."""

    vocab_size: int = VOCAB_SIZE
    length: int = 512
    masked: int = 0

    @property
    def size(self) -> str:
        return super().size + (f"-{self.length}-{self.masked}-masked" if self.masked else "")

    @property
    def predicted_case(self) -> str | None:
        if self.rows != PREDICTED_TOKENS or not self.masked or not self.dropout:
            return None
        return f"3 tables, dropout, {'bf16' if self.dtype == torch.bfloat16 else 'fp32'}"

    @cached_property
    def sequences(self) -> Sequences:
        """The sequences of the packed tokens."""
        return packed(self.rows, self.length)

    @cached_property
    def ids(self) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, token type ids and position ids, each int64 [rows]."""
        generator = torch.Generator(DEVICE).manual_seed(0)
        uniform = torch.rand(self.rows, generator=generator, device=DEVICE)
        token_ids = (self.vocab_size**uniform).long().clamp(max=self.vocab_size) - 1
        token_ids[torch.randperm(self.rows, generator=generator, device=DEVICE)[: self.masked]] = MASK_ID
        position = self.sequences.position
        return token_ids, (position >= self.length // 4).long(), position

    @cached_property
    def drop(self) -> Dropout | None:
        """Dropout of the output."""
        return dropout_over(self.sequences, self.dropout, "embeddings")

    def inputs(self, generator: torch.Generator) -> list[Tensor]:
        tables = [self.normal(generator, rows, self.width) for rows in (self.vocab_size, 512, 2)]
        return tables + [self.normal(generator, self.width) for _ in range(2)]

    def definition(self, word: Tensor, position: Tensor, token_type: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return reference.embeddings(*self.ids, word, position, token_type, gamma, beta, EPS, self.drop, None)

    def work(self, direction: str) -> Work:
        activation, tables = self.rows * self.width, (self.vocab_size + 514) * self.width
        if direction == "forward":  # reads the word embedding of each token, writes the output
            return Work(2 * activation * self.dtype.itemsize)
        # Reads the same rows and d_y, writes the gradients of the tables.
        return Work((2 * activation + tables) * self.dtype.itemsize)


def fused(case: EmbeddingsCase) -> Function:
    return lambda word, position, token_type, gamma, beta: ops.embeddings(
        *case.ids, word, position, token_type, gamma, beta, EPS, case.drop, implementation=BACKEND
    )


def composition(case: EmbeddingsCase) -> Function:
    word_ids, type_ids, position_ids = case.ids

    def function(word: Tensor, position: Tensor, token_type: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        total = F.embedding(word_ids, word) + F.embedding(type_ids, token_type) + F.embedding(position_ids, position)
        return F.dropout(F.layer_norm(total, gamma.shape, gamma, beta, EPS), case.dropout)

    return function


CASES = {
    "small": in_both_precisions(*(EmbeddingsCase(rows=40, width=48, vocab_size=100, dropout=p) for p in (0.0, 0.1))),
    "cpu": in_both_precisions(*(EmbeddingsCase(rows=4096, dropout=p) for p in (0.0, 0.1))),
    "main": [EmbeddingsCase(dropout=0.1)],
    "predicted": in_both_precisions(EmbeddingsCase(dropout=0.1, length=128, masked=3932)),  # 80 % of 15 %
    "rest": [EmbeddingsCase(), EmbeddingsCase(width=1024, dropout=0.1)],
}
IMPLEMENTATIONS: dict[str, Factory] = {
    "bertfast": fused,
    "definition": definition,
    "torch": composition,
    "torch.compile": compiled(composition),
}


def test_embeddings(measure: Callable[[], None]) -> None:
    measure()
