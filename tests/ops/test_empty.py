"""Operators on tensors without rows or without columns, forward and backward: what the reference computes."""

import pytest
import torch

from bertfast import ops

EPS = 1e-5


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def indices(count):
    return torch.zeros(count, dtype=torch.long)


def add_layer_norm(rows, columns, dropout=None):
    x, residual, *parameters = (normal(*shape) for shape in [(rows, columns)] * 2 + [(columns,)] * 3)
    return ops.add_layer_norm, (x, residual, *parameters, EPS, dropout), {}


def pre_norm(rows, columns, rms):
    beta = None if rms else normal(columns)
    return ops.pre_norm, (normal(rows, columns), normal(rows, columns), None, normal(columns), beta, EPS), {"rms": rms}


def embeddings(rows, columns):
    tables = [normal(size if rows else 0, columns) for size in (5, 4, 2)]
    return ops.embeddings, (*[indices(rows)] * 3, *tables, normal(columns), normal(columns), EPS), {}


CASES = {
    "add_layer_norm": add_layer_norm,
    "add_layer_norm with dropout": lambda rows, columns: add_layer_norm(rows, columns, 0.5),
    "bias_gelu": lambda rows, columns: (ops.bias_gelu, (normal(rows, columns), normal(columns)), {}),
    "gated_activation": lambda rows, columns: (ops.gated_activation, (normal(rows, 2 * columns), "gelu"), {}),
    "gelu_layer_norm": lambda rows, columns: (
        ops.gelu_layer_norm,
        (normal(rows, columns), normal(columns), normal(columns), normal(columns), EPS),
        {},
    ),
    "layer norm": lambda rows, columns: pre_norm(rows, columns, False),
    "RMS norm": lambda rows, columns: pre_norm(rows, columns, True),
    "embeddings": embeddings,
    "gather": lambda rows, columns: (ops.gather, (indices(rows), normal(rows, columns)), {}),
    "cross entropy": lambda rows, columns: (
        ops.linear_cross_entropy,
        (normal(rows, columns), None, normal(5, columns), normal(5), indices(rows)),
        {},
    ),
    "attention": lambda rows, columns: (
        ops.attention,
        (normal(rows, 3, 2 if columns else 0, 32), [0, rows]),
        {},
    ),
    "rotary": lambda rows, columns: (ops.rotary, (normal(rows, 3, 2 if columns else 0, 32), torch.ones(rows, 32)), {}),
}


def run(case, rows, columns, implementation):
    function, arguments, keywords = case(rows, columns)
    outputs = function(*arguments, **keywords, implementation=implementation)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else [outputs]) if x.is_floating_point()]
    inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    gradients = torch.autograd.grad([x.sum() for x in outputs], inputs, allow_unused=True)
    return [*outputs, *(x if gradient is None else gradient for x, gradient in zip(inputs, gradients, strict=True))]


@pytest.mark.parametrize("implementation", [None, "cpu"])
@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (3, 0), (0, 0)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sizes_of_zero(case, rows, columns, implementation):
    for actual, expected in zip(
        run(case, rows, columns, implementation), run(case, rows, columns, "reference"), strict=True
    ):
        torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("rows", [0, 3])
def test_cross_entropy_takes_a_vocabulary(rows):
    with pytest.raises(ValueError, match="linear_cross_entropy: weight must have at least one row, that of a label"):
        ops.linear_cross_entropy(normal(rows, 8), None, normal(0, 8), normal(0), indices(rows) - 100)
