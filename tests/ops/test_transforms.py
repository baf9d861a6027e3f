"""Transforms of derivatives around the operators: batches of gradients, vmap, torch.func inside of torch.compile."""

import pytest
import torch
from helpers import normal
from torch import Tensor

from bertfast import ops
from bertfast.ops.dropout import Dropout
from bertfast.ops.sequences import Sequences

TOKENS, HIDDEN = 7, 64
SEQUENCES = Sequences.from_lengths([3, 4])
DROPOUT = Dropout(0.3, torch.tensor(77), 5, SEQUENCES.token_sequence_ids, SEQUENCES.position)
ROWS = torch.tensor([0, 0, 1])
IDS = torch.arange(TOKENS)
VECTOR = normal(HIDDEN, dtype=torch.float32).detach()
TABLE = normal(TOKENS, 32, dtype=torch.float32).detach()


def attention(x: Tensor) -> Tensor:
    qkv = torch.stack([x, x.sin(), x.cos()], 1).unflatten(2, (2, 32))
    return ops.attention(qkv, SEQUENCES, dropout=DROPOUT)


def linear_cross_entropy(x: Tensor) -> Tensor:
    return ops.linear_cross_entropy(x, ROWS, x.sin(), x[:, 0], torch.tensor([1, -100, 2]))[0]


OPERATORS = {
    "attention": attention,
    "add_layer_norm": lambda x: ops.add_layer_norm(x, x.sin(), VECTOR, VECTOR, VECTOR, 1e-12, DROPOUT),
    "bias_gelu": lambda x: ops.bias_gelu(x, VECTOR),
    "embeddings": lambda x: ops.embeddings(IDS, IDS % 2, IDS, x, x.sin(), x.cos(), VECTOR, VECTOR, 1e-12, DROPOUT),
    "gated_activation": lambda x: ops.gated_activation(x, "silu", VECTOR),
    "gather": lambda x: ops.gather(ROWS, x.sin())[0],
    "gelu_layer_norm": lambda x: ops.gelu_layer_norm(x, VECTOR, VECTOR, VECTOR, 1e-12),
    "linear_cross_entropy": linear_cross_entropy,
    "rotary": lambda x: ops.rotary(x.sin().unflatten(1, (1, 2, 32)).repeat(1, 3, 1, 1), TABLE),
    "linear_gelu": lambda x: ops.linear_gelu(x, x.sin(), x[:, 0]),
    "pre_norm": lambda x: sum(ops.pre_norm(x, x.sin(), VECTOR, VECTOR, VECTOR, 1e-12, DROPOUT)),
    "pre_norm, the norm alone": lambda x: sum(ops.pre_norm(None, x.sin(), None, VECTOR, None, 1e-12, rms=True)),
}
of_each_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def inputs() -> Tensor:
    return normal(TOKENS, HIDDEN, dtype=torch.float32)


@of_each_operator
def test_a_batch_of_gradients_equals_one_after_another(operator):
    x = inputs()
    y = operator(x)
    d_y = torch.stack([normal(*y.shape, dtype=torch.float32, seed=seed).detach() for seed in range(3)])
    expected = torch.stack([torch.autograd.grad(y, x, each, retain_graph=True)[0] for each in d_y])
    (batched,) = torch.autograd.grad(operator(x), x, d_y, is_grads_batched=True)
    torch.testing.assert_close(batched, expected)
    by_vmap = torch.func.vmap(lambda each: torch.autograd.grad(y, x, each, retain_graph=True)[0])(d_y)
    torch.testing.assert_close(by_vmap, expected)


@pytest.mark.slow
@of_each_operator
def test_a_compiled_transform_equals_the_transform(operator):
    torch._dynamo.reset()

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: operator(x).square().sum())(x)

    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs().detach()), gradient(inputs().detach()))


NEEDS_RULE = pytest.mark.skipif(torch.__version__ < "2.13", reason="this PyTorch has no batching rule of view(dtype)")


@pytest.mark.parametrize("randomness", ["same", pytest.param("different", marks=NEEDS_RULE)])
def test_vmap_draws_dropout_by_its_randomness_option(randomness):
    def draw(x: Tensor) -> Tensor:
        y = ops.attention(x.unflatten(1, (3, 2, 32)), [TOKENS], dropout=0.3)
        return ops.add_layer_norm(y.flatten(1), y.flatten(1), VECTOR, VECTOR, VECTOR, 1e-12, 0.3)

    x = normal(TOKENS, 3 * HIDDEN, dtype=torch.float32).detach()
    first, second = torch.func.vmap(draw, randomness=randomness)(torch.stack([x, x]))
    # PyTorch's batched GEMM may round the two differently.
    assert torch.allclose(first, second, rtol=1e-4, atol=1e-5) == (randomness == "same")


def test_compilation_without_a_transform_keeps_the_kernels():
    torch._dynamo.reset()
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]):
        called.extend(str(node.target) for module in graph.modules() for node in module.graph.nodes)
        return graph

    torch.compile(OPERATORS["bias_gelu"], fullgraph=True, backend=backend)(inputs())
    assert any("bertfast" in name and "bias_gelu_forward" in name for name in called)
