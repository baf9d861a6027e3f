"""Models under FSDP2 and DDP in two processes, started by torchrun; prints one line of JSON per model."""

import copy
import json

import torch
import torch.distributed as dist
import transformers
from parity import BY_CLASS, SIZES, Results, assert_parity, double, models, separable
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import bertfast

IDS = torch.arange(3, 27).view(4, 6)
MASK = (torch.arange(6) < torch.tensor([[6], [3], [5], [2]])).long()
TOKENS = IDS.masked_fill(MASK == 0, -100)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def shard(kind: type, labels: Tensor, checkpointed: bool) -> dict:
    """Return the report, loss and gradient norm of a model that FSDP2 shards."""
    torch.manual_seed(0)
    model = kind(transformers.BertConfig(**SIZES | NO_DROPOUT)).train()
    bertfast.patch(model)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = bertfast.report(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    if kind is not transformers.BertForMaskedLM:  # whose embeddings are the head's too
        fully_shard(model.bert.embeddings, mesh=mesh)
    fully_shard(model, mesh=mesh)
    outputs = model(input_ids=IDS, attention_mask=MASK, labels=labels)
    outputs.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).full_tensor()
    after = bertfast.report(model)
    return {
        "name": kind.__name__,
        "checkpointed": checkpointed,
        "unchanged": before == after and not after.left,
        "fused": len(after.fused),
        "logits": outputs.logits is not None,
        "loss": outputs.loss.item(),
        "norm": norm.item(),
    }


def loss_of(model: nn.Module, values: dict[str, Tensor]) -> Tensor:
    outputs = model(**values)
    if "loss" in outputs:
        return outputs.loss
    # At padding, hidden states of fused models are zero.
    states = outputs.last_hidden_state * values["attention_mask"][..., None]
    return states.square().mean() + outputs.pooler_output.square().mean()


def gradients_of(model: nn.Module, engine: nn.Module, parts: list[dict[str, Tensor]]) -> Results:
    """Return the mean loss over parts of a batch and its gradients, in the second of two steps."""
    for _ in range(2):  # DDP raises in the second step for parameters unused in the first
        model.zero_grad()
        loss = sum(loss_of(engine, part) for part in parts) / len(parts)
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Results({"loss": loss.detach()}, found)


def replicate(name: str) -> dict:
    """Return the report of a model under DDP, and the gradients that differ from transformers' on the whole batch."""
    case = BY_CLASS[name]
    fused, hf = (model.train() for model in models(case, **NO_DROPOUT))
    values = separable(case)
    dtypes = {False: values, True: {key: x.double() if x.is_floating_point() else x for key, x in values.items()}}
    parts = [
        {is_double: {key: x[rows] for key, x in own.items()} for is_double, own in dtypes.items()}
        for rows in (slice(0, 2), slice(2, None))
    ]
    before = bertfast.report(fused)
    found = gradients_of(fused, DistributedDataParallel(fused), [parts[dist.get_rank()][False]])
    dist.all_reduce(found.outputs["loss"])
    found.outputs["loss"] /= dist.get_world_size()
    expected = gradients_of(hf, hf, [part[False] for part in parts])
    truth = double(copy.deepcopy(hf))
    truth = gradients_of(truth, truth, [part[True] for part in parts])
    try:
        assert_parity(found, expected, truth)
        problem = None
    except AssertionError as error:
        problem = str(error)
    after = bertfast.report(fused)
    return {"name": name, "unchanged": before == after and not after.left, "problem": problem}


def tell(engine: str, found: dict) -> None:
    if dist.get_rank() == 0:
        print(json.dumps({"engine": engine} | found), flush=True)


dist.init_process_group("gloo")
for checkpointed in (False, True):
    tell("FSDP2", shard(transformers.BertForMaskedLM, TOKENS, checkpointed))
    tell("FSDP2", shard(bertfast.BertForSequenceClassification, torch.tensor([0, 1, 2, 0]), checkpointed))
for name in BY_CLASS:
    tell("DDP", replicate(name))
dist.destroy_process_group()
