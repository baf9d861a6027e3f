"""Under autocast the residual stream keeps its precision, and layers pass on the copy that GEMMs read."""

import sys
from functools import partial

import pytest
import torch
from helpers import normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import bertfast
from bertfast import encoder
from bertfast.encoder.unpadding import Packed
from bertfast.ops import native
from bertfast.ops.dropout import RngCoordinates
from bertfast.ops.sequences import Sequences

TOKENS = 37  # no other dimension has this size
FLOAT, HALF = torch.float32, torch.bfloat16
STREAMS = pytest.mark.parametrize("residual_dtype", [None, HALF], ids=["fp32", "bf16"])

pytestmark = pytest.mark.skipif(native.UNAVAILABLE_REASON is not None, reason=str(native.UNAVAILABLE_REASON))


class Passes(TorchDispatchMode):
    """Records operations that only cast, copy or add activations, recognised by their TOKENS rows."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        name = function.overloadpacket.__name__
        if name in ("_to_copy", "copy_", "add", "add_", "clone"):
            rows = [x.shape[0] for x in tree_leaves(result) if isinstance(x, Tensor) and x.dim() > 1]
            self.names += [name] * rows.count(TOKENS)
        return result


def model(layers: int) -> bertfast.BertModel:
    torch.manual_seed(0)
    config = bertfast.BertConfig(
        vocab_size=53,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    return bertfast.BertModel(config).train()


def tokens() -> Packed:
    sequences = Sequences.from_lengths([20, 17])
    ids = torch.arange(TOKENS) * 7 % 53
    rng = RngCoordinates(torch.tensor(1), sequences.token_sequence_ids, sequences.position)
    return Packed(ids, None, ids % 2, sequences.position.clone(), sequences, sequences.first, rng=rng)


def autocast():
    return torch.autocast("cpu", HALF)


def passes(layers: int, residual_dtype) -> tuple[list[str], list[str]]:
    """Return what `Passes` records in a forward and in a backward pass of the encoder."""
    made, packed = model(layers), tokens()
    with Passes() as forward, autocast():
        hidden = encoder.encode(made, packed, residual_dtype=residual_dtype)
    gradient = torch.ones_like(hidden)
    with Passes() as backward:
        hidden.backward(gradient)
    return forward.names, backward.names


def results(made, **options) -> list[Tensor]:
    """Return the encoder's output and the gradients of all parameters that it reads."""
    with autocast():
        hidden = encoder.encode(made, tokens(), **options)
    parameters = [x for name, x in made.named_parameters() if "pooler" not in name]
    return [hidden, *torch.autograd.grad(hidden, parameters, output_gradient(hidden))]


def output_gradient(hidden: Tensor) -> Tensor:
    return normal(*hidden.shape, dtype=hidden.dtype).detach()


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@STREAMS
@pytest.mark.parametrize("layers", [1, 4])
def test_layers_neither_cast_nor_add_activations(layers, residual_dtype):
    """The embeddings are cast once each way; the gradients of the first layer's input are added once."""
    forward, backward = passes(layers, residual_dtype)
    assert forward == ["_to_copy"]
    assert sorted(backward) == ["_to_copy", "add"]


def test_casts_and_additions_would_be_noticed(monkeypatch):
    """Between layers that pass on only the stream it is cast once in each direction; gradients are added once."""
    monkeypatch.setattr(sys.modules["bertfast.encoder.encode"], "_takes_copy", lambda module: False)
    forward, backward = passes(4, None)
    assert forward == ["_to_copy"] * 4
    assert sorted(backward) == ["_to_copy"] * 4 + ["add"] * 4


def test_passing_on_copies_is_bitwise_identical(monkeypatch):
    handed_on = results(model(3))
    monkeypatch.setattr(sys.modules["bertfast.encoder.encode"], "_takes_copy", lambda module: False)
    assert_same_bits(handed_on, results(model(3)))


@STREAMS
def test_hidden_states_are_the_residual_stream(residual_dtype):
    states = []
    with autocast():
        hidden = encoder.encode(model(3), tokens(), hidden_states=states, residual_dtype=residual_dtype)
    assert [state.dtype for state in states] == [residual_dtype or FLOAT] * 4
    assert states[-1] is hidden


def test_hidden_states_that_are_read_have_gradients():
    made, states = model(3), []
    with autocast():
        encoder.encode(made, tokens(), hidden_states=states)
    gradient = torch.autograd.grad(sum(state.sum() for state in states), states[1])[0]
    assert gradient.dtype == FLOAT
    assert gradient.isfinite().all()
    assert gradient.count_nonzero() > 0


@pytest.mark.parametrize("recomputed", [(0,), (1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_are_bitwise_identical(recomputed, reentrant):
    plain, made = results(model(3)), model(3)
    for index in recomputed:
        module = made.encoder.layer[index]
        module.forward = partial(checkpoint, module.forward, use_reentrant=reentrant, preserve_rng_state=False)
    with autocast():
        hidden = encoder.encode(made, tokens())
    hidden.backward(output_gradient(hidden))
    parameters = [x.grad for name, x in made.named_parameters() if "pooler" not in name]
    assert_same_bits(plain, [hidden, *parameters])


def test_hooks_see_only_the_residual_stream():
    made, seen = model(3), []

    def double(module, arguments, output):
        seen.append((len(arguments), type(output), output.dtype))
        return 2 * output

    plain = results(made)
    made.encoder.layer[1].register_forward_hook(double)
    doubled = results(made)
    assert seen == [(4, Tensor, FLOAT)]
    assert not torch.equal(plain[0], doubled[0])


def test_linear_layers_that_are_called_read_the_residual_stream():
    made, seen = model(2), {}
    for name in ("attention.self.query", "intermediate.dense"):
        dense = made.encoder.layer[1].get_submodule(name)
        dense.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: inputs[0].dtype}))
    plain, called = results(model(2)), results(made)
    assert set(seen.values()) == {FLOAT}
    assert len(seen) == 2
    for a, b in zip(plain, called, strict=True):
        assert (a - b).norm() < 0.02 * max(a.norm(), 1)  # three GEMMs round differently from one


def test_a_bf16_stream_is_close_to_the_fp32_stream():
    wide, narrow = results(model(3)), results(model(3), residual_dtype=HALF)
    assert narrow[0].dtype == HALF
    difference = (narrow[0].float() - wide[0]).norm() / wide[0].norm()
    assert 0 < difference < 0.05


def test_without_autocast_nothing_is_cast():
    with Passes() as forward:
        hidden = encoder.encode(model(3), tokens())
    assert hidden.dtype == FLOAT
    assert forward.names == []
