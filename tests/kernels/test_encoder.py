"""The whole encoder on the kernels: as the definition has it, through `torch.compile`, and in a CUDA graph."""

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

OPERATIONS = ("attention", "add_layer_norm", "bias_gelu", "embed", "gelu_layer_norm", "linear_cross_entropy")
DTYPE = torch.bfloat16 if KERNELS == "cuda" else torch.float32
BESIDE = "triton" if DEVICE.type == "cuda" else "cpu"  # the kernels in CUDA C++, which are not of every operation
SIZES = {
    "vocab_size": 53,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}


@pytest.fixture
def choose(monkeypatch):
    """Call it, and every operation runs on this implementation."""

    def everywhere(implementation: str) -> None:
        for name in OPERATIONS:
            chosen = BESIDE if (name, implementation) == ("embed", "cuda") else implementation
            monkeypatch.setattr(
                import_module(getattr(ops, name).__module__), "choose", lambda *_, chosen=chosen: chosen
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


def test_pretraining_is_as_accurate_as_the_definition(choose):
    """Loss and gradients of all parameters, dropout on, on fewer rows in the last layer."""
    seed = torch.tensor(11, device=DEVICE)
    results = []
    for dtype, implementation in ((torch.float64, "reference"), (DTYPE, "reference"), (DTYPE, KERNELS)):
        choose(implementation)
        ours = model(dtype)
        value = loss(ours, batch([9, 3, 11]), seed)
        value.backward()
        results.append({name: x.grad for name, x in ours.named_parameters()} | {"loss": value.detach()})
    truth, theirs, kernels = results
    for name, our in kernels.items():
        weight = truth.get(name.removesuffix("bias") + "weight") if name.endswith("key.bias") else None
        # The loss is fp32, but a sum of what was rounded in DTYPE; of one number, either error may happen to vanish.
        assert_as_accurate_as_torch(our, theirs[name], truth[name], name=name, neighbour=weight, dtype=DTYPE)


@pytest.mark.one_instruction_set
@pytest.mark.parametrize(
    ("backend", "tolerance"),
    [
        ("aot_eager", {}),
        pytest.param(
            "inductor",
            {"rtol": 1e-4, "atol": 1e-4},  # it computes what lies between the kernels in its own order
            marks=pytest.mark.skipif(KERNELS != "cpu", reason="its own kernels are not for the interpreter"),
        ),
    ],
)
def test_the_encoder_compiles_whole_and_once_for_all_numbers_of_tokens(choose, backend, tolerance):
    choose(KERNELS)
    ours = model().bert
    seed = torch.tensor(11, device=DEVICE)

    def run(lengths, encoder) -> list[torch.Tensor]:
        made = batch(lengths)
        sequences = made.sequences
        rng = RngCoordinates(seed, sequences.token_sequence_ids, sequences.position)
        packed = Packed(
            made.token_ids, None, made.token_type_ids, made.position_ids, sequences, sequences.first, rng=rng
        )
        hidden = encoder(ours, packed)
        parameters = [x for name, x in ours.named_parameters() if "pooler" not in name]
        return [hidden, *torch.autograd.grad(hidden.square().sum(), parameters)]

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(encode, fullgraph=True, backend=counter)
    for lengths in ([5, 7], [9, 3, 11], [4, 14, 20, 1], [30, 2]):
        for plain, made in zip(run(lengths, encode), run(lengths, compiled), strict=True):
            torch.testing.assert_close(made, plain, **tolerance)
    assert counter.frame_count <= 2  # for the first number, and for any number


@pytest.mark.skipif(DEVICE.type == "cpu", reason="a CPU captures no graph")
def test_a_step_in_a_cuda_graph_is_the_step():
    ours, seed = model(), torch.tensor(11, device=DEVICE)
    first, second = batch([9, 3, 11]), batch([9, 3, 11])
    second.token_ids.copy_(second.token_ids.flip(0))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            loss(ours, first, seed).backward()
            ours.zero_grad(set_to_none=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = loss(ours, first, seed)
        captured.backward()
    for tokens, number in ((first.token_ids.clone(), 11), (second.token_ids, 12)):
        first.token_ids.copy_(tokens)
        seed.fill_(number)
        ours.zero_grad(set_to_none=False)
        graph.replay()
        replayed = [captured.clone(), *(x.grad.clone() for x in ours.parameters())]
        ours.zero_grad(set_to_none=False)
        value = loss(ours, first, seed)
        value.backward()
        for a, b in zip(replayed, [value, *(x.grad for x in ours.parameters())], strict=True):
            assert torch.equal(a, b)
