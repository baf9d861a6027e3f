"""Second derivatives of the operators: those of the reference, for each implementation of the forward pass."""

from importlib import import_module

import pytest
import torch
from helpers import DEVICE, HIGHEST_PRECISION, KERNELS, WITHOUT_CUDA_KERNEL, compare_with_torch, dropout_over, normal

from bertfast import ops
from bertfast.ops.sequences import Sequences

TOKENS, HIDDEN = 11, 48
IDS = torch.arange(TOKENS, device=DEVICE)
TABLE = normal(TOKENS, 24, dtype=torch.float32, device=DEVICE).detach()  # of `rotary`
LABELS = torch.where(IDS % 3 == 1, -100, IDS % 7)


def attention(implementation):
    sequences = Sequences.from_lengths([4, 0, TOKENS - 5], capacity=TOKENS, device=DEVICE)
    return lambda qkv: ops.attention(
        qkv, sequences, dropout=dropout_over(sequences), causal=True, implementation=implementation
    )


def add_layer_norm(implementation):
    dropout = dropout_over(Sequences.from_lengths([TOKENS], device=DEVICE))
    return lambda *x: ops.add_layer_norm(*x, 1e-12, dropout, implementation=implementation)


def embeddings(implementation):
    dropout = dropout_over(Sequences.from_lengths([TOKENS], device=DEVICE))
    return lambda *x: ops.embeddings(
        IDS % 5, IDS % 2, IDS, *x, 1e-12, dropout, padding_index=0, implementation=implementation
    )


def bias_gelu(implementation):
    return lambda *x: ops.bias_gelu(*x, implementation=implementation)


def gated_activation(implementation):
    return lambda x, bias: ops.gated_activation(x, "gelu_tanh", bias, implementation=implementation)


def pre_norm(implementation):
    dropout = dropout_over(Sequences.from_lengths([TOKENS], device=DEVICE))

    def function(*x):
        stream, normed = ops.pre_norm(*x, 1e-12, dropout, implementation=implementation)
        return stream.sin() + normed  # different gradients of the two

    return function


def rms_norm(implementation):
    return lambda stream, gamma: ops.pre_norm(
        None, stream, None, gamma, None, 1e-12, rms=True, implementation=implementation
    )[1]


def gelu_layer_norm(implementation):
    return lambda *x: ops.gelu_layer_norm(*x, 1e-12, implementation=implementation)


def rotary(implementation):
    return lambda qkv: ops.rotary(qkv, TABLE, implementation=implementation)


def linear_cross_entropy(implementation):
    rows = (3 * IDS) % (TOKENS - 1)  # one row twice, one never
    return lambda *x: ops.linear_cross_entropy(x[0], rows, *x[1:], LABELS, implementation=implementation)[0]


# operator: (what makes its function, shapes of its inputs)
CASES = {
    "attention": (attention, [(TOKENS, 3, 2, 32)]),
    "add_layer_norm": (add_layer_norm, [(TOKENS, HIDDEN), (TOKENS, HIDDEN), (HIDDEN,), (HIDDEN,), (HIDDEN,)]),
    "embeddings": (embeddings, [(5, HIDDEN), (TOKENS, HIDDEN), (2, HIDDEN), (HIDDEN,), (HIDDEN,)]),
    "bias_gelu": (bias_gelu, [(TOKENS, HIDDEN), (HIDDEN,)]),
    "gated_activation": (gated_activation, [(TOKENS, HIDDEN), (HIDDEN,)]),
    "pre_norm": (pre_norm, [(TOKENS, HIDDEN), (TOKENS, HIDDEN), (HIDDEN,), (HIDDEN,), (HIDDEN,)]),
    "pre_norm, the norm alone": (rms_norm, [(TOKENS, HIDDEN), (HIDDEN,)]),
    "gelu_layer_norm": (gelu_layer_norm, [(TOKENS, HIDDEN), (HIDDEN,), (HIDDEN,), (HIDDEN,)]),
    "rotary": (rotary, [(TOKENS, 3, 2, 24)]),
    "linear_cross_entropy": (linear_cross_entropy, [(TOKENS, HIDDEN), (60, HIDDEN), (60,)]),
}
CASES = {name: case for name, case in CASES.items() if not name.startswith(WITHOUT_CUDA_KERNEL)}

of_each_operator = pytest.mark.parametrize("operator", CASES)


def first_derivatives(function):
    """The gradients of the sum of squares, as a function that can be differentiated again."""

    def gradients(*inputs):
        # Squares, so that the outputs' gradient depends on all inputs, too.
        return torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)

    return gradients


def inputs_of(shapes):
    return [normal(*shape, seed=seed, device=DEVICE) for seed, shape in enumerate(shapes)]


def precise_dtype(operator):
    return HIGHEST_PRECISION if operator == "attention" else torch.float32


@of_each_operator
def test_second_derivatives_are_as_accurate_as_the_reference(operator):
    make, shapes = CASES[operator]
    compare_with_torch(
        first_derivatives(make(KERNELS)),
        first_derivatives(make("reference")),
        inputs_of(shapes),
        precise_dtype(operator),
    )


@of_each_operator
def test_a_gradient_penalty_trains_as_with_the_reference(operator):
    """The loss and the norm of its gradient together: both backward passes are combined."""
    make, shapes = CASES[operator]

    def penalised(function):
        def loss(*inputs):
            plain = function(*inputs).square().mean()
            gradients = torch.autograd.grad(plain, inputs, create_graph=True)
            return plain + sum(gradient.square().sum() for gradient in gradients)

        return loss

    compare_with_torch(
        penalised(make(KERNELS)), penalised(make("reference")), inputs_of(shapes), precise_dtype(operator)
    )


def test_an_input_computed_from_another_is_not_counted_twice():
    """x is computed from the residual, and each gets its own gradient."""

    def of_one_input(implementation):
        operator = add_layer_norm(implementation)

        def function(residual, *parameters):
            return operator(residual.sin() * residual, residual, *parameters)

        return first_derivatives(function)

    shapes = CASES["add_layer_norm"][1][1:]
    compare_with_torch(of_one_input(KERNELS), of_one_input("reference"), inputs_of(shapes), torch.float32)


@of_each_operator
def test_a_plain_backward_pass_runs_the_kernel(operator, monkeypatch):
    """The reference runs only if the backward pass must be differentiable."""
    make, shapes = CASES[operator]

    def refuse(*_):
        raise AssertionError("the reference was differentiated")

    module = import_module(getattr(ops, operator.partition(",")[0]).__module__)
    monkeypatch.setattr(module, "reference_gradients", refuse)
    inputs = [x.detach().to(precise_dtype(operator)).requires_grad_() for x in inputs_of(shapes)]
    y = make(KERNELS)(*inputs)
    torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)
    with pytest.raises(AssertionError, match="was differentiated"):
        torch.autograd.grad(y.square().sum(), inputs, create_graph=True)


@of_each_operator
def test_only_the_reference_supports_torch_func(operator):
    make, shapes = CASES[operator]
    inputs = [x.detach() for x in inputs_of(shapes)]
    gradient = torch.func.grad(lambda x: make(None)(x, *inputs[1:]).square().sum())(inputs[0])
    leaf = inputs[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(make("reference")(leaf, *inputs[1:]).square().sum(), leaf)
    torch.testing.assert_close(gradient, expected)
    with pytest.raises(ValueError, match=r"torch\.func .* differentiation; .*'reference'"):
        torch.func.grad(lambda x: make(KERNELS)(x, *inputs[1:]).square().sum())(inputs[0].to(precise_dtype(operator)))
