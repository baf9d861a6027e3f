"""Models under FSDP2 and DDP stay fused: hooks of these engines do not count."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import BY_CLASS, SIZES, transformers

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
IDS = torch.arange(3, 27).view(4, 6)
MASK = (torch.arange(6) < torch.tensor([[6], [3], [5], [2]])).long()
LABELS = {
    "BertForMaskedLM": IDS.masked_fill(MASK == 0, -100),
    "BertForSequenceClassification": torch.tensor([0, 1, 2, 0]),
}


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


def unsharded(name: str) -> tuple[float, float]:
    """The loss and gradient norm of transformers' own model in one process."""
    torch.manual_seed(0)
    nothing = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = getattr(transformers, name)(transformers.BertConfig(**SIZES | nothing)).train()
    loss = model(input_ids=IDS, attention_mask=MASK, labels=LABELS[name]).loss
    loss.backward()
    return loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_sharded_model_stays_fused_and_gives_the_same_loss_and_gradients(found, name, checkpointed):
    runs = [run for run in found if run["engine"] == "FSDP2" and run["name"] == name]
    run = next(run for run in runs if run["checkpointed"] == checkpointed)
    assert run["unchanged"]
    assert run["fused"] >= 4
    assert run["logits"] == (name != "BertForMaskedLM")
    loss, norm = unsharded(name)
    assert run["loss"] == pytest.approx(loss, rel=1e-4)
    assert run["norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("name", BY_CLASS)
def test_under_ddp_a_model_stays_fused_and_has_the_gradients_of_transformers_on_the_whole_batch(found, name):
    run = next(run for run in found if run["engine"] == "DDP" and run["name"] == name)
    assert run["problem"] is None
    assert run["unchanged"]
