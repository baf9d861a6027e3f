"""`gelu_layer_norm` vs PyTorch's composition, eager and compiled, and the composition with Liger's LayerNorm."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from bench.cases import BACKEND, EPS, RowsCase, Work, compiled, definition, in_both_precisions, in_cuda, liger
from bertfast import ops
from bertfast.ops import reference


@dataclass(frozen=True, kw_only=True)
class GeluLayerNormCase(RowsCase):
    """Rows of masked tokens."""

    def inputs(self, generator):
        return [self.normal(generator, self.rows, self.width), *(self.normal(generator, self.width) for _ in range(3))]

    def definition(self, x, bias, gamma, beta):
        return reference.gelu_layer_norm(x, bias, gamma, beta, EPS)

    def work(self, direction):
        activation = self.rows * self.width * self.dtype.itemsize
        return Work((2 if direction == "forward" else 3) * activation)  # backward reads x and d_y, writes d_x


def fused(case: GeluLayerNormCase, implementation: str | None = BACKEND):
    return lambda x, bias, gamma, beta: ops.gelu_layer_norm(x, bias, gamma, beta, EPS, implementation=implementation)


def composition(case: GeluLayerNormCase):
    return lambda x, bias, gamma, beta: F.layer_norm(F.gelu(x + bias), gamma.shape, gamma, beta, EPS)


def with_liger(case: GeluLayerNormCase):
    layer_norm = liger().liger_layer_norm
    return lambda x, bias, gamma, beta: layer_norm(F.gelu(x + bias), gamma, beta, EPS)


CASES = {
    "small": in_both_precisions(GeluLayerNormCase(rows=40, width=48)),
    "cpu": in_both_precisions(GeluLayerNormCase(rows=4096)),
    "main": [GeluLayerNormCase()],
    "rest": [GeluLayerNormCase(width=1024), GeluLayerNormCase(rows=5000)],
}
IMPLEMENTATIONS = {
    "bertfast": fused,
    **in_cuda(fused),
    "definition": definition,
    "torch": composition,
    "torch.compile": compiled(composition),
    "liger": with_liger,
}


def test_gelu_layer_norm(measure):
    measure()
