"""Memory of inference on a CPU levels off, although batches differ in shape: few GEMM sizes reach oneDNN."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

import bertfast
from bertfast.encoder import kernel_support
from bertfast.ops import native
from bertfast.ops.matmul import caches_shapes
from bertfast.runtime.torch_compat import cpu_has_bf16_gemm

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64, "vocab_size": 64}


def patched():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES)).eval()
    bertfast.patch(model)
    return model


def batch(generator):
    lengths = generator.integers(3, 17, generator.integers(1, 6))
    mask = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None]).long()
    return {"input_ids": torch.from_numpy(generator.integers(0, 64, tuple(mask.shape))), "attention_mask": mask}


def recorded_capacities(monkeypatch) -> list[int]:
    """Return a list that receives the number of slots of each batch."""
    capacities = []
    encode = bertfast.encoder.encode

    def record(model, packed, rows=None):
        capacities.append(packed.sequences.capacity)
        return encode(model, packed, rows)

    monkeypatch.setattr("bertfast.encoder.encode", record)
    return capacities


def resident_memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(native.UNAVAILABLE_REASON is not None or not cpu_has_bf16_gemm(), reason="no kernels for bf16")
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_memory_after_2000_batches_is_that_after_200(precision, monkeypatch):
    monkeypatch.setattr(kernel_support, "MIN_SLOTS_WITHOUT_PADDING", 128)
    model, generator = patched(), np.random.default_rng(0)
    memory = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for count in (200, 1800):
            for _ in range(count):
                model(**batch(generator))
            memory.append(resident_memory())
    assert memory[1] - memory[0] < 20 << 20


@pytest.mark.skipif(native.UNAVAILABLE_REASON is not None or not cpu_has_bf16_gemm(), reason="no kernels for bf16")
def test_single_sentences_and_masked_starts_have_few_token_counts(monkeypatch):
    monkeypatch.setattr(kernel_support, "MIN_SLOTS_WITHOUT_PADDING", 128)
    model, capacities = patched(), recorded_capacities(monkeypatch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for length in range(2, 41):
            mask = torch.ones(1, length)
            model(torch.zeros(1, length, dtype=torch.long), mask)
            mask[0, 0] = 0
            model(torch.zeros(1, length, dtype=torch.long), mask)
    assert len(capacities) == 2 * 39 - 5  # without padding, transformers' own code runs the multiples of 8
    assert set(capacities) == {8, 16, 24, 32, 40}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shapes_cached", [True, False])
def test_inference_pads_token_counts_where_code_is_kept_per_shape(masked, shapes_cached, monkeypatch):
    monkeypatch.setattr("bertfast.ops.matmul.caches_shapes", lambda device, dtype: shapes_cached)
    model, capacities = patched(), recorded_capacities(monkeypatch)
    ids = torch.randint(0, 64, (5, 67))
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    expected = 5 * 67 - 64 if masked else 5 * 67
    inputs = {"input_ids": ids} | ({"attention_mask": mask} if masked else {})
    outputs = [model(**inputs).last_hidden_state for _ in range(2)]  # with gradients
    with torch.no_grad():
        outputs.append(model(**inputs).last_hidden_state)
    assert capacities == [expected, expected, bertfast.ops.sequences.bucket(expected) if shapes_cached else expected]
    torch.testing.assert_close(outputs[2], outputs[0].detach(), atol=1e-6, rtol=1e-5)


def test_half_precision_on_a_cpu_keeps_code_per_shape():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert caches_shapes(cpu, torch.bfloat16)
    assert not caches_shapes(gpu, torch.bfloat16)
