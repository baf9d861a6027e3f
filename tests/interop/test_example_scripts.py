"""Flows of transformers' example scripts with only the import changed: losses and predictions are the same.

Each task runs as the scripts have it: with Trainer (run_glue.py, run_ner.py, run_swag.py, run_qa.py, run_mlm.py), and
as the `no_trainer` loop with accelerate in bf16. Data are a few rows of letters; the model is tiny, and saved before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import assert_as_accurate_as_torch
from parity import SIZES
from torch import nn
from torch.utils.data import DataLoader

import bertfast

pytestmark = pytest.mark.slow

accelerate = pytest.importorskip("accelerate", reason="Trainer needs it")

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrst"]
LETTERS = VOCABULARY[5:]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ROWS = 16


@dataclass(frozen=True)
class Task:
    """What an example script does besides its loop.

    Attributes:
        model: Name of the model's class after "AutoModelFor" and "BertFor".
        features: Turns a tokenizer and rows of letters into what the dataset holds.
        collator: Makes batches of features.
        labels: Names of the labels in a batch.
        padding_counts: Whether the loss reads logits at padding, where hidden states of fused models are zero.
    """

    model: str
    features: Callable[[object, list[str]], list[dict]]
    collator: Callable[[object], Callable]
    labels: tuple[str, ...] = ("labels",)
    padding_counts: bool = False


def texts() -> list[str]:
    """Rows of different lengths, so that batches have padding."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(LETTERS, 3 + row % 8)) for row in range(ROWS)]


def classified(tokenizer, rows: list[str]) -> list[dict]:
    return [dict(tokenizer(row, truncation=True)) | {"labels": int(row[0] < "k")} for row in rows]


def tagged(tokenizer, rows: list[str]) -> list[dict]:
    """Return rows with labels of words, assigned to tokens by `word_ids` as in run_ner.py."""
    made = []
    for row in rows:
        words = row.split()
        encoded = tokenizer(words, truncation=True, is_split_into_words=True)
        tags = [LETTERS.index(word) % 3 for word in words]
        labels = [-100 if word is None else tags[word] for word in encoded.word_ids()]
        made.append(dict(encoded) | {"labels": labels})
    return made


def chosen(tokenizer, rows: list[str]) -> list[dict]:
    """Return rows of a beginning with two endings, of which one repeats its first letter, as in run_swag.py."""
    made = []
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        right = len(row) % 2
        endings = [row if choice == right else other for choice in (0, 1)]
        made.append(dict(tokenizer([row] * 2, endings, truncation=True)) | {"labels": right})
    return made


def answered(tokenizer, rows: list[str]) -> list[dict]:
    """Return windows over a context, padded to one length, with the tokens of the answer, as in run_qa.py."""
    made = []
    for row in rows:
        where = 2 * (len(row) // 4)  # letters have spaces between them
        encoded = tokenizer(
            row[0],
            row,
            truncation="only_second",
            max_length=10,
            stride=2,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding="max_length",
        )
        for window, offsets in enumerate(encoded["offset_mapping"]):
            of_context = [part == 1 for part in encoded.sequence_ids(window)]
            tokens = [i for i, (start, _) in enumerate(offsets) if of_context[i] and start == where]
            position = tokens[0] if tokens else 0  # [CLS] where the answer is not in the window
            own = {name: encoded[name][window] for name in ("input_ids", "token_type_ids", "attention_mask")}
            made.append(own | {"start_positions": position, "end_positions": position})
    return made


def tokenised(tokenizer, rows: list[str]) -> list[dict]:
    return [dict(tokenizer(row, truncation=True, return_special_tokens_mask=True)) for row in rows]


def masks(tokenizer):
    return transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4)


