"""The memory plan, beside what autograd keeps."""

import pytest
import torch

from bertfast import BertConfig, BertForPreTraining
from bertfast.encoder import encode
from bertfast.encoder.unpadding import Packed
from bertfast.ops.dropout import RngCoordinates
from bertfast.ops.sequences import Sequences
from bertfast.runtime.precision import autocast
from bertfast.training.memory_estimate import Footprint, activations, available_memory, footprint

SIZES = {"vocab_size": 64, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512}
CPU = torch.device("cpu")


def kept(layers: int, precision: str, residual_precision: str) -> int:
    """Return the bytes that a forward pass keeps of a token, parameters aside."""
    model = BertForPreTraining(BertConfig(num_hidden_layers=layers, max_position_embeddings=64, **SIZES)).bert
    sequences = Sequences.from_lengths([64] * 8)
    ids = torch.arange(sequences.capacity) % 64
    rng = RngCoordinates(torch.tensor(1), sequences.token_sequence_ids, sequences.position)
    packed = Packed(ids, None, ids % 2, sequences.position, sequences, sequences.first, rng=rng)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found, alive = {}, []

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in owned and sequences.capacity in x.shape and x.is_floating_point():
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(x)  # or its place would be taken by another
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast(CPU, precision):
        encode(model, packed, residual_dtype=torch.bfloat16 if residual_precision == "bf16" else None)
    return sum(found.values()) // sequences.capacity


@pytest.mark.parametrize("precisions", [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")], ids="-".join)
def test_a_layer_keeps_what_is_planned(precisions):
    measured = kept(3, *precisions) - kept(2, *precisions)
    config = BertConfig(num_hidden_layers=1, max_position_embeddings=64, **SIZES)
    assert activations(config, *precisions) == pytest.approx(measured, rel=0.15)


def test_parameters_gradients_and_states_are_counted():
    config = BertConfig(num_hidden_layers=2, max_position_embeddings=64, **SIZES)
    model = BertForPreTraining(config)
    options = {"precision": "fp32", "tokens": 256, "checkpointed": 0, "ranks": 1}
    plan = footprint(model, config, optimizer="adamw", **options)
    size = 4 * sum(p.numel() for p in model.parameters())
    assert (plan.parameters, plan.gradients, plan.optimizer) == (size, size, 2 * size)
    assert plan.total == 4 * size + 256 * 2 * activations(config, "fp32")
    shared = footprint(model, config, optimizer="adamw", **options | {"ranks": 4})
    assert shared.parameters == size // 4
    spared = footprint(model, config, optimizer="adamw", **options | {"checkpointed": 2})
    assert spared.per_token < 0.7 * plan.per_token


def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_does():
    plan = Footprint(parameters=1000, gradients=1000, optimizer=2000, per_token=10, tokens=1000)
    plan.check(14_000)
    plan.check(None)
    with pytest.raises(ValueError, match=r"a batch of 1000 tokens will not fit.*tokens_per_batch of at most 960 fits"):
        plan.check(13_999)
    with pytest.raises(ValueError, match="no batch fits"):
        plan.check(3000)


def test_a_cpu_says_how_much_is_free():
    assert 1 << 20 < available_memory(CPU) < 1 << 50
