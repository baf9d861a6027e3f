"""`linear_cross_entropy` vs Liger, cut-cross-entropy, PyTorch's own and `torch.compile` of the plain form.

Some implementations compute the gradients in the forward pass, so the passes are not timed separately: "training" is
the loss and all gradients, "inference" is the loss alone. The output bias is zero, as in an untrained BERT, so that
implementations without a bias compute the same loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import (
    BACKEND,
    VOCAB_SIZE,
    Case,
    Factory,
    Function,
    Work,
    compiled,
    definition,
    in_both_precisions,
    in_cuda,
    liger,
)
from bench.harness import DEVICE, ON_GPU
from bertfast import ops
from bertfast.kernels.logits_in_chunks import equal_chunk, max_rows_on_gpu, padded_columns
from bertfast.ops.dispatch import Implementation as Backend


@dataclass(frozen=True, kw_only=True)
class LossCase(Case):
    """`rows` of `tokens` are masked; `width` columns; a vocabulary of `vocab_size` entries.

    If the rows are not `listed`, they are all tokens in order, as after a last layer that computes nothing else.
    """

    directions: ClassVar[tuple[str, ...]] = ("inference", "training")
    tokens: int = 32_768
    rows: int = 5_000
    width: int
    vocab_size: int = VOCAB_SIZE
    listed: bool = True

    @property
    def size(self) -> str:
        return f"{self.rows}x{self.width}x{self.vocab_size}" + "-all-rows" * (not self.listed)

    @property
    def predicted_case(self) -> str | None:
        if self.dtype != torch.bfloat16:
            return None
        chunk = equal_chunk(self.rows, max_rows_on_gpu(padded_columns(self.vocab_size) * self.dtype.itemsize))
        return f"{chunk:,} rows of {self.vocab_size:,}"

    @cached_property
    def masked(self) -> tuple[Tensor | None, Tensor]:
        """Indices of the masked rows, ascending, or None for all, and their labels, both int64 [rows]."""
        generator = torch.Generator(DEVICE).manual_seed(0)
        rows = torch.randperm(self.tokens, generator=generator, device=DEVICE)[: self.rows].sort().values
        labels = torch.randint(self.vocab_size, (self.rows,), generator=generator, device=DEVICE)
        return rows if self.listed else None, labels

    def inputs(self, generator: torch.Generator) -> list[Tensor]:
        hidden = self.normal(generator, self.tokens, self.width)
        weight = self.normal(generator, self.vocab_size, self.width, scale=0.02)
        return [hidden, weight, torch.zeros(self.vocab_size, dtype=self.dtype, device=DEVICE)]

    def definition(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows, labels = self.masked
        return ops.linear_cross_entropy(hidden, rows, weight, bias, labels, implementation="reference")[0]

    def work(self, direction: str) -> Work:
        flops, weight = 2 * self.rows * self.width * self.vocab_size, self.vocab_size * self.width
        if direction == "inference":  # reads the masked rows and the weight
            return Work((self.rows * self.width + weight) * self.dtype.itemsize, flops)
        # Reads both once, writes the gradients of the weight and of all tokens.
        return Work(((self.rows + self.tokens) * self.width + 2 * weight) * self.dtype.itemsize, 3 * flops)


def fused(case: LossCase, implementation: Backend | None = BACKEND) -> Function:
    rows, labels = case.masked
    return lambda hidden, weight, bias: ops.linear_cross_entropy(
        hidden, rows, weight, bias, labels, implementation=implementation
    )[0]


def selection(case: LossCase) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return a function that selects the masked rows of hidden [tokens, width], and their labels."""
    rows, labels = case.masked
    return (lambda hidden: hidden) if rows is None else (lambda hidden: hidden.index_select(0, rows)), labels


def plain(case: LossCase) -> Function:
    select, labels = selection(case)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = F.linear(select(hidden), weight, bias)
        return F.cross_entropy(logits.float(), labels, reduction="sum")

    return function


def chunked(case: LossCase) -> Function:
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("F.linear_cross_entropy requires torch 2.13")
    select, labels = selection(case)
    options = torch.nn.LinearCrossEntropyOptions()

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        masked = select(hidden)
        loss: Tensor = F.linear_cross_entropy(
            masked, weight, labels, linear_bias=bias, reduction="sum", options=options
        )
        return loss

    return function


def with_liger(case: LossCase) -> Function:
    loss = liger().liger_fused_linear_cross_entropy
    select, labels = selection(case)
    return lambda hidden, weight, bias: loss(select(hidden), weight, labels, bias, reduction="sum")


def cut_cross_entropy(case: LossCase) -> Function:
    loss = pytest.importorskip("cut_cross_entropy", exc_type=ImportError).linear_cross_entropy
    select, labels = selection(case)
    # Its filter drops gradients below 2^-12, which are nearly all of them in an untrained model. Its kernels are in
    # Triton; on a CPU it has a compiled form.
    options = {"filter_eps": None} if ON_GPU else {"impl": "torch_compile"}

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        result: Tensor = loss(select(hidden), weight, labels, reduction="sum", **options)
        return result

    return function


CASES = {
    "small": in_both_precisions(
        LossCase(tokens=40, rows=9, width=48, vocab_size=100),
        LossCase(tokens=9, rows=9, width=48, vocab_size=100, listed=False),
    ),
    "cpu": in_both_precisions(LossCase(tokens=2048, rows=307, width=768)),
    "main": [LossCase(width=768)],
    "predicted": [LossCase(tokens=5000, width=768, listed=False)],
    "rest": [LossCase(width=1024)],
}
IMPLEMENTATIONS: dict[str, Factory] = {
    "bertfast": fused,
    **in_cuda(fused),
    "definition": definition,
    "torch": plain,
    "torch.compile": compiled(plain),
    "F.linear_cross_entropy": chunked,
    "liger": with_liger,
    "cut_cross_entropy": cut_cross_entropy,
}


def test_linear_cross_entropy(measure: Callable[[], None]) -> None:
    measure()