TASKS = {
    "text_classification": Task("SequenceClassification", classified, transformers.DataCollatorWithPadding),
    "token_classification": Task("TokenClassification", tagged, transformers.DataCollatorForTokenClassification),
    "multiple_choice": Task("MultipleChoice", chosen, transformers.DataCollatorForMultipleChoice),
    "question_answering": Task(
        "QuestionAnswering",
        answered,
        lambda tokenizer: transformers.default_data_collator,
        ("start_positions", "end_positions"),
        padding_counts=True,
    ),
    "masked_lm": Task("MaskedLM", tokenised, masks),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A folder with a model and a tokenizer, the input of a script."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    tokenizer = transformers.BertTokenizerFast(
        str(folder / "vocab.txt"), model_max_length=SIZES["max_position_embeddings"]
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = SIZES | NO_DROPOUT | {"vocab_size": len(VOCABULARY), "num_labels": 2, "initializer_range": 0.2}
    transformers.BertForPreTraining(transformers.BertConfig(**sizes)).save_pretrained(folder)
    return folder


def data_of(task: Task, checkpoint: Path) -> tuple[list[dict], Callable]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    collate = task.collator(tokenizer)
    # Copies, because some collators change the rows.
    return task.features(tokenizer, texts()), lambda rows: collate([dict(row) for row in rows])


def opened(library, prefix: str, task: Task, checkpoint: Path) -> nn.Module:
    """Open a script's model; the new weights of its head are the same in each call."""
    torch.manual_seed(1)
    labels = {"num_labels": 3} if task.model == "TokenClassification" else {}
    model = getattr(library, prefix + task.model).from_pretrained(checkpoint, **labels)
    if task.padding_counts and library is transformers:
        model.bert.register_forward_hook(zero_at_padding, with_kwargs=True)
    return model


def zero_at_padding(module, arguments, keywords, outputs):
    """Set hidden states of a transformers model to zero at padding, as "what differs" says of fused models."""
    mask = keywords["attention_mask"] if "attention_mask" in keywords else arguments[1]
    outputs.last_hidden_state = outputs.last_hidden_state * mask[..., None]
    return outputs


# The scripts with Trainer.


def run_trainer(library, task: Task, checkpoint: Path, folder: Path) -> tuple[list[float], dict, np.ndarray]:
    """Return the loss of each step, the evaluation metrics, and the predictions."""
    transformers.set_seed(3)
    rows, collator = data_of(task, checkpoint)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=3e-3,
        weight_decay=0.01,
        warmup_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        label_names=[*task.labels],
    )

    def accuracy(predictions) -> dict[str, float]:
        found, labels = predictions.predictions, predictions.label_ids
        pairs = zip(found, labels, strict=True) if isinstance(labels, tuple) else [(found, labels)]
        right = [(choice == label)[label != -100] for choice, label in pairs]
        return {"accuracy": float(np.concatenate(right).mean())}

    def best(logits, labels):
        return tuple(x.argmax(-1) for x in logits) if isinstance(logits, tuple) else logits.argmax(-1)

    trainer = transformers.Trainer(
        model=opened(library, "AutoModelFor", task, checkpoint),
        args=arguments,
        train_dataset=rows[:-4],
        eval_dataset=rows[-4:],
        data_collator=collator,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=best,
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    metrics = trainer.evaluate()
    trainer.save_model()
    found = np.asarray(trainer.predict(rows[-4:]).predictions)
    if found.shape == (4, max(len(row["input_ids"]) for row in rows[-4:])):  # of tokens
        found = np.concatenate([tokens[: len(row["input_ids"])] for tokens, row in zip(found, rows[-4:], strict=True)])
    return losses, metrics, found


@pytest.mark.parametrize("name", TASKS)
def test_a_script_with_trainer_has_the_losses_and_metrics_of_transformers(name, checkpoint, tmp_path):
    losses, metrics, predictions = run_trainer(bertfast, TASKS[name], checkpoint, tmp_path / "bertfast")
    expected, measured, predicted = run_trainer(transformers, TASKS[name], checkpoint, tmp_path / "transformers")
    assert len(losses) >= 6
    assert losses == pytest.approx(expected, abs=2e-4)
    assert max(losses) - min(losses) > 1e-3  # the model changes
    assert metrics.keys() == measured.keys()
    assert metrics["eval_loss"] == pytest.approx(measured["eval_loss"], abs=2e-4)
    assert metrics["eval_accuracy"] == measured["eval_accuracy"]
    assert np.array_equal(predictions, predicted)
    for file in ("config.json", "model.safetensors", "training_args.bin"):
        assert (tmp_path / "bertfast" / file).is_file()


# The no_trainer loops.


def run_accelerate(
    library, task: Task, checkpoint: Path, folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[list[float], list[torch.Tensor]]:
    """Return the loss of each step and the logits of tokens in evaluation: in bf16, or in float64 for the truth."""
    transformers.set_seed(3)
    accelerate.state.AcceleratorState._reset_state(True)
    precision = "no" if dtype == torch.float64 else "bf16"
    accelerator = accelerate.Accelerator(mixed_precision=precision, cpu=True, gradient_accumulation_steps=2)
    rows, collator = data_of(task, checkpoint)
    model = opened(library, "BertFor", task, checkpoint).to(dtype)
    plain = ("bias", "LayerNorm.weight")
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if name.endswith(plain) == is_plain],
            "weight_decay": 0.0 if is_plain else 0.01,
        }
        for is_plain in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    training = DataLoader(rows[:-4], shuffle=True, collate_fn=collator, batch_size=3)
    evaluation = DataLoader(rows[-4:], collate_fn=collator, batch_size=4)
    scheduler = transformers.get_scheduler("linear", optimizer, num_warmup_steps=1, num_training_steps=8)
    model, optimizer, training, evaluation, scheduler = accelerator.prepare(
        model, optimizer, training, evaluation, scheduler
    )
    losses, logits = [], []
    for _ in range(2):
        model.train()
        for batch in training:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        model.eval()
        for batch in evaluation:
            with torch.no_grad():
                outputs = model(**batch)
            found = [outputs.start_logits, outputs.end_logits] if "start_logits" in outputs else [outputs.logits]
            found = accelerator.gather_for_metrics([x.contiguous() for x in found])
            own = (
                "attention_mask" if found[0].shape[:2] == batch["input_ids"].shape and not task.padding_counts else None
            )
            logits += [x if own is None else x[batch[own].bool()] for x in found]
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        folder, is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )
    accelerate.state.AcceleratorState._reset_state(True)
    return losses, logits


@pytest.mark.parametrize("name", TASKS)
def test_a_script_without_trainer_in_bf16_is_as_accurate_as_with_transformers(name, checkpoint, tmp_path):
    task = TASKS[name]
    losses, logits = run_accelerate(bertfast, task, checkpoint, tmp_path / "bertfast")
    expected, hf_logits = run_accelerate(transformers, task, checkpoint, tmp_path / "transformers")
    truth, true_logits = run_accelerate(transformers, task, checkpoint, tmp_path / "truth", torch.float64)
    assert len(losses) >= 8
    fused, hf, true = (torch.tensor(x, dtype=torch.float64) for x in (losses, expected, truth))
    assert_as_accurate_as_torch(fused, hf, true, name="losses", dtype=torch.bfloat16)
    for fused, hf, true in zip(logits, hf_logits, true_logits, strict=True):
        assert_as_accurate_as_torch(fused, hf, true, name="logits of an evaluation", dtype=torch.bfloat16)
    kind = getattr(transformers, f"BertFor{task.model}")
    _, info = kind.from_pretrained(tmp_path / "bertfast", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
