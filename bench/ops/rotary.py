"""`rotary` vs PyTorch's composition, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bench.cases import (
    BACKEND,
    PREDICTED_TOKENS,
    Case,
    Factory,
    Function,
    Work,
    compiled,
    definition,
    in_both_precisions,
    packed,
)
from bench.harness import DEVICE
from bertfast import ops
from bertfast.ops import reference


@dataclass(frozen=True, kw_only=True)
class RotaryCase(Case):
    """`tokens` tokens of sequences of at most 512, with `heads` heads of `dimension`."""

    tokens: int = 32_768
    heads: int = 12
    dimension: int = 64

    @property
    def size(self) -> str:
        return f"{self.tokens}x{self.heads}-d{self.dimension}"

    @property
    def predicted_case(self) -> str | None:
        is_predicted = self.tokens == PREDICTED_TOKENS and self.dtype == torch.bfloat16
        return f"{self.heads} heads of {self.dimension}" if is_predicted else None

    @cached_property
    def table(self) -> Tensor:
        """Cosines and sines of the tokens' positions, fp32 [tokens, D]."""
        inv_freq = 10_000 ** -(torch.arange(0, self.dimension, 2, device=DEVICE) / self.dimension)
        angles = packed(self.tokens).position[:, None] * inv_freq
        return torch.cat([angles.cos(), angles.sin()], 1)

    def inputs(self, generator: torch.Generator) -> list[Tensor]:
        return [self.normal(generator, self.tokens, 3, self.heads, self.dimension)]

    def definition(self, qkv: Tensor) -> Tensor:
        return reference.rotary(qkv, self.table)

    def work(self, direction: str) -> Work:
        table = self.tokens * self.dimension * 4
        return Work(6 * self.tokens * self.heads * self.dimension * self.dtype.itemsize + table)


def fused(case: RotaryCase) -> Function:
    return lambda qkv: ops.rotary(qkv, case.table, implementation=BACKEND)


def composition(case: RotaryCase) -> Function:
    """Make the composition of models of transformers: cosines and sines of all elements, times x and its halves."""
    cos, sin = (torch.cat([half, half], 1)[:, None, None] for half in case.table.chunk(2, 1))

    def function(qkv: Tensor) -> Tensor:
        x = qkv[:, :2].float()
        first, second = x.chunk(2, -1)
        rotated = x * cos + torch.cat([-second, first], -1) * sin
        return torch.cat([rotated.to(qkv.dtype), qkv[:, 2:]], 1)

    return function


CASES = {
    "small": in_both_precisions(RotaryCase(tokens=40, heads=2, dimension=32)),
    "cpu": in_both_precisions(RotaryCase(tokens=4096)),
    "main": [RotaryCase()],
    "rest": [RotaryCase(heads=6, dimension=128)],
}
IMPLEMENTATIONS: dict[str, Factory] = {
    "bertfast": fused,
    "definition": definition,
    "torch": composition,
    "torch.compile": compiled(composition),
}


def test_rotary(measure: Callable[[], None]) -> None:
    measure()
