"""All nine classes under `torch.nn.DataParallel`, whose replicas have tensors instead of parameters."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from parity import BY_CLASS, Results, assert_parity, double, models, separable
from torch import Tensor, nn
from torch.nn.parallel import replicate, scatter_gather

import bertfast

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Gathered:
    """Replaces torch's `Gather`, which refuses CPU tensors."""

    @staticmethod
    def apply(device, dimension: int, *parts: Tensor) -> Tensor:
        return torch.stack(parts) if parts[0].dim() == 0 else torch.cat(parts, dimension)


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Replace the functions that copy between GPUs; torch's own code makes replicas and gathers outputs."""
    module = sys.modules["torch.nn.parallel.replicate"]  # in the package this name is the function
    monkeypatch.setattr(
        module,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[x.clone() for x in tensors] for _ in devices],
    )
    monkeypatch.setattr(scatter_gather, "Gather", Gathered)


def in_parallel(model: nn.Module, values: dict[str, Tensor]):
    """Run a model as `DataParallel` does with two GPUs: half of the rows per replica, each in its own thread."""
    parts = [{name: x[rows] for name, x in values.items()} for rows in (slice(0, 2), slice(2, None))]
    with ThreadPoolExecutor(2) as threads:
        outputs = list(threads.map(lambda pair: pair[0](**pair[1]), zip(replicate(model, [0, 1]), parts, strict=True)))
    return scatter_gather.gather(outputs, "cpu")


def step(model: nn.Module, values: dict[str, Tensor]) -> Results:
    """Return the outputs, and the gradients of the replicas' mean loss for the model's parameters."""
    model.zero_grad()
    dtype = model.get_input_embeddings().weight.dtype
    outputs = in_parallel(model, {name: x.to(dtype) if x.is_floating_point() else x for name, x in values.items()})
    loss = outputs.loss.mean() if "loss" in outputs else outputs.pooler_output.square().mean()
    loss.backward()
    mask = values["attention_mask"]
    found = {name: x.detach() for name, x in outputs.items()}
    found = {name: x[mask.bool()] if x.shape[:2] == mask.shape else x for name, x in found.items()}
    return Results(found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("name", BY_CLASS)
def test_replicas_compute_what_those_of_transformers_do(name, on_a_cpu):
    case = BY_CLASS[name]
    fused, hf = (model.train() for model in models(case, **NO_DROPOUT, return_logits=True))
    values = separable(case)
    assert_parity(*(step(model, values) for model in (fused, hf, double(hf))))


def test_replicas_run_packed(on_a_cpu):
    model, _ = models(BY_CLASS["BertModel"])
    names = {"BertModel.embeddings", "BertModel.encoder.layer.0", "BertModel.encoder.layer.1"}
    assert all(bertfast.report(replica).fused.keys() == names for replica in replicate(model, [0, 1]))
