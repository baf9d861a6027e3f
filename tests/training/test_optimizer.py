"""Optimizers, schedule and precision."""

import copy
import math

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import get_scheduler

from bertfast import BertConfig, BertForPreTraining
from bertfast.runtime import precision
from bertfast.runtime.precision import choose_precision
from bertfast.training.layerwise_decay import layerwise_scale
from bertfast.training.optimizer import Lamb, Muon, build_optimizers, not_finite, step_if_finite
from bertfast.training.schedule import schedule, set_learning_rate


@pytest.fixture
def model() -> BertForPreTraining:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    return BertForPreTraining(BertConfig(num_hidden_layers=2, max_position_embeddings=16, **sizes))


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
def test_every_parameter_has_one_optimizer_and_vectors_do_not_decay(model, name):
    groups = [group for optimizer in build_optimizers(model, name, 1e-3, 0.01) for group in optimizer.param_groups]
    owned = [parameter for group in groups for parameter in group["params"]]
    assert {id(parameter) for parameter in owned} == {id(parameter) for parameter in model.parameters()}
    assert len(owned) == len({id(parameter) for parameter in owned})
    for group in groups:
        assert all((parameter.dim() > 1) == (group["weight_decay"] > 0) for parameter in group["params"])


def test_muon_updates_only_matrices_between_features(model):
    muon, _ = build_optimizers(model, "muon", 1e-3, 0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owned = [names[id(parameter)] for parameter in muon.param_groups[0]["params"]]
    assert len(owned) == 2 * 6 + 2
    assert all(name.startswith(("bert.encoder.layer", "bert.pooler", "cls.predictions.transform")) for name in owned)


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
def test_layerwise_decay_scales_the_rate_of_each_layer(model, name):
    optimizers = build_optimizers(model, name, 1.0, 0.01, scale_of=layerwise_scale(0.5, layers=2))
    for learning_rate in (1.0, 0.25):
        set_learning_rate(optimizers, learning_rate)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        rates = {id(parameter): group["lr"].item() for group in groups for parameter in group["params"]}
        for key, parameter in model.named_parameters():
            below_head = {"bert.embeddings": 3, "bert.encoder.layer.0": 2, "bert.encoder.layer.1": 1}
            depth = next((depth for prefix, depth in below_head.items() if key.startswith(f"{prefix}.")), 0)
            assert rates.pop(id(parameter)) == learning_rate * 0.5**depth, key
        assert not rates


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("distilbert.transformer.layer.3.attention.q_lin.weight", 1),
        ("roberta.encoder.layer.0.output.dense.bias", 4),
        ("model.layers.2.attn.Wqkv.weight", 2),
        ("model.embeddings.tok_embeddings.weight", 5),
        ("model.embed_tokens.weight", 5),
        ("electra.embeddings_project.weight", 5),
        ("model.final_norm.weight", 0),
        ("bilstm.lstm.weight_ih_l0", 0),
        ("classifier.weight", 0),
    ],
)
def test_layerwise_decay_knows_the_layers_of_each_family(name, depth):
    assert layerwise_scale(0.5, layers=4)(name) == 0.5**depth


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_schedules_equal_those_of_transformers(name, warmup):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    for step in range(20):
        assert schedule(name, step / 20, warmup / 20) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_muon_equals_pytorch(model):
    shapes = [(32, 32), (48, 32), (32, 48), (48, 32)]
    bertfast, pytorch = ([torch.nn.Parameter(torch.randn(s)) for s in shapes] for _ in range(2))
    for a, b in zip(bertfast, pytorch, strict=True):
        b.data.copy_(a)
    optimizers = [
        Muon(bertfast, 1e-2, 0.1),
        torch.optim.Muon(pytorch, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    starts = [p.detach().clone() for p in bertfast]
    for _ in range(5):
        for a, b in zip(bertfast, pytorch, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(bertfast, pytorch, starts, strict=True):
        # PyTorch iterates in bf16, whose relative precision is 1/256.
        assert (a - b).norm() < 0.03 * (b - start).norm()


def test_lamb_equals_its_definition():
    torch.manual_seed(0)
    groups = [
        {"params": [torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.zeros(3, 2))], "weight_decay": 0.1},
        {"params": [torch.nn.Parameter(torch.randn(4))], "weight_decay": 0.0},
    ]
    parameters = [p for group in groups for p in group["params"]]
    expected = [p.detach().double() for p in parameters]
    means, squares = ([torch.zeros_like(p) for p in expected] for _ in range(2))
    optimizer, decays = Lamb(groups, 0.01, (0.9, 0.99)), (0.1, 0.1, 0.0)
    for count in range(1, 5):
        for index, (parameter, decay) in enumerate(zip(parameters, decays, strict=True)):
            parameter.grad = torch.randn_like(parameter)
            gradient, x = parameter.grad.double(), expected[index]
            means[index] = 0.9 * means[index] + 0.1 * gradient
            squares[index] = 0.99 * squares[index] + 0.01 * gradient**2
            update = means[index] / (1 - 0.9**count) / ((squares[index] / (1 - 0.99**count)).sqrt() + 1e-6)
            update += decay * x
            share = x.norm() / update.norm() if decay and x.norm() > 0 else 1.0
            expected[index] = x - 0.01 * share * update
        optimizer.step()
    for parameter, x in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
def test_steps_equal_those_of_clipped_gradients(model, name, max_grad_norm):
    clipped = copy.deepcopy(model)
    optimizers, expected = (build_optimizers(each, name, 1e-3, 0.01) for each in (model, clipped))
    # Scales differ, because each step alone does not depend on the scale of its gradients.
    for scale in (1.0, 100.0, 1e-4, 10.0):
        for parameter, twin in zip(model.parameters(), clipped.parameters(), strict=True):
            parameter.grad = scale * torch.randn_like(parameter)
            twin.grad = parameter.grad.clone()
        norm = clip_grad_norm_(clipped.parameters(), max_grad_norm or math.inf)
        torch.testing.assert_close(step_if_finite(model, optimizers, max_grad_norm, torch.zeros(1)), norm)
        for optimizer in expected:
            optimizer.step()
    tolerance = 2e-5 if name == "muon" else 1e-6  # Muon iterates in bf16; a step changes an element by 2e-4
    for parameter, twin in zip(model.parameters(), clipped.parameters(), strict=True):
        torch.testing.assert_close(parameter, twin, rtol=0, atol=tolerance)


@pytest.mark.parametrize("keep", [False, True])
def test_gradients_are_cleared_and_a_captured_step_keeps_their_memory(model, keep):
    optimizers = build_optimizers(model, "adamw", 1e-3, 0.01)
    frozen, *trained = model.parameters()
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    kept = [parameter.grad for parameter in trained]
    step_if_finite(model, optimizers, 1.0, torch.zeros(1), keep_gradients=keep)
    assert frozen.grad is None
    if keep:
        assert all(parameter.grad is grad and not grad.any() for parameter, grad in zip(trained, kept, strict=True))
    else:
        assert all(parameter.grad is None for parameter in trained)


def test_the_linear_schedule_rises_and_decays_linearly():
    rates = [schedule("linear", p / 10, 0.2) for p in range(11)]
    assert rates == pytest.approx([0, 0.5, 1, *(x / 8 for x in range(7, -1, -1))])
    assert schedule("linear", 0, 0) == 1
    assert schedule("linear", 2, 0.1) == 0
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([{"params": [parameter]}], lr=torch.tensor(1.0), fused=True)
    set_learning_rate([optimizer], 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_cosine_and_wsd_schedules():
    assert [schedule("cosine", p, 0.0) for p in (0, 0.25, 0.5, 1)] == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0])
    assert [schedule("wsd", p, 0.1) for p in (0.05, 0.1, 0.8, 0.9, 1, 1.2)] == pytest.approx([0.5, 1, 1, 0.5, 0, 0])


def test_bf16_is_chosen_on_a_cpu_only_if_it_is_native_and_faster(monkeypatch):
    cpu = torch.device("cpu")
    assert choose_precision(cpu, "bf16") == "bf16"
    for native in (False, True):
        monkeypatch.setattr(precision, "has_bf16_gemm", lambda device, native=native: native)
        for faster in (False, True):
            monkeypatch.setattr(precision, "_bf16_is_faster", lambda faster=faster: faster)
            assert choose_precision(cpu) == ("bf16" if native and faster else "fp32")
            narrow = BertConfig(hidden_size=96, num_attention_heads=2)
            assert choose_precision(cpu, config=narrow) == "fp32", "there are no kernels for 48 columns"


def test_the_faster_precision_is_measured(monkeypatch):
    """With a simulated CPU whose GEMMs are slow in fp32, or in bf16."""
    gemm = torch.nn.functional.linear
    for slow in (torch.float32, torch.bfloat16):

        def linear(x, weight, slow=slow):
            return [gemm(x[:8], weight) for _ in range(50 if x.dtype == slow else 1)]

        monkeypatch.setattr(precision, "linear", linear)
        assert precision._bf16_is_faster.__wrapped__(0.2) == (slow == torch.float32)


def test_a_cpu_without_native_bf16_trains_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choose_precision(torch.device("cpu")) == "fp32"


def test_a_nan_loss_on_a_gpu_is_explained_by_an_invalid_label():
    assert not_finite(2.0, torch.device("cuda")) == "a gradient is not finite"
    assert not_finite(math.inf, torch.device("cuda")) == "the loss is inf"
    assert not_finite(math.nan, torch.device("cpu")) == "the loss is nan"
    assert "a label outside of the vocabulary" in not_finite(math.nan, torch.device("cuda"))
