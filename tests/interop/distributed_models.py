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
from bertfast.runtime.exit import end_process

IDS = torch.arange(3, 27).view(4, 6)
MASK = (torch.arange(6) < torch.tensor([[6], [3], [5], [2]])).long()
TOKENS = IDS.masked_fill(MASK == 0, -100)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


# The modules that FSDP2 shards besides the whole model, by a name for each choice.
GROUPS = {
    "layers": lambda model: [*model.bert.encoder.layer],
    "embeddings": lambda model: [*model.bert.encoder.layer, model.bert.embeddings],
    "encoder": lambda model: [*model.bert.encoder.layer, model.bert],
    "stack": lambda model: [*model.bert.encoder.layer, model.bert.encoder],
    "stack alone": lambda model: [model.bert.encoder],
    "transform": lambda model: [model.cls.predictions.transform],
    "decoder": lambda model: [*model.bert.encoder.layer, model.cls.predictions.decoder],
    "head": lambda model: [*model.bert.encoder.layer, model.cls],
    "nested": lambda model: [model.bert.encoder, model.bert, model.cls.predictions.decoder, model.cls],
}
TIES_KEPT = ("layers", "stack", "stack alone", "transform")  # what a choice splits, must not be tied


def shard(kind: type, values: dict[str, Tensor], group: str, checkpointed: bool = False, late: bool = False) -> dict:
    """Return the report, loss and gradient norm of a model that FSDP2 shards, before it is patched if `late`."""
    torch.manual_seed(0)
    ties = group in TIES_KEPT
    model = kind(transformers.BertConfig(**SIZES | NO_DROPOUT, tie_word_embeddings=ties)).train()
    whole = copy.deepcopy(model)
    before = bertfast.patch(whole)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not late:
        bertfast.patch(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in GROUPS[group](model):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if late:
        bertfast.patch(model)
    outputs = model(input_ids=IDS, attention_mask=MASK, **values)
    outputs.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).full_tensor()
    after = bertfast.report(model)
    return {
        "name": kind.__name__,
        "group": group,
        "checkpointed": checkpointed,
        "late": late,
        "unpatching": unpatching_problem(model),
        "unchanged": before == after and not after.left,
        "fused": len(after.fused),
        "logits": outputs.get("logits", outputs.get("prediction_logits")) is not None,
        "loss": outputs.loss.item(),
        "norm": norm.item(),
    }


def unpatching_problem(model: nn.Module) -> str | None:
    try:
        bertfast.unpatch(model)
    except ValueError as error:
        return str(error)
    return None


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
    fused.config.use_cache = False  # a decoder that fills a cache is left to transformers
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
tokens, pairs = {"labels": TOKENS}, {"labels": torch.tensor([0, 1, 2, 0])}
for checkpointed in (False, True):
    tell("FSDP2", shard(transformers.BertForMaskedLM, tokens, "layers", checkpointed))
    tell("FSDP2", shard(bertfast.BertForSequenceClassification, pairs, "embeddings", checkpointed))
for group in GROUPS:
    both = tokens | {"next_sentence_label": torch.tensor([0, 1, 1, 0])}
    tell("FSDP2", shard(transformers.BertForPreTraining, both, group, late=group in ("layers", "nested")))
for name in BY_CLASS:
    tell("DDP", replicate(name))
dist.destroy_process_group()
end_process()
