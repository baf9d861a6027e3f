"""The memory estimate, compared with what autograd saves."""

import pytest
import torch

from bertfast import BertConfig, BertForPreTraining
from bertfast.encoder import encode
from bertfast.encoder.unpadding import Packed
from bertfast.ops.dropout import RngCoordinates
from bertfast.ops.sequences import Sequences
from bertfast.runtime.precision import autocast
from bertfast.training.memory_estimate import MemoryEstimate, activations, available_memory, estimate_memory

SIZES = {"vocab_size": 64, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512}
CPU = torch.device("cpu")


def saved_bytes(layers: int, precision: str, residual_precision: str) -> int:
    """Return the bytes per token that a forward pass saves, parameters excluded."""
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
            alive.append(x)  # or another tensor would get its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast(CPU, precision):
        encode(model, packed, residual_dtype=torch.bfloat16 if residual_precision == "bf16" else None)
    return sum(found.values()) // sequences.capacity


@pytest.mark.parametrize("precisions", [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")], ids="-".join)
def test_saved_activations_match_the_estimate(precisions):
    measured = saved_bytes(3, *precisions) - saved_bytes(2, *precisions)
    config = BertConfig(num_hidden_layers=1, max_position_embeddings=64, **SIZES)
    assert activations(config, *precisions) == pytest.approx(measured, rel=0.15)


def test_parameters_gradients_and_optimizer_states_are_counted():
    config = BertConfig(num_hidden_layers=2, max_position_embeddings=64, **SIZES)
    model = BertForPreTraining(config)
    options = {"precision": "fp32", "tokens": 256, "checkpointed": 0, "ranks": 1}
    plan = estimate_memory(model, config, optimizer="adamw", **options)
    size = 4 * sum(p.numel() for p in model.parameters())
    assert (plan.parameters, plan.gradients, plan.optimizer) == (size, size, 2 * size)
    assert plan.total == 4 * size + 256 * 2 * activations(config, "fp32")
    shared = estimate_memory(model, config, optimizer="adamw", **options | {"ranks": 4})
    assert shared.parameters == size // 4
    recomputed = estimate_memory(model, config, optimizer="adamw", **options | {"checkpointed": 2})
    assert recomputed.per_token < 0.7 * plan.per_token


def test_a_batch_that_does_not_fit_is_refused_naming_the_largest_that_fits():
    plan = MemoryEstimate(parameters=1000, gradients=1000, optimizer=2000, per_token=10, tokens=1000)
    plan.check(14_000)
    plan.check(None)
    with pytest.raises(ValueError, match=r"a batch of 1000 tokens does not fit.*--tokens-per-batch 960 is the largest"):
        plan.check(13_999)
    with pytest.raises(ValueError, match="no batch fits"):
        plan.check(3000)


def test_a_cpu_reports_its_free_memory():
    assert 1 << 20 < available_memory(CPU) < 1 << 50
