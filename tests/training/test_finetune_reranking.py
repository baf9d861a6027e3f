"""Training of cross-encoders: losses of sentence-transformers, and folders that both libraries open."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sentence_training
import torch
from sentence_training import BATCH, STEPS, losses_of_loop
from sentiment import QUICK
from text_pairs import rows_of, write_pairs
from transformers import BertConfig, BertForSequenceClassification

from bertfast.cli.main import main
from bertfast.inference.predict import open_finetuned, predict_outputs
from bertfast.tasks.settings import TaskSettings
from bertfast.training.finetuning import FinetuneSettings, Finetuning, finetune

settings_for = partial(sentence_training.settings_for, "reranking")


def write_lists(path: Path, rows: int, seed: int = 0) -> Path:
    """Write queries with one positive and three negatives each."""
    triplets = rows_of("triplets", rows, seed)
    lists = []
    for index, (query, positive, negative) in enumerate(triplets):
        others = [triplets[(index + shift) % rows][1] for shift in (1, 2)]
        lists.append({"query": query, "positive": [positive], "negative": [negative, *others]})
    path.write_text("".join(json.dumps(row) + "\n" for row in lists))
    return path


def st_losses(run: Finetuning, folder: Path, scale: float) -> list[float]:
    """Return the losses of a training loop with sentence-transformers, from the same weights and batches."""
    st = pytest.importorskip("sentence_transformers")
    known = pytest.importorskip("sentence_transformers.cross_encoder.losses")
    settings, examples = run.settings, run.examples["train"]
    run.model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(Path(settings.model_name_or_path, name).read_bytes())
    model = st.CrossEncoder(str(folder), device="cpu").train()
    loss_of = known.BinaryCrossEntropyLoss(model)

    def loss(rows: np.ndarray) -> torch.Tensor:
        columns = [list(column) for column in zip(*(examples.pairs[row] for row in rows), strict=True)]
        return loss_of(columns, torch.tensor([examples.labels[row] / scale for row in rows]))

    return losses_of_loop(run, model, loss)


@pytest.mark.parametrize("form", ["labelled", "scored", "lists"])
def test_losses_equal_those_of_a_training_loop_with_sentence_transformers(form, pretrained, tmp_path):
    scale = 4.5 if form == "scored" else 1.0
    file = write_lists(tmp_path / "a.jsonl", 15) if form == "lists" else write_pairs(tmp_path / "a.tsv", form, 60)
    options = {"per_device_train_batch_size": BATCH, "num_train_epochs": STEPS * BATCH / 60, "learning_rate": 1e-3}
    options |= {"max_score": scale} if form == "scored" else {}
    run = Finetuning(settings_for(pretrained, file, tmp_path / "out", **options))
    assert run.steps == STEPS
    expected = st_losses(run, tmp_path / "st", scale)
    run.run(lambda step: None)
    assert run.results.losses == pytest.approx(expected, abs=1e-4)
    assert np.mean(run.results.losses[-10:]) < np.mean(run.results.losses[:10])


@pytest.fixture(scope="module")
def reranker(pretrained, tmp_path_factory) -> tuple[Path, dict]:
    """A reranker that was trained on lists, and its results."""
    folder = tmp_path_factory.mktemp("reranker")
    train, dev = write_lists(folder / "train.jsonl", 200), write_lists(folder / "dev.jsonl", 30, seed=2)
    options = {"validation_file": str(dev), "num_train_epochs": 4}
    return folder, finetune(settings_for(pretrained, train, folder / "out", **options))


def dev_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "dev.jsonl").read_text().splitlines()]


def test_results_are_those_that_sentence_transformers_measures(reranker, capsys):
    st = pytest.importorskip("sentence_transformers")
    evaluation = pytest.importorskip("sentence_transformers.cross_encoder.evaluation")
    folder, results = reranker
    model = st.CrossEncoder(str(folder / "out"), device="cpu")
    expected = evaluation.CrossEncoderRerankingEvaluator(dev_rows(folder), at_k=10, show_progress_bar=False)(model)
    assert results["eval_ndcg_at_10"] == pytest.approx(expected["ndcg@10"], abs=1e-6)
    assert results["eval_mrr_at_10"] == pytest.approx(expected["mrr@10"], abs=1e-6)
    capsys.readouterr()
    arguments = ["--model-name-or-path", str(folder / "out"), "--device", "cpu", "--precision", "fp32"]
    assert main(["evaluate", *arguments, "--validation-file", str(folder / "dev.jsonl")]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(printed["eval_ndcg_at_10"]) == pytest.approx(results["eval_ndcg_at_10"], abs=1e-5)


def test_predict_prints_the_scores_of_a_cross_encoder(reranker, capsys, pipe):
    st = pytest.importorskip("sentence_transformers")
    folder, _ = reranker
    model = st.CrossEncoder(str(folder / "out"), device="cpu")
    arguments = ["--model-name-or-path", str(folder / "out"), "--device", "cpu", "--precision", "fp32"]
    capsys.readouterr()
    assert main(["predict", *arguments, "--input-file", str(folder / "dev.jsonl")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for line, row in zip(lines, dev_rows(folder), strict=True):
        pairs = [(row["query"], document) for document in [*row["positive"], *row["negative"]]]
        assert line["scores"] == pytest.approx(model.predict(pairs).tolist(), abs=1e-5)
    pipe("a good film\tthe film was good\n")
    assert main(["predict", *arguments]) == 0
    expected = model.predict([("a good film", "the film was good")])[0]
    assert json.loads(capsys.readouterr().out)["score"] == pytest.approx(float(expected), abs=1e-5)


def test_scores_of_similar_documents_differ_in_bf16(pretrained, tmp_path):
    """Rounded to bf16, whose significand has 8 bits, most of them would be equal."""
    config = BertConfig.from_pretrained(pretrained, hidden_size=64, num_labels=1)
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)  # of a head dimension that kernels support
    torch.nn.init.constant_(model.classifier.bias, 3.0)  # where neighbours in bf16 are 1/64 apart
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(Path(pretrained, name).read_bytes())
    file, scores = write_lists(tmp_path / "a.jsonl", 60), {}
    for precision in ("fp32", "bf16"):
        where = {"model_name_or_path": str(tmp_path), "device": "cpu", "precision": precision, "task": "reranking"}
        task, model, tokenizer = open_finetuned(TaskSettings.of(**where))
        _, features = task.featurize(task.read(str(file), labelled=True), tokenizer, 40)
        scores[precision] = np.concatenate(predict_outputs(task, model, features))
    rounded = {*torch.from_numpy(scores["fp32"]).bfloat16().tolist()}
    assert len({*scores["bf16"].tolist()}) > 0.95 * len({*scores["fp32"].tolist()}) > 2 * len(rounded)
    np.testing.assert_allclose(scores["bf16"], scores["fp32"], atol=0.02)


def test_the_model_card_says_how_to_use_the_model(reranker, monkeypatch, pipe):
    pytest.importorskip("sentence_transformers")
    folder, _ = reranker
    card = (folder / "out" / "README.md").read_text()
    assert "library_name: sentence-transformers\npipeline_tag: text-ranking\n" in card
    monkeypatch.chdir(folder)
    command = "bertfast predict --model-name-or-path out"
    assert f"printf 'A query.\\tA document.\\n' | {command}\n" in card
    pipe("A query.\tA document.\n")
    assert main(command.split()[1:]) == 0
    exec(card.split("```python\n")[1].split("```")[0], {})


@pytest.mark.parametrize("activation", ["Sigmoid", "Identity"])
def test_a_cross_encoder_is_opened_and_trained_as_it_is(activation, pretrained, tmp_path, capsys):
    st = pytest.importorskip("sentence_transformers")
    function = getattr(torch.nn, activation)()
    model = st.CrossEncoder(str(pretrained), num_labels=1, device="cpu", activation_fn=function)
    model.save_pretrained(str(tmp_path / "model"))
    file = write_lists(tmp_path / "a.jsonl", 12)
    row = json.loads(file.read_text().splitlines()[0])
    pairs = [(row["query"], document) for document in [*row["positive"], *row["negative"]]]

    def printed(folder: Path, *flags: str) -> list[float]:
        arguments = ["--model-name-or-path", str(folder), "--input-file", str(file), "--device", "cpu"]
        capsys.readouterr()
        assert main(["predict", *arguments, "--precision", "fp32", *flags]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[0])["scores"]

    assert printed(tmp_path / "model", "--task", "reranking") == pytest.approx(model.predict(pairs).tolist(), abs=1e-5)
    finetune(settings_for(tmp_path / "model", file, tmp_path / "out", num_train_epochs=1.0))
    trained = st.CrossEncoder(str(tmp_path / "out"), device="cpu")
    assert type(trained.activation_fn).__name__ == activation
    assert printed(tmp_path / "out") == pytest.approx(trained.predict(pairs).tolist(), abs=1e-5)


def test_only_the_first_pairs_are_used_on_request(pretrained, tmp_path):
    file = write_lists(tmp_path / "a.jsonl", 12)
    limits = {"max_train_samples": 10, "max_eval_samples": 6, "max_predict_samples": 5, "num_train_epochs": 1.0}
    files = {"validation_file": str(file), "test_file": str(file)}
    results = finetune(settings_for(pretrained, file, tmp_path / "out", **limits, **files))
    assert results["train_samples"] == 10
    assert 0 < results["eval_ndcg_at_10"] <= 1
    lines = (tmp_path / "out" / "predictions_test.tsv").read_text().splitlines()
    assert [line.count(",") + 1 for line in lines[1:]] == [4, 1]


def test_a_model_with_several_labels_is_refused(tuned, tmp_path, capsys):
    model, _ = tuned
    file = write_lists(tmp_path / "a.jsonl", 4)
    arguments = ["--model-name-or-path", str(model), "--input-file", str(file), "--device", "cpu"]
    assert main(["predict", *arguments, "--task", "reranking"]) == 1
    assert f"{model} has 2 labels, and reranking needs one: leave --task out" in capsys.readouterr().err


def test_a_classifier_can_start_from_a_reranker(reranker, files, tmp_path, capsys):
    folder, _ = reranker
    values = QUICK | {"model_name_or_path": str(folder / "out"), "num_train_epochs": 0.2}
    finetune(FinetuneSettings.of(**values, train_file=files["train_file"], output_dir=str(tmp_path / "out")))
    arguments = ["--model-name-or-path", str(tmp_path / "out"), "--validation-file", files["validation_file"]]
    assert main(["evaluate", *arguments, "--device", "cpu"]) == 0
    assert "eval_accuracy" in capsys.readouterr().out
