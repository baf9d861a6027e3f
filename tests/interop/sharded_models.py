"""Run by torchrun in two processes: reports, losses and gradients of models that FSDP2 shards, as lines of JSON."""

import json
import sys

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import bertfast

SIZES = json.loads(sys.argv[1])
IDS = torch.arange(3, 27).view(4, 6)
MASK = (torch.arange(6) < torch.tensor([[6], [3], [5], [2]])).long()


def run(kind: type, labels: torch.Tensor, checkpointed: bool) -> dict:
    torch.manual_seed(0)
    nothing = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = kind(transformers.BertConfig(**SIZES | nothing)).train()
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
        "unchanged": before == after and not after.left,
        "fused": len(after.fused),
        "logits": outputs.logits is not None,
        "loss": outputs.loss.item(),
        "norm": norm.item(),
        "kind": type(model).__name__,
    }


dist.init_process_group("gloo")
TOKENS = IDS.masked_fill(MASK == 0, -100)
for checkpointed in (False, True):
    for kind, labels in (
        (transformers.BertForMaskedLM, TOKENS),
        (bertfast.BertForSequenceClassification, torch.tensor([0, 1, 2, 0])),
    ):
        found = run(kind, labels, checkpointed)
        if dist.get_rank() == 0:
            print(json.dumps({"name": kind.__name__, "checkpointed": checkpointed} | found), flush=True)
dist.destroy_process_group()
