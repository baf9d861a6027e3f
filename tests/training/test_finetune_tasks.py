"""Fine-tuning on each task: losses equal to those of transformers, and the commands from training to predictions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from sentiment import FILLERS
from task_examples import padded, settings_for, write_examples
from torch.nn.utils import clip_grad_norm_

from bertfast.cli.main import main
from bertfast.tasks.features import count_labels
from bertfast.training.finetuning import Finetuning
from bertfast.training.schedule import schedule

pytestmark = pytest.mark.slow

STEPS, BATCH = 50, 4


def hf_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    outputs = model(**batch)
    if "start_logits" not in outputs:
        return outputs.loss
    # The softmax of transformers includes padding, where no answer can be; that of bertfast does not.
    padding = batch["attention_mask"] == 0
    sides = [(outputs.start_logits, batch["start_positions"]), (outputs.end_logits, batch["end_positions"])]
    return sum(F.cross_entropy(logits.masked_fill(padding, -torch.inf), labels) for logits, labels in sides) / 2


def hf_losses(run: Finetuning, folder: Path) -> list[float]:
    """Return the losses of a training loop with transformers' model, from the same weights and examples."""
    settings, features = run.settings, run.features["train"]
    run.model.save_pretrained(folder)
    model = getattr(transformers, run.task.model_class.__name__).from_pretrained(folder).train()
    decays, others = ([p for p in model.parameters() if (p.dim() > 1) == decay] for decay in (True, False))
    groups = [
        {"params": decays, "weight_decay": settings.optimizer.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer, losses = torch.optim.AdamW(groups, lr=settings.hyperparameters.learning_rate), []
    for step, rows in zip(range(run.steps), run.rows_of_steps(), strict=False):
        batches = [padded(features, rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
        counts = [count_labels(batch) for batch in batches]
        loss = sum(hf_loss(model, batch) * count for batch, count in zip(batches, counts, strict=True)) / sum(counts)
        loss.backward()
        clip_grad_norm_(model.parameters(), settings.optimizer.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = settings.hyperparameters.learning_rate * schedule(
                "linear", step / run.steps, settings.optimizer.warmup_ratio
            )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


KINDS = [
    "sequence-classification",
    "regression",
    "multi-label",
    "multiple-choice",
    "question-answering",
    "token-classification",
]


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_those_of_a_training_loop_with_transformers(kind, accumulation, pretrained, tmp_path):
    file = write_examples(tmp_path, kind, 48, seed=0)
    settings = settings_for(
        kind,
        pretrained,
        file,
        tmp_path / "out",
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=STEPS * BATCH * accumulation / 48,
        learning_rate=1e-3,
    )
    run = Finetuning(settings)
    assert run.steps == STEPS
    expected = hf_losses(run, tmp_path / "transformers")
    run.run(lambda step: None)
    assert run.results.losses == pytest.approx(expected, abs=1e-4)
    assert np.mean(run.results.losses[-10:]) < np.mean(run.results.losses[:10])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_per_batch_changes_no_step(kind, pretrained, tmp_path):
    file, losses = write_examples(tmp_path, kind, 24, seed=0), []
    for budget in (10**6, 12):
        settings = settings_for(kind, pretrained, file, tmp_path / str(budget), tokens_per_batch=budget)
        run = Finetuning(settings)
        run.run(lambda step: None)
        losses.append(run.results.losses)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_finetune_predict_and_evaluate_from_the_command_line(kind, pretrained, tmp_path, capsys, monkeypatch):
    for split, rows in (("train", 400), ("dev", 40)):
        (tmp_path / split).mkdir()
        write_examples(tmp_path / split, kind, rows, seed=rows)
    train, dev = (next((tmp_path / split).iterdir()) for split in ("train", "dev"))
    named = ["--task", kind] if kind in ("regression", "multi-label") else []
    flags = ["--train-file", train, "--validation-file", dev, "--output-dir", tmp_path / "out", *named]
    epochs = 24 if kind == "multiple-choice" else 12
    flags += ["--per-device-train-batch-size", 16, "--learning-rate", 3e-3, "--num-train-epochs", epochs]
    flags += ["--device", "cpu", "--precision", "fp32"]  # else the faster precision is measured, and runs differ
    assert main(["finetune", "--model-name-or-path", str(pretrained), *map(str, flags)]) == 0
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    first = {
        "regression": "eval_pearson",
        "multi-label": "eval_f1_micro",
        "question-answering": "eval_f1",
        "token-classification": "eval_f1",
    }
    minimum = 90 if kind == "question-answering" else 0.9
    assert results[first.get(kind, "eval_accuracy")] > minimum
    out, err = capsys.readouterr()
    *scores, last = out.splitlines()
    assert [line.split()[0] for line in scores] == list(results)
    assert str(tmp_path / "out") in last
    assert "fine-tuning on 400 examples" in err
    assert f"step {results['best_step']}: eval_" in err
    model = ["--model-name-or-path", str(tmp_path / "out"), "--device", "cpu", "--precision", "fp32"]
    checked = ["--validation-file", str(dev), "--output-dir", str(tmp_path / "checked")]
    assert main(["evaluate", *model, *checked]) == 0
    again = json.loads((tmp_path / "checked" / "eval_results.json").read_text())
    assert {name: value for name, value in again.items() if name in results} == pytest.approx(
        {name: value for name, value in results.items() if name in again}, abs=1e-5
    )
    assert (tmp_path / "checked" / "confusion.png").exists() == (
        kind in ("sequence-classification", "token-classification")
    )
    for path in (tmp_path / "checked").glob("*predictions*"):
        words, expected = (file.read_text().split() for file in (path, tmp_path / "out" / path.name))
        assert len(words) == len(expected)
        for word, other in zip(words, expected, strict=True):  # the last digit may differ between two processes
            assert word == other or float(word) == pytest.approx(float(other), abs=1e-4)
    capsys.readouterr()
    assert main(["predict", *model, "--input-file", str(dev)]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 40


def test_balanced_class_weights_weight_rare_labels_more(pretrained, tmp_path):
    """The loss of weighted labels, in one pass or in several, is what torch computes."""
    file = tmp_path / "a.tsv"
    rows = [("good", "x")] * 18 + [("bad", "y")] * 6
    file.write_text(
        "\n".join(["sentence\tlabel", *(f"{text} {FILLERS[i % 5]}\t{label}" for i, (text, label) in enumerate(rows))])
    )
    losses = []
    for budget in (10**6, 12):
        settings = settings_for(
            "sequence-classification", pretrained, file, tmp_path / str(budget), class_weights="balanced"
        )
        run = Finetuning(settings.replace(tokens_per_batch=budget))
        assert run.trainer.weights.tolist() == pytest.approx([24 / (2 * 18), 24 / (2 * 6)])
        first = next(run.rows_of_steps())
        batch = padded(run.features["train"], first)
        labels = batch.pop("labels")
        expected = F.cross_entropy(run.model(**batch).logits, labels, run.trainer.weights).item()
        run.run(lambda step: None)
        assert run.results.losses[0] == pytest.approx(expected, abs=1e-6)
        losses.append(run.results.losses)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    with pytest.raises(ValueError, match="--class-weights requires a task in which"):
        Finetuning(
            settings_for(
                "regression",
                pretrained,
                write_examples(tmp_path, "regression", 8, 0),
                tmp_path / "out",
                class_weights="balanced",
            )
        )


def test_an_unknown_task_is_refused(pretrained, tmp_path):
    with pytest.raises(ValueError, match="there is no task 'colla'; choose --task from auto, sequence-classification"):
        Finetuning(settings_for("colla", pretrained, tmp_path / "a.tsv", tmp_path / "out"))


def test_a_fine_tuned_model_records_its_task(pretrained, tmp_path):
    """Without --task, it then reads the files of that benchmark: those of CoLA have no header."""
    train = tmp_path / "train.tsv"
    train.write_text("".join(f"s\t{i % 2}\t\t{['bad', 'good'][i % 2]} film\n" for i in range(32)))
    settings = settings_for("cola", pretrained, train, tmp_path / "out", num_train_epochs=1, validation_file=str(train))
    results = Finetuning(settings).run(lambda step: None)
    model = ["--model-name-or-path", str(tmp_path / "out"), "--device", "cpu"]
    checked = ["--validation-file", str(train), "--output-dir", str(tmp_path / "checked")]
    assert main(["evaluate", *model, *checked]) == 0
    again = json.loads((tmp_path / "checked" / "eval_results.json").read_text())
    name = "eval_matthews_correlation"
    assert again[name] == pytest.approx(results[name])


def test_skipped_rows_are_counted_and_listed(pretrained, tmp_path, capsys):
    """Also those of the training data, which no file of predictions lists."""
    rows = [{"text": "the film was good", "label": "yes"}, {"text": "the film was bad", "label": "no"}]
    (tmp_path / "a.json").write_text(json.dumps([{"text": None, "label": "no"}, *rows, 3, {"text": "x"}, *rows]))
    (tmp_path / "b.jsonl").write_text("\n".join(["{", *map(json.dumps, rows)]))
    files = ["--train-file", str(tmp_path / "a.json"), "--validation-file", str(tmp_path / "b.jsonl")]
    quick = ["--num-train-epochs", "1", "--device", "cpu", "--on-bad-rows", "skip"]
    out = tmp_path / "out"
    assert main(["finetune", "--model-name-or-path", str(pretrained), *files, *quick, "--output-dir", str(out)]) == 0
    errors = capsys.readouterr().err
    assert f"4 invalid rows skipped, see {out / 'skipped_rows.tsv'}" in errors
    assert errors.index("a.json, row 1: ") < errors.index("a.json, row 4: ") < errors.index("a.json, row 5: ")
    listed = [line.split("\t")[:3] for line in (out / "skipped_rows.tsv").read_text().splitlines()[1:]]
    assert listed == [
        [str(tmp_path / file), row, ""] for file, row in zip(["a.json"] * 3 + ["b.jsonl"], "1451", strict=True)
    ]
