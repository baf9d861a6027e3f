"""Models under FSDP2 and DDP stay fused: hooks of these engines do not count."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import BY_CLASS, SIZES, transformers
from torch.distributed.fsdp import FullyShardedDataParallel

import bertfast

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
IDS = torch.arange(3, 27).view(4, 6)
MASK = (torch.arange(6) < torch.tensor([[6], [3], [5], [2]])).long()
TOKENS = IDS.masked_fill(MASK == 0, -100)
VALUES = {
    "BertForMaskedLM": {"labels": TOKENS},
    "BertForSequenceClassification": {"labels": torch.tensor([0, 1, 2, 0])},
    "BertForPreTraining": {"labels": TOKENS, "next_sentence_label": torch.tensor([0, 1, 1, 0])},
}
TIES_KEPT = ("layers", "stack", "stack alone", "transform")


def test_parameters_that_fsdp1_flattens_are_left_to_transformers(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = bertfast.BertForSequenceClassification(transformers.BertConfig(**SIZES))
        sharded = FullyShardedDataParallel(model, use_orig_params=False, device_id=torch.device("cpu"))
        sharded(IDS, attention_mask=MASK).logits.sum().backward()
        assert "flattened by FSDP1" in bertfast.report(sharded).left["_fsdp_wrapped_module.bert"]
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found() -> list[dict]:
    """The results of two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(
        [*command, str(HERE / "distributed_models.py")],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def unsharded(name: str, group: str) -> tuple[float, float]:
    """The loss and gradient norm of transformers' own model in one process."""
    torch.manual_seed(0)
    nothing = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**SIZES | nothing, tie_word_embeddings=group in TIES_KEPT)
    model = getattr(transformers, name)(config).train()
    loss = model(input_ids=IDS, attention_mask=MASK, **VALUES[name]).loss
    loss.backward()
    return loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()


@pytest.mark.parametrize("name", VALUES)
def test_a_sharded_model_stays_fused_and_gives_the_same_loss_and_gradients(found, name):
    """With and without recomputed activations, and however its modules are grouped."""
    runs = [run for run in found if run["engine"] == "FSDP2" and run["name"] == name]
    assert len(runs) == (9 if name == "BertForPreTraining" else 2)
    for run in runs:
        assert run["unchanged"], run
        assert run["fused"] >= 4, run
        assert run["logits"] == (name == "BertForSequenceClassification"), run
        loss, norm = unsharded(name, run["group"])
        assert run["loss"] == pytest.approx(loss, rel=1e-4), run
        assert run["norm"] == pytest.approx(norm, rel=1e-3), run


def test_a_model_that_was_sharded_fused_cannot_be_unpatched_and_is_told_why(found):
    for run in (run for run in found if run["engine"] == "FSDP2"):
        refused = f"FSDP2 shards this {run['name']}: unpatch it before fully_shard"
        assert run["unpatching"] == (None if run["late"] else refused)


@pytest.mark.parametrize("name", BY_CLASS)
def test_under_ddp_a_model_stays_fused_and_has_the_gradients_of_transformers_on_the_whole_batch(found, name):
    run = next(run for run in found if run["engine"] == "DDP" and run["name"] == name)
    assert run["problem"] is None
    assert run["unchanged"]
