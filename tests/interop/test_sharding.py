"""Models that FSDP2 shards stay fused: what an engine hooks is not what someone watches."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import SIZES, transformers

HERE = Path(__file__).parent
IDS = torch.arange(3, 27).view(4, 6)
MASK = (torch.arange(6) < torch.tensor([[6], [3], [5], [2]])).long()
LABELS = {
    "BertForMaskedLM": IDS.masked_fill(MASK == 0, -100),
    "BertForSequenceClassification": torch.tensor([0, 1, 2, 0]),
}


@pytest.fixture(scope="module")
def sharded() -> list[dict]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ran = subprocess.run(
        [*command, str(HERE / "sharded_models.py"), json.dumps(SIZES)], capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def unsharded(name: str) -> tuple[float, float]:
    """The loss and the gradients' norm of transformers' own model in one process."""
    torch.manual_seed(0)
    nothing = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = getattr(transformers, name)(transformers.BertConfig(**SIZES | nothing)).train()
    loss = model(input_ids=IDS, attention_mask=MASK, labels=LABELS[name]).loss
    loss.backward()
    return loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_sharded_model_stays_fused_and_gives_the_same_loss_and_gradients(sharded, name, checkpointed):
    found = next(run for run in sharded if (run["name"], run["checkpointed"]) == (name, checkpointed))
    assert found["unchanged"]
    assert found["fused"] >= 4
    assert found["logits"] == (name != "BertForMaskedLM")
    loss, norm = unsharded(name)
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    assert found["norm"] == pytest.approx(norm, rel=1e-3)
