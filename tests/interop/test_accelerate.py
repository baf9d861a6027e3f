"""Loops as transformers' no_trainer examples have them: accelerate in bf16, nothing changed but the import."""

import pytest
import torch
import transformers
from parity import SIZES
from torch import nn
from torch.utils.data import DataLoader

import bertfast

accelerate = pytest.importorskip("accelerate")

ROWS, COLUMNS = 12, 9
MASK = (
    torch.arange(COLUMNS) < torch.randint(3, COLUMNS + 1, (ROWS, 1), generator=torch.Generator().manual_seed(1))
).long()


def samples(name: str) -> list[dict[str, torch.Tensor]]:
    """Samples whose first token says what the label is."""
    kinds = torch.arange(ROWS) % 2
    ids = torch.full((ROWS, COLUMNS), 9)
    ids[:, 0], ids[:, 1] = 2, 3 + kinds
    ids = ids * MASK
    tokens = torch.where(MASK == 1, kinds[:, None], -100)
    labels = {
        "BertForSequenceClassification": {"labels": kinds},
        "BertForTokenClassification": {"labels": tokens},
        "BertForQuestionAnswering": {"start_positions": kinds, "end_positions": kinds + 1},
        "BertForMaskedLM": {"labels": torch.where(MASK == 1, 3 + kinds[:, None], -100)},
        "BertForMultipleChoice": {"labels": kinds},
    }[name]
    values = {"input_ids": ids, "attention_mask": MASK}
    if name == "BertForMultipleChoice":
        other = ids.clone()
        other[:, 1] = 4
        values = {"input_ids": torch.stack([ids, other], 1), "attention_mask": torch.stack([MASK, MASK], 1)}
        values["input_ids"][:, :, 1] = torch.stack([torch.where(kinds == 0, 5, 6), torch.where(kinds == 0, 6, 5)], 1)
    return [{key: x[row] for key, x in (values | labels).items()} for row in range(ROWS)]


@pytest.fixture
def accelerator():
    accelerate.state.AcceleratorState._reset_state(True)
    yield accelerate.Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=2)
    accelerate.state.AcceleratorState._reset_state(True)


def train(kind: type, rows: list[dict], accelerator, epochs: int = 6) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    nothing = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = kind(transformers.BertConfig(**SIZES | nothing | {"num_labels": 2}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(rows, batch_size=3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    losses = []
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return accelerator.unwrap_model(model), losses


@pytest.mark.parametrize(
    "name",
    [
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
        "BertForMaskedLM",
        "BertForMultipleChoice",
    ],
)
def test_a_loop_in_bf16_learns_as_with_transformers_and_its_model_opens_there(name, accelerator, tmp_path):
    rows = samples(name)
    model, losses = train(getattr(bertfast, name), rows, accelerator)
    _, want = train(getattr(transformers, name), rows, accelerator)
    if name != "BertForQuestionAnswering":  # transformers' softmax counts padding, where hidden states are zero here
        assert losses[:2] == pytest.approx(want[:2], abs=0.02)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    model.save_pretrained(tmp_path)
    opened = getattr(transformers, name).from_pretrained(tmp_path)
    values = {key: x[None] for key, x in rows[0].items() if key in ("input_ids", "attention_mask")}
    for ours, theirs in zip(model.eval()(**values).to_tuple(), opened(**values).to_tuple(), strict=True):
        if ours.dim() < 3 and name != "BertForQuestionAnswering":
            # accelerate leaves autocast around the forward of the model that it prepared.
            torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_outputs_survive_what_accelerate_and_data_parallel_do_to_them(name):
    model = getattr(bertfast, name)(transformers.BertConfig(**SIZES)).train()
    rows = samples(name)[:2]
    outputs = model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]})
    again = accelerate.utils.convert_to_fp32(outputs)
    assert type(again) is type(outputs)
    assert type(outputs)(dict(outputs.items())).keys() == outputs.keys()
