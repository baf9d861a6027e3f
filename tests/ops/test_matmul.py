"""fp32 GEMMs of both libraries: outputs and gradients for any layout, with at most twice the error of PyTorch."""

import sys

import pytest
import torch
import torch.nn.functional as F
from family_models import CASES, inputs, pair
from torch.profiler import ProfilerActivity, profile

from bertfast.ops import matmul

ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(params=[False, pytest.param(True, marks=ONEDNN)], ids=["as PyTorch", "oneDNN"])
def library(request, monkeypatch) -> bool:
    monkeypatch.setattr(matmul, "onednn_depth", lambda: sys.maxsize if request.param else 0)
    return request.param


def relative_error(found, truth) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize(("rows", "depth", "columns"), [(16, 16, 16), (40, 769, 48), (33, 3072, 100), (1700, 64, 96)])
def test_outputs_and_gradients_have_at_most_twice_the_error_of_pytorch(library, rows, depth, columns):
    torch.manual_seed(rows)
    x, weight, bias = torch.randn(rows, depth), torch.randn(columns, depth), torch.randn(columns)
    d_y = torch.randn(rows, columns)

    def differentiated(linear, dtype) -> list[torch.Tensor]:
        inputs = [value.to(dtype).requires_grad_() for value in (x, weight, bias)]
        y = linear(*inputs)
        return [y, *torch.autograd.grad(y, inputs, d_y.to(dtype))]

    truth = differentiated(F.linear, torch.float64)
    for y, torch_y, true in zip(
        differentiated(matmul.linear, torch.float32), differentiated(F.linear, torch.float32), truth, strict=True
    ):
        assert relative_error(y, true) <= 2 * relative_error(torch_y, true)
    with torch.no_grad():
        assert relative_error(matmul.linear(x, weight, bias), truth[0]) <= 1e-6


@pytest.mark.parametrize("add", [False, True])
def test_a_gemm_is_written_or_added_for_any_layout(library, add):
    torch.manual_seed(0)
    wide, tall = torch.randn(50, 300), torch.randn(300, 60)
    shared = torch.randn(1, 1).expand(50, 40)
    for a, b in [
        (wide[:, 20:120], tall.mT[:, :100]),
        (wide.mT[40:80], wide.mT[:70]),
        (wide[::2, ::3], wide[::3, ::3]),
        (shared, shared),
        (wide[:3], wide[:20]),  # too small for oneDNN
    ]:
        out = torch.randn(len(a), 128)[:, : len(b)]
        expected = a @ b.mT + (out if add else 0)
        matmul.matmul_nt(a, b, out, add=add)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


def test_autocast_and_half_precision_use_pytorch(library):
    x, weight = torch.randn(32, 32), torch.randn(32, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul.linear(x, weight).dtype == torch.bfloat16
    assert torch.equal(matmul.linear(x.bfloat16(), weight.bfloat16()), F.linear(x.bfloat16(), weight.bfloat16()))


@ONEDNN
def test_a_training_step_is_the_same_with_both(monkeypatch):
    from bertfast import BertConfig, BertForPreTraining

    config = BertConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96)
    torch.manual_seed(0)
    model = BertForPreTraining(config).train()
    ids = torch.randint(5, 96, (6, 20))
    labels = torch.where(torch.rand(ids.shape) < 0.3, ids, -100)
    found = []
    for depth in (0, 768, sys.maxsize):
        monkeypatch.setattr(matmul, "onednn_depth", lambda answer=depth: answer)
        torch.manual_seed(1)
        loss = model(ids, labels=labels, next_sentence_label=torch.arange(6) % 2).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        model.zero_grad()
    for one, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@ONEDNN
@pytest.mark.parametrize("case", [case for case in CASES if case.task == "Model"], ids=str)
def test_all_gemms_of_an_encoder_use_the_faster_library(case, monkeypatch):
    monkeypatch.setattr(matmul, "onednn_depth", lambda: sys.maxsize)
    model = pair(case)[0].train()
    arguments, _ = inputs(case, model)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        model(**arguments).last_hidden_state.sum().backward()
    events = profiler.key_averages(group_by_input_shape=True)
    others = [event.input_shapes for event in events if event.key in ("aten::mm", "aten::addmm")]
    # A pooler has a row per sequence, fewer than the faster library is for.
    assert not [shapes for shapes in others if min(size for shape in shapes for size in shape) >= 16]
    assert "mkldnn::_linear_pointwise" in {event.key for event in events}


@pytest.mark.parametrize(
    ("vendor", "family", "model", "depth"),
    [
        ("AuthenticAMD", 25, 1, 0),  # Zen 3
        ("AuthenticAMD", 25, 17, 768),  # Zen 4
        ("AuthenticAMD", 25, 97, 768),
        ("AuthenticAMD", 26, 2, sys.maxsize),  # Zen 5
        ("GenuineIntel", 6, 143, 0),
    ],
)
def test_the_processor_decides_which_sums_onednn_computes(vendor, family, model, depth):
    lines = (f"vendor_id\t: {vendor}", f"cpu family\t: {family}", f"model\t\t: {model}", "model name\t: EPYC 9999")
    assert matmul._measured_depth("\n".join(lines)) == depth


def test_a_processor_without_a_description_uses_pytorch():
    assert matmul._measured_depth("processor : 0\nHardware : BCM2711") == 0


@ONEDNN
def test_only_sums_of_at_most_the_measured_depth_use_onednn(monkeypatch):
    monkeypatch.setattr(matmul, "onednn_depth", lambda: 64)
    short, long = torch.randn(20, 64), torch.randn(20, 65)
    assert matmul.uses_onednn(short, short)
    assert not matmul.uses_onednn(long, long)
