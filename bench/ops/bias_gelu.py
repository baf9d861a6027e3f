"""`bias_gelu` beside PyTorch's composition, eager and compiled."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from contest import DTYPE, OURS, Case, Work, compiled, definition, normal

from bertfast import ops, reference


@dataclass(frozen=True, kw_only=True)
class BiasGeluCase(Case):
    """`rows` tokens of `width` columns."""

    rows: int = 32_768
    width: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.width}"

    def inputs(self, generator):
        return [normal(generator, self.rows, self.width), normal(generator, self.width)]

    def definition(self, x, bias):
        return reference.bias_gelu(x, bias, "none")

    def work(self, direction):
        activation = self.rows * self.width * DTYPE.itemsize
        return Work((2 if direction == "forward" else 3) * activation)  # backward reads x and d_y, writes d_x


def ours(case: BiasGeluCase):
    return lambda x, bias: ops.bias_gelu(x, bias, implementation=OURS)


def composition(case: BiasGeluCase):
    return lambda x, bias: F.gelu(x + bias)


CASES = {
    "small": [BiasGeluCase(rows=40, width=96)],
    "main": [BiasGeluCase(width=3072)],
    "rest": [BiasGeluCase(width=4096)],
}
PROVIDERS = {
    "bertfast": ours,
    "definition": definition,
    "torch": composition,
    "torch.compile": compiled(composition),
}


def test_bias_gelu(measure):
    measure()
