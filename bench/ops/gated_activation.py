"""`gated_activation` vs PyTorch's composition, eager and compiled, and Liger's GeGLU and SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import (
    BACKEND,
    Factory,
    Function,
    RowsCase,
    Work,
    compiled,
    definition,
    in_both_precisions,
    liger,
)
from bertfast import ops
from bertfast.ops import reference
from bertfast.ops.dispatch import Implementation as Backend
from bertfast.ops.gated_activation import Activation


@dataclass(frozen=True, kw_only=True)
class GatedActivationCase(RowsCase):
    """Rows of the intermediate layer, `width` columns after the gate, without a bias as in ModernBERT."""

    activation: Activation = "gelu"

    @property
    def size(self) -> str:
        return f"{super().size}-{self.activation}"

    @property
    def predicted_case(self) -> str | None:
        return super().predicted_case if self.activation == "gelu" else None

    def inputs(self, generator: torch.Generator) -> list[Tensor]:
        return [self.normal(generator, self.rows, 2 * self.width)]

    def definition(self, x: Tensor) -> Tensor:
        return reference.gated_activation(x, None, self.activation)

    def work(self, direction: str) -> Work:
        activation = self.rows * self.width * self.dtype.itemsize
        return Work((3 if direction == "forward" else 5) * activation)  # backward reads x and d_y, writes d_x


def fused(case: GatedActivationCase, implementation: Backend | None = BACKEND) -> Function:
    return lambda x: ops.gated_activation(x, case.activation, implementation=implementation)


def composition(case: GatedActivationCase) -> Function:
    """Make what transformers' models run."""
    activate = F.silu if case.activation == "silu" else F.gelu

    def function(x: Tensor) -> Tensor:
        hidden, gate = x.chunk(2, dim=-1)
        return activate(hidden) * gate

    return function


def with_liger(case: GatedActivationCase) -> Function:
    name = "liger_swiglu" if case.activation == "silu" else "liger_geglu"
    function: Callable[..., Tensor] = getattr(liger(), name)
    return lambda x: function(*(half.contiguous() for half in x.chunk(2, dim=-1)))


CASES = {
    "small": in_both_precisions(GatedActivationCase(rows=40, width=48)),
    "cpu": in_both_precisions(
        GatedActivationCase(rows=4096, width=1152), GatedActivationCase(rows=4096, width=3072, activation="silu")
    ),
    "main": [GatedActivationCase(width=1152)],
    "rest": [GatedActivationCase(width=3072, activation="silu")],
}
IMPLEMENTATIONS: dict[str, Factory] = {
    "bertfast": fused,
    "definition": definition,
    "torch": composition,
    "torch.compile": compiled(composition),
    "liger": with_liger,
}


def test_gated_activation(measure: Callable[[], None]) -> None:
    measure()
