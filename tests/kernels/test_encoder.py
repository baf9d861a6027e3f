"""The whole encoder on the kernels: against the reference, compiled by `torch.compile`, and in a CUDA graph."""

from importlib import import_module

import pytest
import torch
from helpers import DEVICE, KERNELS, assert_as_accurate_as_torch
from torch._dynamo.testing import CompileCounterWithBackend

import bertfast
from bertfast import ops
from bertfast.data.batches import Batch
from bertfast.encoder import encode, pretraining_loss
from bertfast.encoder.unpadding import Packed
from bertfast.ops.dropout import RngCoordinates
from bertfast.ops.sequences import Sequences

OPERATIONS = ("attention", "add_layer_norm", "bias_gelu", "embeddings", "gelu_layer_norm", "linear_cross_entropy")
DTYPE = torch.bfloat16 if KERNELS == "cuda" else torch.float32
FALLBACK = "triton" if DEVICE.type == "cuda" else "cpu"  # for operations without a CUDA C++ kernel
SIZES = {
    "vocab_size": 53,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}


@pytest.fixture
def resolve_to(monkeypatch):
    """A function that makes every operation run on an implementation."""

    def everywhere(implementation: str) -> None:
        for name in OPERATIONS:
            chosen = FALLBACK if (name, implementation) == ("embeddings", "cuda") else implementation
            monkeypatch.setattr(
                import_module(getattr(ops, name).__module__), "resolve", lambda *_, chosen=chosen: chosen
            )

    return everywhere


def batch(lengths, masked=(1, 4, 6)) -> Batch:
    sequences = Sequences.from_lengths(lengths, capacity=sum(lengths) + 3, max_seqlen_bound=32, device=DEVICE)
    ids = torch.arange(sequences.capacity, device=DEVICE) * 7 % 53
    return Batch(
        token_ids=ids,
        token_type_ids=ids % 2,
        position_ids=sequences.position.clone(),
        sequences=sequences,
        masked_rows=torch.tensor(masked, device=DEVICE),
        labels=torch.tensor([5, -100, 9], device=DEVICE),
        next_sentence_labels=torch.arange(len(lengths), device=DEVICE) % 2,
        masked=2,
    )


def model(dtype=DTYPE) -> bertfast.BertForPreTraining:
    torch.manual_seed(0)
    return bertfast.BertForPreTraining(bertfast.BertConfig(**SIZES)).to(DEVICE, dtype).train()


def loss(model, batch, seed) -> torch.Tensor:
    losses = pretraining_loss(model, batch, seed)
    return losses.masked_lm + losses.next_sentence


def test_pretraining_is_as_accurate_as_the_reference(resolve_to):
    """Loss and gradients of all parameters, dropout on, on fewer rows in the last layer."""
    seed = torch.tensor(11, device=DEVICE)
    results = []
    for dtype, implementation in ((torch.float64, "reference"), (DTYPE, "reference"), (DTYPE, KERNELS)):
        resolve_to(implementation)
        bert = model(dtype)
        value = loss(bert, batch([9, 3, 11]), seed)
        value.backward()
        results.append({name: x.grad for name, x in bert.named_parameters()} | {"loss": value.detach()})
    truth, expected, kernels = results
    for name, actual in kernels.items():
        weight = truth.get(name.removesuffix("bias") + "weight") if name.endswith("key.bias") else None
        # The loss is fp32, but a sum of values rounded to DTYPE; the error of a scalar may happen to vanish.
        assert_as_accurate_as_torch(actual, expected[name], truth[name], name=name, neighbour=weight, dtype=DTYPE)


@pytest.mark.slow
@pytest.mark.one_instruction_set
@pytest.mark.parametrize(
    ("backend", "tolerance"),
    [
        ("aot_eager", {}),
        pytest.param(
            "inductor",
            {"rtol": 1e-4, "atol": 1e-4},  # it computes the operations between the kernels in its own order
            marks=pytest.mark.skipif(KERNELS != "cpu", reason="the interpreter does not run inductor's own kernels"),
        ),
    ],
)
def test_the_encoder_compiles_to_one_graph_for_any_number_of_tokens(resolve_to, backend, tolerance):
    resolve_to(KERNELS)
    bert = model().bert
    seed = torch.tensor(11, device=DEVICE)

    def run(lengths, encoder) -> list[torch.Tensor]:
        inputs = batch(lengths)
        sequences = inputs.sequences
        rng = RngCoordinates(seed, sequences.token_sequence_ids, sequences.position)
        packed = Packed(
            inputs.token_ids,
            None,
            inputs.token_type_ids,
            inputs.position_ids,
            sequences,
            sequences.first,
            rng=rng,
        )
        hidden = encoder(bert, packed)
        parameters = [x for name, x in bert.named_parameters() if "pooler" not in name]
        return [hidden, *torch.autograd.grad(hidden.square().sum(), parameters)]

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(encode, fullgraph=True, backend=counter)
    for lengths in ([5, 7], [9, 3, 11], [4, 14, 20, 1], [30, 2]):
        for eager, compiled_result in zip(run(lengths, encode), run(lengths, compiled), strict=True):
            torch.testing.assert_close(compiled_result, eager, **tolerance)
    assert counter.frame_count <= 2  # for the first number of tokens, and for any number


@pytest.mark.skipif(DEVICE.type == "cpu", reason="CUDA graphs require a GPU")
def test_a_step_in_a_cuda_graph_is_bitwise_identical_to_the_eager_step():
    bert, seed = model(), torch.tensor(11, device=DEVICE)
    first, second = batch([9, 3, 11]), batch([9, 3, 11])
    second.token_ids.copy_(second.token_ids.flip(0))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            loss(bert, first, seed).backward()
            bert.zero_grad(set_to_none=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = loss(bert, first, seed)
        captured.backward()
    for tokens, seed_value in ((first.token_ids.clone(), 11), (second.token_ids, 12)):
        first.token_ids.copy_(tokens)
        seed.fill_(seed_value)
        bert.zero_grad(set_to_none=False)
        graph.replay()
        replayed = [captured.clone(), *(x.grad.clone() for x in bert.parameters())]
        bert.zero_grad(set_to_none=False)
        value = loss(bert, first, seed)
        value.backward()
        for a, b in zip(replayed, [value, *(x.grad for x in bert.parameters())], strict=True):
            assert torch.equal(a, b)
