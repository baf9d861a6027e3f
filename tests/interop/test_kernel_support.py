"""Calls without fast kernels run transformers' own code."""

import copy
import re

import pytest
import torch
from live_models import batch, live
from torch.utils._python_dispatch import TorchDispatchMode

import bertfast
import bertfast.encoder.encode
import bertfast.models.fused
from bertfast.encoder import kernel_support
from bertfast.models import fused
from bertfast.ops import native
from bertfast.ops.attention import HEAD_DIMENSIONS
from bertfast.runtime.torch_compat import cpu_has_bf16_gemm

pytestmark = pytest.mark.usefixtures("small_batches_are_packed")


class Operations(TorchDispatchMode):
    """Records the name of each operation that runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(str(function))
        return function(*arguments, **(keywords or {}))


def operations_of(model, **changes) -> list[str]:
    """Return the operations of a forward and a backward pass over a batch with padding."""
    values = batch() | changes
    with Operations() as operations:
        model(**values).loss.backward()
    return operations.names


NO_LIBRARY = "the native library was not built"


@pytest.mark.parametrize(
    ("dtype", "library", "slots"),
    [
        (torch.float64, True, 0),
        (torch.float64, False, 0),
        (torch.bfloat16, False, 0),
        (torch.float16, True, 0),
        (torch.float32, False, 34),  # more than a batch has
    ],
)
def test_without_fast_kernels_a_patched_model_runs_the_operations_of_transformers(dtype, library, slots, monkeypatch):
    monkeypatch.setattr(kernel_support, "MIN_SLOTS", slots)
    if not library:
        monkeypatch.setattr(native, "UNAVAILABLE_REASON", NO_LIBRARY)
    plain = live("BertForMaskedLM").to(dtype)
    model = copy.deepcopy(plain)
    bertfast.patch(model)
    labels = torch.where(batch()["attention_mask"] == 1, batch()["input_ids"], -100)
    assert operations_of(model, labels=labels) == operations_of(plain, labels=labels)


@pytest.mark.parametrize(("slots", "columns", "is_packed"), [(33, 11, True), (34, 11, False), (33, 12, False)])
def test_without_the_library_large_batches_in_fp32_are_packed(slots, columns, is_packed, monkeypatch):
    """A batch here has 3 rows and 11 columns."""
    monkeypatch.setattr(native, "UNAVAILABLE_REASON", NO_LIBRARY)
    monkeypatch.setattr(kernel_support, "MIN_SLOTS", slots)
    monkeypatch.setattr(kernel_support, "MIN_COLUMNS", columns)
    plain = live()
    model = copy.deepcopy(plain)
    bertfast.patch(model)
    assert (operations_of(model) != operations_of(plain)) == is_packed


def test_kernel_support_is_decided_at_each_call():
    plain = live()
    model = copy.deepcopy(plain)
    bertfast.patch(model)
    assert operations_of(model) != operations_of(plain)
    assert operations_of(model.double()) == operations_of(plain.double())
    with torch.autocast("cpu", torch.float16):
        assert operations_of(model.float()) == operations_of(plain.float())


def test_packed_sequences_do_not_mix_without_fast_kernels():
    model = live("BertModel").double()
    texts = [torch.randint(53, (1, length)) for length in (4, 1, 7)]
    alone = [model(text) for text in texts]
    bertfast.patch(model)
    packed = model(torch.cat(texts, 1), cu_seq_lens_q=torch.tensor([0, 4, 5, 12]), output_hidden_states=True)
    expected = torch.cat([one.last_hidden_state for one in alone], 1)
    torch.testing.assert_close(packed.last_hidden_state, expected)
    torch.testing.assert_close(packed.hidden_states[-1], expected)
    torch.testing.assert_close(packed.pooler_output, torch.cat([one.pooler_output for one in alone]))


def test_the_report_says_that_a_model_is_left_to_transformers():
    report = bertfast.patch(live().double())
    assert set(report.left) == {"bert"}
    assert report.left["bert"].startswith("no fast kernels for float64 on cpu: ")


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "head_dimension", "reason"),
    [
        ("cuda", (7, 5), torch.float16, 64, "no fast kernels for float16 on cuda: .* sm_80 or later"),
        ("cuda", (8, 0), torch.float64, 64, "no fast kernels for float64 on cuda: "),
        ("cuda", (9, 0), torch.bfloat16, 80, "its head dimension is 80; the kernels support 32, 64 and 128"),
        (
            "mps",
            None,
            torch.float32,
            64,
            "no fast kernels for float32 on mps: the kernels run on CPUs and on NVIDIA GPUs",
        ),
        pytest.param(
            *("cpu", None, torch.bfloat16, 48, "its head dimension is 48; the kernels support 32, 64 and 128"),
            marks=pytest.mark.skipif(native.UNAVAILABLE_REASON is not None, reason=str(native.UNAVAILABLE_REASON)),
        ),
        ("cpu", None, torch.float32, 48, None),  # packed without kernels, see `kernel_support`
        ("cuda", (8, 0), torch.bfloat16, 64, None),
        ("cuda", (8, 0), torch.bfloat16, None, None),
    ],
)
def test_devices_without_fast_kernels_are_left_to_transformers(
    device, capability, dtype, head_dimension, reason, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(kernel_support, "HEAD_DIMENSIONS", HEAD_DIMENSIONS)
    found = kernel_support.unsupported_reason(torch.device(device), dtype, head_dimension)
    assert found is None if reason is None else re.search(reason, found), found


def test_rocm_is_left_to_transformers(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA" in kernel_support.unsupported_reason(torch.device("cuda"), torch.bfloat16, 64)


def test_short_inference_without_padding_is_left_to_transformers(monkeypatch):
    model = live("BertModel")
    patched = copy.deepcopy(model)
    bertfast.patch(patched)
    monkeypatch.setattr(kernel_support, "MIN_SLOTS_WITHOUT_PADDING", 128)
    calls, encode = [], fused.functions.encode
    monkeypatch.setattr(fused.functions, "encode", lambda *args: calls.append(args) or encode(*args))
    ids, mask = torch.randint(53, (1, 8)), torch.ones(1, 8)
    with torch.no_grad():
        output = patched(ids, attention_mask=mask).last_hidden_state
        assert torch.equal(output, model(ids, attention_mask=mask).last_hidden_state)
        assert torch.equal(output, patched(ids).last_hidden_state)
        assert not calls
        patched(ids, attention_mask=mask.index_fill(1, torch.tensor([7]), 0))
        patched(ids.expand(16, 8))
        assert len(calls) == 2
    patched(ids)
    assert len(calls) == 3
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # few sizes instead, which oneDNN keeps code for
        patched(ids)
        patched(ids[:, :7])
    assert len(calls) == (4 if cpu_has_bf16_gemm() else 3)
