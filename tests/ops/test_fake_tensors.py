"""Operators on fake and meta tensors and under torch.compile: shapes and dtypes of results without computing them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bertfast import ops
from bertfast.ops.sequences import Sequences

TOKENS, HIDDEN, HEADS, DIMENSION = 12, 96, 3, 32
FLOAT, BF16 = torch.float32, torch.bfloat16


def attention(implementation, qkv):
    cu_seqlens = torch.arange(0, TOKENS + 1, 4, device=qkv.device)
    sequences = Sequences.from_cu_seqlens(cu_seqlens, capacity=TOKENS, max_seqlen_bound=8)
    return ops.attention(qkv, sequences, dropout=0.1, implementation=implementation)


def add_layer_norm(implementation, *x):
    y, copy = ops.add_layer_norm(*x, 1e-12, 0.1, compute_dtype=BF16, implementation=implementation)
    return y + copy


def bias_gelu(implementation, *x):
    return ops.bias_gelu(*x, implementation=implementation)


def gelu_layer_norm(implementation, *x):
    return ops.gelu_layer_norm(*x, 1e-12, implementation=implementation)


def embeddings(implementation, *x):
    ids = torch.arange(TOKENS, device=x[0].device)
    return ops.embeddings(ids, ids % 2, ids, *x, 1e-12, 0.1, padding_index=0, implementation=implementation)


def gated_activation(implementation, x, bias):
    return ops.gated_activation(x, "silu", bias, implementation=implementation)


def pre_norm(implementation, *x):
    stream, normed = ops.pre_norm(*x, 1e-12, 0.1, norm_dtype=BF16, implementation=implementation)
    return stream + normed


def gather(implementation, x):
    return ops.gather(torch.arange(5, device=x.device), x, implementation=implementation)[0]


def linear_gelu(implementation, *x):
    return ops.linear_gelu(*x, implementation=implementation)


def linear_cross_entropy(implementation, hidden, weight, bias):
    labels = torch.arange(TOKENS, device=hidden.device)
    return ops.linear_cross_entropy(hidden, None, weight, bias, labels, implementation=implementation)[0]


def rotary(implementation, qkv):
    table = torch.ones(TOKENS, DIMENSION, device=qkv.device)
    return ops.rotary(qkv, table, implementation=implementation)


VECTOR, ROWS = (HIDDEN,), (TOKENS, HIDDEN)
# operator: shapes of its inputs; the first is bf16 where a second, of the same shape, is not
OPERATORS = {
    attention: [(TOKENS, 3, HEADS, DIMENSION)],
    add_layer_norm: [ROWS, ROWS, VECTOR, VECTOR, VECTOR],
    bias_gelu: [ROWS, VECTOR],
    gelu_layer_norm: [ROWS, VECTOR, VECTOR, VECTOR],
    embeddings: [(40, HIDDEN), (50, HIDDEN), (2, HIDDEN), VECTOR, VECTOR],
    gated_activation: [ROWS, VECTOR],
    gather: [ROWS],
    rotary: [(TOKENS, 3, HEADS, DIMENSION)],
    linear_gelu: [ROWS, (8, HIDDEN), (8,)],
    pre_norm: [ROWS, ROWS, VECTOR, VECTOR, VECTOR],
    linear_cross_entropy: [ROWS, (60, HIDDEN), (60,)],
}
of_each_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)


def inputs(operator, device: str = "cpu") -> list[torch.Tensor]:
    shapes = OPERATORS[operator]
    dtypes = [BF16 if index == 0 and shapes[1:2] == shapes[:1] else FLOAT for index in range(len(shapes))]
    return [
        torch.ones(shape, device=device, dtype=dtype, requires_grad=True)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


def described(y: torch.Tensor, leaves: list[torch.Tensor]) -> list[tuple]:
    """Shape and dtype of an output and of its gradients."""
    return [(tuple(x.shape), x.dtype) for x in (y, *torch.autograd.grad(y.sum(), leaves))]


def run(operator, implementation=None, device: str = "cpu") -> list[tuple]:
    leaves = inputs(operator, device)
    return described(operator(implementation, *leaves), leaves)


def test_all_operators_are_tested():
    assert {operator.__name__ for operator in OPERATORS} == set(ops.__all__)


@of_each_operator
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(operator, implementation):
    real = run(operator, implementation)
    with FakeTensorMode():
        assert run(operator, implementation) == real


@of_each_operator
def test_meta_tensors_have_the_shapes_and_dtypes_of_real_ones(operator):
    assert run(operator, device="meta") == run(operator)


@of_each_operator
def test_compiles_in_one_graph_forward_and_backward(operator):
    """`fullgraph` raises an error where a part cannot be traced."""
    torch._dynamo.reset()
    leaves = inputs(operator)
    y = torch.compile(lambda *x: operator(None, *x), fullgraph=True, backend="aot_eager")(*leaves)
    assert described(y, leaves) == run(operator)


def test_sequences_of_fake_tensors_have_shapes():
    with FakeTensorMode():
        cu_seqlens = torch.zeros(4, dtype=torch.int32)
        sequences = Sequences.from_cu_seqlens(cu_seqlens, capacity=10, max_seqlen_bound=8)
        assert sequences.position.shape == sequences.token_sequence_ids.shape == (10,)
        assert sequences.tile_table.dtype == torch.int32
