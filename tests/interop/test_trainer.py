"""The fused classes under transformers' Trainer, pipelines and accelerate."""

import copy

import pytest
import torch
from family_models import FamilyCase, inputs, pair
from parity import SIZES, transformers

import bertfast
from bertfast.architectures import IS_TRANSFORMERS_4

pytestmark = pytest.mark.slow

pytest.importorskip("accelerate", reason="Trainer requires it")

ROWS = 16
HEADS = {
    "BertForMaskedLM": "tokens",
    "BertForPreTraining": "tokens and pairs",
    "BertForTokenClassification": "tokens",
    "BertForSequenceClassification": "classes",
    "BertForNextSentencePrediction": "pairs",
    "BertForMultipleChoice": "choices",
    "BertForQuestionAnswering": "answers",
}


def samples(kind: str, count: int = ROWS) -> list[dict]:
    """Return samples of different lengths, with different numbers of labels if tokens are labelled."""
    generator = torch.Generator().manual_seed(0)

    def random(high, *shape):
        return torch.randint(high, shape, generator=generator)

    made = []
    for row in range(count):
        length = 3 + row % 9
        own = {"input_ids": 3 + random(50, length), "token_type_ids": random(2, length)}
        if kind.startswith("tokens"):
            own["labels"] = random(3, length).masked_fill(random(3, length) > (row % 3), -100)
            own["labels"][1] = 1
        if kind == "tokens and pairs":
            own["next_sentence_label"] = random(2)
        if kind in ("classes", "pairs", "choices"):
            own["labels"] = random(2)
        if kind == "answers":
            own |= {"start_positions": random(3), "end_positions": random(3)}
        made.append({name: value.tolist() for name, value in own.items()})
    return made


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return a batch padded to its longest sample; for multiple choice each sample twice."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for name in rows[0]:
        if isinstance(rows[0][name], list):
            fill = -100 if name == "labels" else 0
            batch[name] = torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])
        else:
            batch[name] = torch.tensor([row[name] for row in rows])
    batch["attention_mask"] = torch.tensor(
        [[column < len(row["input_ids"]) for column in range(longest)] for row in rows]
    )
    batch["attention_mask"] = batch["attention_mask"].long()
    return batch


