"""Training of embeddings: losses of sentence-transformers, gradient caching, and folders that both libraries open."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sentence_training
import torch
from safetensors.torch import load_file
from sentence_training import BATCH, STEPS, losses_of_loop
from sentiment import QUICK, write_sentiment
from text_pairs import HEADERS, rows_of, write_pairs

from bertfast.cli.main import main
from bertfast.inference.embed import EmbedSettings, embed
from bertfast.inference.predict import predict_outputs
from bertfast.models.sentence_folder import read_sentence_modules
from bertfast.tasks.embedding import EmbeddingTask
from bertfast.training.finetuning import FinetuneSettings, Finetuning, finetune
from bertfast.training.gradient_cache import backward_in_parts

LOSSES = {"pairs": "MultipleNegativesRankingLoss", "triplets": "MultipleNegativesRankingLoss"}
LOSSES |= {"scored": "CoSENTLoss", "labelled": "ContrastiveLoss"}


settings_for = partial(sentence_training.settings_for, "embedding")


def st_losses(run: Finetuning, folder: Path, form: str, dims: list[int]) -> list[float]:
    """Return the losses of a training loop with sentence-transformers, from the same weights and batches."""
    st = pytest.importorskip("sentence_transformers")
    settings = run.settings
    run.model.save_pretrained(folder)
    run.task.write_folder(folder, adapted=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copyfile(Path(settings.model_name_or_path, name), folder / name)
    model = st.SentenceTransformer(str(folder), device="cpu").train()
    known = pytest.importorskip("sentence_transformers.losses")
    loss_of = getattr(known, LOSSES[form])(model)
    if dims:
        loss_of = known.MatryoshkaLoss(model, loss_of, dims)
    examples = run.examples["train"]

    def loss(rows: np.ndarray) -> torch.Tensor:
        texts = zip(*(examples.texts[row] for row in rows), strict=True)
        labels = torch.tensor([examples.scores[row] for row in rows] if examples.scores else [0.0] * len(rows))
        return loss_of([model.tokenize([*column]) for column in texts], labels)

    return losses_of_loop(run, model, loss)


@pytest.mark.parametrize("dims", [[], [32, 8]])
@pytest.mark.parametrize("form", HEADERS)
def test_losses_equal_those_of_a_training_loop_with_sentence_transformers(form, dims, pretrained, tmp_path):
    file = write_pairs(tmp_path / "a.tsv", form, 60)
    epochs = STEPS * BATCH / 60
    options = {"per_device_train_batch_size": BATCH, "num_train_epochs": epochs, "learning_rate": 1e-3}
    run = Finetuning(settings_for(pretrained, file, tmp_path / "out", matryoshka_dims=dims, **options))
    assert run.steps == STEPS
    expected = st_losses(run, tmp_path / "st", form, dims)
    run.run(lambda step: None)
    assert run.results.losses == pytest.approx(expected, abs=1e-4)
    assert np.mean(run.results.losses[-10:]) < np.mean(run.results.losses[:10])


@pytest.mark.parametrize("form", HEADERS)
def test_tokens_per_batch_changes_no_step(form, pretrained, tmp_path, monkeypatch):
    file, losses, parts = write_pairs(tmp_path / "a.tsv", form, 40), [], []

    def counted(task, model, batches, *arguments):
        parts.append(len(batches))
        return backward_in_parts(task, model, batches, *arguments)

    monkeypatch.setattr("bertfast.training.finetune_step.backward_in_parts", counted)
    for budget in (10**6, 100):
        run = Finetuning(settings_for(pretrained, file, tmp_path / str(budget), tokens_per_batch=budget))
        run.run(lambda step: None)
        losses.append(run.results.losses)
    assert min(parts) > 1
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_dropout_of_the_second_pass_is_that_of_the_first(pretrained, tmp_path):
    """The gradient of a part is that of the embeddings of which the loss was computed."""
    file = write_pairs(tmp_path / "a.tsv", "pairs", 12)
    run = Finetuning(settings_for(pretrained, file, tmp_path / "out", dropout=0.4))
    features, rows = run.features["train"], np.arange(12)
    parts = [features.model_inputs(rows[:5]), features.model_inputs(rows[5:])]
    items = torch.tensor(12.0)

    torch.manual_seed(1)
    loss = backward_in_parts(run.task, run.model, parts, items, "fp32")
    cached = {name: x.grad.clone() for name, x in run.model.named_parameters() if x.grad is not None}
    run.model.zero_grad()
    torch.manual_seed(1)
    vectors = torch.cat([run.task.vectors(run.model, part) for part in parts])
    labels = {name: torch.cat([part.arguments[name] for part in parts]) for name in ("labels", "text_ids")}
    expected = run.task.loss_of_vectors(vectors, labels, items)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, parameter in run.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(cached[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.fixture(scope="module")
def embedder(pretrained, tmp_path_factory) -> tuple[Path, dict]:
    """A model of embeddings that was trained on pairs, and its results."""
    folder = tmp_path_factory.mktemp("embedder")
    train = write_pairs(folder / "train.tsv", "pairs", 300)
    dev = write_pairs(folder / "dev.tsv", "pairs", 40, seed=1)
    options = {"validation_file": str(dev), "num_train_epochs": 6, "pooling": "cls", "normalization": "l2"}
    return folder, finetune(settings_for(pretrained, train, folder / "out", max_seq_length=20, **options))


def test_training_on_pairs_finds_more_of_them(embedder, pretrained):
    folder, results = embedder
    assert results["eval_ndcg_at_10"] > 0.6
    assert results["eval_mrr_at_10"] > 0.5
    assert (folder / "out" / "predictions_validation.tsv").read_text().startswith("row\tscore\n1\t")


def test_validation_encodes_a_repeated_text_once(pretrained, tmp_path, monkeypatch):
    rows = rows_of("pairs", 6, seed=0)
    questions = [[question, rows[index % 2][1]] for index, (question, _) in enumerate(rows)]  # of two paragraphs
    file = tmp_path / "a.tsv"
    file.write_text("".join("\t".join(row) + "\n" for row in [HEADERS["pairs"], *questions]))
    run = Finetuning(settings_for(pretrained, file, tmp_path / "out"))
    features, encoded = run.features["train"], []
    run.model.train(False)
    with torch.no_grad():
        expected = run.task.logits(run.model, features.model_inputs(np.arange(6), labels=False))
    logits = EmbeddingTask.logits

    def counted(task, model, inputs):
        encoded.append(int((inputs.arguments["cu_seq_lens_q"].diff() > 0).sum()))
        return logits(task, model, inputs)

    monkeypatch.setattr(EmbeddingTask, "logits", counted)
    found = predict_outputs(run.task, run.model, features)
    assert sum(encoded) == 6 + 2
    np.testing.assert_allclose(np.stack(found), expected.numpy(), atol=1e-6)


def test_a_module_dense_is_refused_with_a_remedy(pretrained, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    layers = [modules.Transformer(str(pretrained)), modules.Pooling(32), modules.Dense(32, 16)]
    st.SentenceTransformer(modules=layers, device="cpu").save(str(tmp_path / "model"))
    train = write_pairs(tmp_path / "train.tsv", "pairs", 20)
    with pytest.raises(ValueError, match="a module Dense, which is not trained here: train"):
        finetune(settings_for(tmp_path / "model", train, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_result_opens_in_sentence_transformers_and_embeds_the_same(embedder, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    folder, _ = embedder
    texts = [line.split("\t")[0] for line in (folder / "dev.tsv").read_text().splitlines()[1:]]
    model = st.SentenceTransformer(str(folder / "out"), device="cpu")
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    assert (model.max_seq_length, model.similarity_fn_name) == (20, "cosine")
    (tmp_path / "a.txt").write_text("\n".join(texts))
    where = {"model_name_or_path": str(folder / "out"), "input_file": str(tmp_path / "a.txt")}
    written = embed(EmbedSettings.of(output_dir=str(tmp_path / "vectors"), **where, device="cpu", precision="fp32"))
    found = load_file(written / "part-00000.safetensors")["embeddings"]
    torch.testing.assert_close(found, model.encode(texts, convert_to_tensor=True), atol=1e-5, rtol=1e-4)


def test_the_model_card_says_how_to_use_the_model(embedder, tmp_path, monkeypatch, pipe):
    pytest.importorskip("sentence_transformers")
    folder, _ = embedder
    card = (folder / "out" / "README.md").read_text()
    assert "library_name: sentence-transformers\npipeline_tag: sentence-similarity\n" in card
    monkeypatch.chdir(folder)
    command = "bertfast embed --model-name-or-path out --output-dir vectors"
    assert f"printf 'A text.\\n' | {command}\n" in card
    assert "Add `--input-file FILE` for the rows of a file" in card
    pipe("A text.\n")
    assert main(command.split()[1:]) == 0
    exec(card.split("```python\n")[1].split("```")[0], {})


def test_results_are_those_that_sentence_transformers_measures(embedder, capsys):
    st = pytest.importorskip("sentence_transformers")
    evaluation = pytest.importorskip("sentence_transformers.evaluation")
    folder, results = embedder
    rows = [line.split("\t") for line in (folder / "dev.tsv").read_text().splitlines()[1:]]
    queries, corpus = ({str(i): row[column] for i, row in enumerate(rows)} for column in (0, 1))
    evaluator = evaluation.InformationRetrievalEvaluator(queries, corpus, {i: {i} for i in queries})
    expected = evaluator(st.SentenceTransformer(str(folder / "out"), device="cpu"))
    assert results["eval_ndcg_at_10"] == pytest.approx(expected["cosine_ndcg@10"], abs=1e-6)
    assert results["eval_mrr_at_10"] == pytest.approx(expected["cosine_mrr@10"], abs=1e-6)
    capsys.readouterr()
    arguments = ["--model-name-or-path", str(folder / "out"), "--device", "cpu", "--precision", "fp32"]
    assert main(["evaluate", *arguments, "--validation-file", str(folder / "dev.tsv")]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(printed["eval_ndcg_at_10"]) == pytest.approx(results["eval_ndcg_at_10"], abs=1e-5)


def test_predict_prints_the_cosines_of_pairs(embedder, capsys):
    st = pytest.importorskip("sentence_transformers")
    folder, _ = embedder
    arguments = ["--model-name-or-path", str(folder / "out"), "--device", "cpu", "--precision", "fp32"]
    capsys.readouterr()
    assert main(["predict", *arguments, "--input-file", str(folder / "dev.tsv")]) == 0
    scores = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    rows = [line.split("\t") for line in (folder / "dev.tsv").read_text().splitlines()[1:]]
    model = st.SentenceTransformer(str(folder / "out"), device="cpu")
    first, second = (model.encode([row[column] for row in rows], convert_to_tensor=True) for column in (0, 1))
    assert scores == pytest.approx((first * second).sum(1).tolist(), abs=1e-5)


def test_a_model_of_sentence_transformers_is_trained_as_it_is(pretrained, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    transformer = modules.Transformer(str(pretrained), max_seq_length=18)
    layers = [transformer, modules.Pooling(32, "max"), modules.Normalize()]
    options = {"prompts": {"query": "a film "}, "similarity_fn_name": "dot", "truncate_dim": 16}
    st.SentenceTransformer(modules=layers, device="cpu", **options).save(str(tmp_path / "model"))
    train = write_pairs(tmp_path / "train.tsv", "scored", 60)
    options = {"validation_file": str(train), "matryoshka_dims": [32, 8]}
    results = finetune(settings_for(tmp_path / "model", train, tmp_path / "out", **options))
    assert results["eval_spearmanr"] > 0.3
    assert "eval_spearmanr_8" in results
    before, after = (read_sentence_modules(tmp_path / name) for name in ("model", "out"))
    assert (after.pooling, after.max_seq_length, after.prompts, after.similarity) == (
        ("max",),
        18,
        before.prompts,
        "dot",
    )
    assert [step.effect for step in after.after] == [step.effect for step in before.after]
    opened = st.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert opened.encode(["a film"]).shape == (1, 16)
    assert opened.prompts["query"] == "a film "


def test_an_encoder_in_a_folder_of_its_own_is_found(pretrained, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    model = tmp_path / "model"
    st.SentenceTransformer(str(pretrained), device="cpu").save(str(model))
    (model / "0_Transformer").mkdir()
    for path in [path for path in model.iterdir() if path.is_file() and path.name not in ("modules.json", "README.md")]:
        if not path.name.startswith("config_"):
            path.rename(model / "0_Transformer" / path.name)
    entries = json.loads((model / "modules.json").read_text())
    entries[0]["path"] = "0_Transformer"
    (model / "modules.json").write_text(json.dumps(entries))
    train = write_pairs(tmp_path / "train.tsv", "scored", 20)
    results = finetune(settings_for(model, train, tmp_path / "out", validation_file=str(train)))
    assert np.isfinite(results["eval_spearmanr"])
    arguments = ["--model-name-or-path", str(model), "--validation-file", str(train), "--device", "cpu"]
    assert main(["evaluate", *arguments, "--task", "embedding"]) == 0


def test_a_classifier_can_start_from_a_model_of_embeddings(embedder, tmp_path, capsys):
    folder, _ = embedder
    file = write_sentiment(tmp_path / "a.tsv", 30, seed=0)
    values = QUICK | {"model_name_or_path": str(folder / "out"), "train_file": str(file), "num_train_epochs": 1}
    finetune(FinetuneSettings.of(**values, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "modules.json").exists()
    arguments = ["--model-name-or-path", str(tmp_path / "out"), "--validation-file", str(file), "--device", "cpu"]
    assert main(["evaluate", *arguments]) == 0
    assert "eval_accuracy" in capsys.readouterr().out


def test_a_new_run_replaces_the_files_of_sentence_transformers(pretrained, tmp_path):
    train = write_pairs(tmp_path / "train.tsv", "pairs", 20)
    finetune(settings_for(pretrained, train, tmp_path / "out", normalization="l2", num_train_epochs=1))
    assert (tmp_path / "out" / "2_Normalize").exists()
    file = write_sentiment(tmp_path / "a.tsv", 30, seed=0)
    values = QUICK | {"model_name_or_path": str(pretrained), "train_file": str(file), "num_train_epochs": 1}
    finetune(FinetuneSettings.of(**values, output_dir=str(tmp_path / "out"), overwrite_output_dir=True))
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert not left & {"modules.json", "1_Pooling", "2_Normalize", "config_sentence_transformers.json"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"matryoshka_dims": [32, 33]},
            "--matryoshka-dims must be at most 32, the size of the model's embeddings, got 33",
        ),
        ({"metric_for_best_model": "f1", "validation_file": ""}, "must be one of spearmanr, pearson in this task"),
        ({"class_weights": "balanced"}, "--class-weights requires a task in which"),
        ({"bilstm": True}, "--bilstm would have no effect: embeddings are pooled from the encoder's output"),
        ({"strategy": "feature-based"}, "--strategy feature-based is only available for token classification"),
    ],
)
def test_what_embeddings_do_not_have_is_refused(changes, message, pretrained, tmp_path):
    file = write_pairs(tmp_path / "a.tsv", "scored", 20)
    changes = {name: str(file) if value == "" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        finetune(settings_for(pretrained, file, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("form", "lacking"), [("pairs", "negatives"), ("scored", "other score")])
def test_a_batch_of_one_pair_and_untrained_sizes_are_said(form, lacking, pretrained, tmp_path, caplog):
    file = write_pairs(tmp_path / "a.tsv", form, 4)
    options = {"per_device_train_batch_size": 1, "num_train_epochs": 1, "matryoshka_dims": [8]}
    finetune(settings_for(pretrained, file, tmp_path / "out", **options))
    assert caplog.text.count(f"a batch of one pair has no {lacking}, and its loss is 0: choose larger batches") == 1
    assert "--matryoshka-dims lacks 32, the size of whole embeddings, which are not trained" in caplog.text
