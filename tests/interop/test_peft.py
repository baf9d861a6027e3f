"""LoRA by peft on a patched model: the adapters are called, the rest is fused, and the losses are the same."""

import copy

import pytest
import torch
import transformers
from family_models import CASES, PREFIXES, inputs, no_dropout, plain
from parity import SIZES, assert_parity, double, results

import bertfast
from bertfast.models.eligibility import whole_unsupported_reason

peft = pytest.importorskip("peft")

TARGETS = (["query", "value"], ["query", "key", "value", "dense"], ["word_embeddings", "dense"])


def losses(targets: list[str], when: str | None, **options) -> list[float]:
    """Return the losses of five steps of a tiny model with adapters: patched before or after adding them, or not."""
    torch.manual_seed(0)
    nothing = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES | nothing))
    if when == "before":
        bertfast.patch(model)
    kind = {"task_type": "SEQ_CLS", "target_modules": targets, "r": 4, "init_lora_weights": False}
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(**kind | options)).train()
    if when == "after":
        report = bertfast.patch(model)
        assert any("is called as a module" in why for why in report.left.values()) or targets == TARGETS[2]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(5):
        ids = torch.randint(53, (4, 9), generator=generator)
        mask = (torch.arange(9) < torch.tensor([[9], [5], [1], [7]])).long()
        loss = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 2, 0])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("targets", TARGETS, ids="-".join)
@pytest.mark.parametrize("when", ["before", "after"])
def test_losses_are_the_same_patched_and_unpatched(targets, when):
    assert losses(targets, when) == pytest.approx(losses(targets, None), abs=1e-5)


def test_other_kinds_of_adapters():
    assert losses(TARGETS[0], "after", use_dora=True) == pytest.approx(
        losses(TARGETS[0], None, use_dora=True), abs=1e-5
    )


def test_merged_adapters_are_fused_again():
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    bertfast.patch(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], init_lora_weights=False)).eval()
    ids = torch.arange(12).view(2, 6)
    expected = adapted(ids).last_hidden_state
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    assert whole_unsupported_reason(merged) is None


TARGETS_OF_FAMILIES = {
    "roberta": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv", "Wo", "Wi"],  # the projections of the attention and of the feed-forward layer
    "nomic_bert": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    "eurobert": ["q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"],
}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", [family for family in TARGETS_OF_FAMILIES if family in PREFIXES])
def test_adapters_on_other_families_are_as_accurate_as_in_transformers(family, autocast):
    case = next(case for case in CASES if str(case) == f"{family}-ForSequenceClassification")
    model = plain(case, **no_dropout(case)).train()
    values, mask = inputs(case, model)
    torch.manual_seed(1)
    targets = TARGETS_OF_FAMILIES[family]
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=targets, r=4, init_lora_weights=False)
    hf = peft.get_peft_model(model, config)
    patched = copy.deepcopy(hf)
    report = bertfast.patch(patched)
    assert any("is called as a module" in why for why in report.left.values())
    assert whole_unsupported_reason(patched.base_model.model.base_model) is None  # all but the projections runs packed
    truth = results(double(hf), values, mask)
    found, expected = (results(each, values, mask, autocast) for each in (patched, hf))
    assert any("lora_A" in name for name in expected.gradients)
    assert_parity(found, expected, truth, torch.bfloat16 if autocast else torch.float32)