def doubled(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return each sample as two choices, the second with other words."""
    batch = padded(rows)
    labels, words = batch.pop("labels"), batch["input_ids"]
    batch = {name: torch.stack([x, (x - 1).clamp(min=0) if x is words else x], 1) for name, x in batch.items()}
    return batch | {"labels": labels}


def model_of(name: str, **changes):
    torch.manual_seed(0)
    nothing = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    changes = {"num_labels": 2 if name != "BertForTokenClassification" else 3} | changes
    return getattr(bertfast, name)(transformers.BertConfig(**SIZES | nothing | changes))


def train(model, rows, collator, folder, *, accumulation=1, steps=1, batch=None, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch or ROWS // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        **options,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("name", HEADS)
def test_a_step_is_the_same_however_it_is_accumulated(name, tmp_path):
    kind = HEADS[name]
    rows = samples(kind)
    if name in ("BertForPreTraining", "BertForQuestionAnswering"):
        # transformers' loss is a mean of means: equal if each part has as many labels and no padding.
        rows = [rows[3]] * ROWS
    collator = doubled if name == "BertForMultipleChoice" else padded
    steps = []
    for accumulation in (1, 2, 4, 8):
        model = model_of(name)
        before = copy.deepcopy(model.state_dict())
        train(model, rows, collator, tmp_path, accumulation=accumulation)
        steps.append({key: value - before[key] for key, value in model.state_dict().items()})
    for step in steps[1:]:
        for key, moved in steps[0].items():
            torch.testing.assert_close(
                step[key], moved, rtol=1e-3, atol=1e-7, msg=lambda said, key=key: f"{key}: {said}"
            )
    assert any(moved.abs().max() > 1e-5 for moved in steps[0].values())


@pytest.mark.parametrize("name", [name for name in HEADS if HEADS[name] in ("tokens", "classes", "pairs")])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_batches_without_padding_give_the_same_step(name, accumulation, tmp_path):
    rows, steps = samples(HEADS[name]), []
    for collator in (padded, bertfast.PaddingFreeCollator()):
        model = model_of(name)
        before = copy.deepcopy(model.state_dict())
        train(model, rows, collator, tmp_path, accumulation=accumulation)
        steps.append({key: value - before[key] for key, value in model.state_dict().items()})
    for key, moved in steps[0].items():
        torch.testing.assert_close(steps[1][key], moved, rtol=1e-3, atol=1e-7)


def test_a_batch_without_padding():
    batch = bertfast.PaddingFreeCollator()([{"input_ids": [5, 6, 7], "label": 1}, {"input_ids": [8], "label": 0}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert batch["labels"].tolist() == [1, 0]
    assert "position_ids" not in batch  # the model counts them
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 4]
    assert (batch["cu_seq_lens_q"].dtype, batch["max_length_q"]) == (torch.int32, 3)
    tags = bertfast.PaddingFreeCollator()(
        [{"input_ids": [5, 6], "labels": [1, -100]}, {"input_ids": [8], "labels": [2]}]
    )
    assert tags["labels"].tolist() == [[1, -100, 2]]
    many = [{"input_ids": [5, 6], "labels": [1.0, 0.0]}, {"input_ids": [8, 9], "labels": [0.0, 1.0]}]
    assert bertfast.PaddingFreeCollator(token_labels=False)(many)["labels"].tolist() == [[1, 0], [0, 1]]
    with pytest.raises(TypeError):
        bertfast.PaddingFreeCollator(None, False)
    with pytest.raises(ValueError, match="needs padded batches"):
        bertfast.PaddingFreeCollator()([{"input_ids": [5], "start_positions": 0, "end_positions": 0}])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "got no samples"),
        (
            [{"input_ids": [2, 3], "labels": 1}, {"input_ids": [2, 3]}],
            "sample 1 holds input_ids, sample 0 holds",
        ),
        ([{"labels": 1}], "input_ids among it"),
        ([{"input_ids": [2, 3], "position_ids": [0, 1]}], "leave position_ids out"),
        ([{"input_ids": [[2, 3], [2, 4]]}], r"got shape \[2, 2\]: multiple choice needs padded batches"),
        ([{"input_ids": [2, 3], "attention_mask": [1]}], "2 input_ids and an attention_mask of 1"),
        ([{"input_ids": [2, 3], "start_positions": 1}], "question answering needs padded batches"),
    ],
)
def test_samples_that_cannot_be_packed_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        bertfast.PaddingFreeCollator()(samples)


def test_labels_may_have_any_of_their_names():
    for name in ("labels", "label", "label_ids"):
        batch = bertfast.PaddingFreeCollator()([{"input_ids": [2, 3], name: 1}, {"input_ids": [2, 4, 3], name: 0}])
        assert batch["labels"].tolist() == [1, 0]


def test_a_batch_without_padding_excludes_masked_tokens():
    padded = {"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1], "labels": [-100, 1, 2]}
    samples = [padded, {"input_ids": [8], "attention_mask": [1], "labels": [3]}]
    batch = bertfast.PaddingFreeCollator("a tokenizer", model=model_of("BertForMaskedLM"))(samples)
    assert batch["input_ids"].tolist() == [[5, 6, 8]]
    assert batch["labels"].tolist() == [[1, 2, 3]]
    assert batch["position_ids"].tolist() == [[1, 2, 0]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 3]
    assert "attention_mask" not in batch
    with pytest.raises(ValueError, match=r"depend on the model's family: pass PaddingFreeCollator\(model=…\)"):
        bertfast.PaddingFreeCollator()(samples)
    with pytest.raises(ValueError, match=r"this Linear holds no fused encoder.*bertfast\.patch"):
        bertfast.PaddingFreeCollator(model=torch.nn.Linear(1, 1))


@pytest.mark.parametrize("family", ["roberta", "electra", "distilbert"])
def test_tokens_after_excluded_ones_have_the_positions_of_a_padded_batch(family):
    if family == "distilbert" and IS_TRANSFORMERS_4:
        pytest.skip("its model takes no positions in transformers 4")
    case = FamilyCase(family, "ForMaskedLM", paddings=("left", "inside", "none", "right"), pads_by_id=True)
    patched, hf = pair(case)
    values, mask = inputs(case, hf)
    values["input_ids"][1, 3] = 9  # excluded, but not padding: RoBERTa counts it
    rows = [{name: x[row].tolist() for name, x in values.items() if name != "labels"} for row in range(len(mask))]
    batch = bertfast.PaddingFreeCollator(model=patched)(rows)
    with torch.no_grad():
        expected = hf(**{name: x for name, x in values.items() if name != "labels"}).logits[mask]
        found = patched(**batch).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForNextSentencePrediction"])  # others: example scripts
def test_losses_are_those_of_an_unpatched_model(name, tmp_path):
    rows = samples(HEADS[name])
    model = model_of(name)
    plain = copy.deepcopy(model)
    bertfast.unpatch(plain)
    losses = [train(one, rows, padded, tmp_path, steps=5, batch=4) for one in (model, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_noise_on_embeddings_is_that_of_transformers(tmp_path):
    rows, losses = samples("classes"), []
    for noise, is_patched in ((None, True), (20.0, True), (20.0, False)):
        model = model_of("BertForSequenceClassification")
        if not is_patched:
            bertfast.unpatch(model)
        losses.append(train(model, rows, padded, tmp_path, steps=5, batch=4, neftune_noise_alpha=noise))
    assert losses[1] == pytest.approx(losses[2], abs=1e-4)
    assert losses[1] != pytest.approx(losses[0], abs=1e-3)


def test_training_lowers_the_loss_and_what_is_saved_is_opened_by_transformers(tmp_path):
    rows = [{"input_ids": [3 + row % 2] * 4, "labels": row % 2} for row in range(ROWS)]
    model = model_of("BertForSequenceClassification")
    losses = train(model, rows, bertfast.PaddingFreeCollator(), tmp_path, steps=30)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "saved")
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    again = bertfast.BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    values = padded(rows[:3])
    values.pop("labels")
    for other in (opened, again):
        torch.testing.assert_close(other(**values).logits, model.eval()(**values).logits, rtol=1e-4, atol=1e-5)


def test_pipelines_fill_masks(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    model = model_of("BertForMaskedLM", vocab_size=len(words)).eval()
    fill = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)
    got = fill(["a b [MASK] d", "c [MASK]"], batch_size=2)
    bertfast.unpatch(model)
    expected = fill(["a b [MASK] d", "c [MASK]"], batch_size=2)
    for bertfast_mask, hf_mask in zip(got, expected, strict=True):
        assert [one["token"] for one in bertfast_mask] == [one["token"] for one in hf_mask]
        assert [one["score"] for one in bertfast_mask] == pytest.approx([one["score"] for one in hf_mask], abs=1e-5)


def test_accelerate_splits_no_layer_and_keeps_ties(tmp_path):
    import accelerate

    model = model_of("BertForMaskedLM")
    whole = {*model._no_split_modules, *model.bert._no_split_modules}  # before version 5 a head has no list of its own
    assert whole >= {"BertLayer"}
    devices = accelerate.infer_auto_device_map(
        model, max_memory={0: 60_000, "cpu": 10**9}, no_split_module_classes=[*whole]
    )
    assert not any(".layer." in name and name.rsplit(".", 1)[1] not in "01" for name in devices)
    assert accelerate.utils.find_tied_parameters(model)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    assert prepared.get_output_embeddings().weight is prepared.get_input_embeddings().weight
