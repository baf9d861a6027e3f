"""Predictions of a fine-tuned model: packed or padded, from a file or standard input, and in transformers."""

import json
import os
import random
import select
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from sentiment import FILLERS, rows_of
from task_examples import settings_for, write_examples
from text_pairs import write_pairs

from bertfast import BertForSequenceClassification
from bertfast.cli.main import main
from bertfast.data import text_files
from bertfast.data.tokenizer import load_tokenizer
from bertfast.inference import predict as predict_module
from bertfast.inference.embed import EmbedSettings, embed
from bertfast.inference.fill_mask import FillMaskSettings, fill_mask_command
from bertfast.inference.predict import PredictSettings, predict, predict_outputs
from bertfast.inference.search import SearchSettings, search
from bertfast.tasks.features import Features, tokenize
from bertfast.tasks.sequence_classification import SequenceClassificationTask
from bertfast.training.evaluate import EvaluateSettings, evaluate
from bertfast.training.finetuning import finetune


def logits_of(model: BertForSequenceClassification, features: Features, tokens: int = 1000) -> np.ndarray:
    settings = PredictSettings.of(model_name_or_path="model", eval_tokens=tokens, precision="fp32")
    return np.stack(predict_outputs(SequenceClassificationTask(settings), model, features))


def test_transformers_opens_the_model_and_agrees(tuned):
    folder, _ = tuned
    hf_model = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    assert hf_model.config.id2label == {0: "bad", 1: "good"}
    texts = ["the film was good", "a bad plot and a very bad actor"]
    batch = transformers.BertTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = hf_model(**batch).logits.numpy()
    model = BertForSequenceClassification.from_pretrained(folder)
    features = tokenize(load_tokenizer(folder), texts, 24)
    np.testing.assert_allclose(logits_of(model, features), expected, atol=1e-5)


def test_packed_predictions_equal_padded_ones_at_any_batch_size(tuned):
    folder, _ = tuned
    model = BertForSequenceClassification.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    random_ = random.Random(3)
    texts = [" ".join(random_.choices([*FILLERS, "good", "bad"], k=random_.randint(1, 20))) for _ in range(17)]
    features = tokenize(tokenizer, texts, 24)
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(texts)
    with torch.no_grad():
        padded = model(
            torch.tensor([encoding.ids for encoding in encodings]),
            torch.tensor([encoding.attention_mask for encoding in encodings]),
        ).logits.numpy()
    model.train()  # predict_outputs disables dropout, and restores the mode
    for tokens in (1, 40, 10_000):
        np.testing.assert_allclose(logits_of(model, features, tokens), padded, atol=1e-5)
    assert model.training


def test_evaluate_agrees_with_finetune(tuned, files, tmp_path, capsys):
    folder, results = tuned
    common = {"model_name_or_path": str(folder), "validation_file": files["validation_file"], "device": "cpu"}
    metrics = evaluate(EvaluateSettings.of(**common, precision="fp32", output_dir=str(tmp_path / "new")))
    assert {name: metrics[name] for name in results if name.startswith("eval_")} == pytest.approx(
        {name: value for name, value in results.items() if name.startswith("eval_")}, abs=1e-6
    )
    assert json.loads((tmp_path / "new" / "eval_results.json").read_text()) == metrics
    predictions = (tmp_path / "new" / "predictions_validation.tsv").read_text()
    assert predictions == (folder / "predictions_validation.tsv").read_text()
    assert "eval_accuracy" in capsys.readouterr().out


def test_predictions_for_a_file_and_for_standard_input_are_equal(tuned, files, capsys, pipe):
    folder, _ = tuned
    settings = {"model_name_or_path": str(folder), "device": "cpu", "precision": "fp32"}
    predict(PredictSettings.of(**settings, input_file=files["test_file"]))
    from_file = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    sentences = [row[1] for row in rows_of(Path(files["test_file"]))[1:]]
    for standard_input in (None, "-"):
        pipe("\n".join(sentences))
        predict(PredictSettings.of(**settings, input_file=standard_input))
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
            {name: value for name, value in prediction.items() if name != "id"} for prediction in from_file
        ]
    assert [prediction["row"] for prediction in from_file] == [*range(1, 1 + len(sentences))]
    expected = rows_of(folder / "predictions_test.tsv")[1:]
    assert [answer["label"] for answer in from_file] == [row[2] for row in expected]
    assert [answer["score"] for answer in from_file] == pytest.approx([max(map(float, row[3:])) for row in expected])


def predicted(folder: Path, capsys: pytest.CaptureFixture, file: Path | None, **settings) -> list[dict]:
    """Return the JSON objects that `predict` prints."""
    where = {"model_name_or_path": str(folder), "device": "cpu", "precision": "fp32"}
    predict(PredictSettings.of(**where, input_file=None if file is None else str(file), **settings))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("rows_per_chunk", [1000, 2])
def test_each_row_has_a_prediction_or_is_marked_as_skipped(tuned, rows_per_chunk, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bertfast.tasks.sequence_classification.ROWS_PER_CHUNK", rows_per_chunk)
    path = tmp_path / "rows.jsonl"
    rows = [{"id": i, "sentence": "good"} for i in "abc"]
    path.write_text(
        "\n".join([json.dumps(rows[0]), '{"id"', "", '{"sentence": 1, "id": 7}', *map(json.dumps, rows[1:])])
    )
    with pytest.raises(ValueError, match="line 2: not JSON"):
        predicted(tuned[0], capsys, path)
    found = predicted(tuned[0], capsys, path, on_bad_rows="skip")
    assert [(row["row"], row.get("id"), row.get("label")) for row in found] == [
        (1, "a", "good"),
        (2, None, None),
        (3, 7, None),
        (4, "b", "good"),
        (5, "c", "good"),
    ]
    assert "line 2: not JSON" in found[1]["skipped"]
    assert found[2]["skipped"].endswith("line 4: column 'sentence' holds 1, not a text")


@pytest.mark.parametrize("label", ["-1", "", "_", "neutral", "nan"])
def test_labels_do_not_matter_to_predict(tuned, label, tmp_path, capsys):
    (tmp_path / "a.tsv").write_text(f"sentence\tlabel\ngood\tgood\nbad\t{label}\n\t{label}\n")
    assert [row["row"] for row in predicted(tuned[0], capsys, tmp_path / "a.tsv")] == [1, 2, 3]


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_blank_rows_of_one_column_are_rows(tuned, suffix, tmp_path, capsys):
    (tmp_path / f"a.{suffix}").write_text("sentence\ngood\n\nbad\n")
    found = predicted(tuned[0], capsys, tmp_path / f"a.{suffix}")
    assert [(row["row"], row["label"]) for row in found[::2]] == [(1, "good"), (3, "bad")]
    assert len(found) == 3


def test_blank_lines_of_standard_input_are_rows_and_chunks_keep_counting(tuned, pipe, monkeypatch, capsys):
    monkeypatch.setattr("bertfast.inference.predict.ROWS_PER_CHUNK", 2)
    pipe("good\n\nbad\tbad\nna\u00efve\nbad\n")
    assert [row["row"] for row in predicted(tuned[0], capsys, None)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("task", ["token-classification", "question-answering", "swag"])
def test_a_model_of_another_task_is_refused(tuned, task, capsys):
    with pytest.raises(ValueError, match=rf"--task {task} requires a Bert\w+, but .* is a BertForSequenceClass"):
        predicted(tuned[0], capsys, None, task=task)


def test_a_long_file_is_read_in_parts(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("sentence\n" + "good\n" * 5000)
    task = SequenceClassificationTask(PredictSettings.of(model_name_or_path="model"))
    parts = [examples.rows.numbers for examples in task.read_chunks(str(path))]
    assert {len(numbers) for numbers in parts} == {1000}
    assert (parts[0][0], parts[4][-1]) == (1, 5000)


def test_predict_and_evaluate_count_the_texts_that_they_cut(tuned, tmp_path, caplog, capsys):
    path = tmp_path / "a.tsv"
    path.write_text("sentence\tlabel\n" + "good\tgood\nbad good bad good bad\tbad\n" * 3)
    predicted(tuned[0], capsys, path, max_seq_length=5)
    evaluate(EvaluateSettings.of(model_name_or_path=tuned[0], validation_file=path, max_seq_length=5))
    cut = [record.getMessage() for record in caplog.records if "cut" in record.getMessage()]
    assert cut == [f"{path}: cut 3 of 6 texts to 5 tokens"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", ["sequence-classification", "multi-label", "multiple-choice", "token-classification", "regression"]
)
def test_all_probabilities_are_printed_on_request(task, pretrained, tmp_path, capsys):
    file = write_examples(tmp_path, task, 12, seed=0)
    finetune(settings_for(task, pretrained, file, tmp_path / "out", num_train_epochs=1))
    where = {"model_name_or_path": str(tmp_path / "out"), "input_file": str(file), "device": "cpu", "precision": "fp32"}
    if task == "regression":
        with pytest.raises(ValueError, match="--all-probabilities would have no effect: the task of the model has no"):
            predict(PredictSettings.of(**where, all_probabilities=True))
        return
    printed = {}
    for every in (False, True):
        capsys.readouterr()
        predict(PredictSettings.of(**where, all_probabilities=every))
        printed[every] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for plain, row in zip(printed[False], printed[True], strict=True):
        probabilities = row.pop("probabilities")
        assert row == plain
        if task == "sequence-classification":
            assert {*probabilities} == {"bad", "good"}
            assert sum(probabilities.values()) == pytest.approx(1)
            assert probabilities[row["label"]] == max(probabilities.values()) == row["score"]
        elif task == "multi-label":
            assert {*probabilities} == {"bad", "good"}
            assert {name: score for name, score in probabilities.items() if score > 0.5} == row["labels"]
        elif task == "multiple-choice":
            assert sum(probabilities) == pytest.approx(1)
            assert probabilities[row["choice"]] == max(probabilities) == row["score"]
        else:
            assert [max(of_word, key=of_word.__getitem__) for of_word in probabilities] == row["tags"]


ECHOED = {
    "sequence-classification": {"text"},
    "multiple-choice": {"text", "endings"},
    "token-classification": {"words"},
    "question-answering": {"question", "context"},
    "embedding": {"texts"},
    "reranking": {"query", "document"},
}


@pytest.mark.slow
@pytest.mark.parametrize("task", ECHOED)
def test_texts_are_echoed_on_request(task, pretrained, tmp_path, capsys):
    if task in ("embedding", "reranking"):
        file = write_pairs(tmp_path / "a.tsv", "labelled", 12)
    else:
        file = write_examples(tmp_path, task, 12, seed=0)
    finetune(settings_for(task, pretrained, file, tmp_path / "out", max_steps=1))
    printed = []
    for echo in (False, True):
        capsys.readouterr()
        values = {"model_name_or_path": str(tmp_path / "out"), "input_file": str(file), "precision": "fp32"}
        predict(PredictSettings.of(**values, device="cpu", echo_texts=echo))
        printed.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    content = file.read_text()
    for plain, row in zip(*printed, strict=True):
        assert {name: value for name, value in row.items() if name in plain} == plain
        assert row.keys() - plain.keys() == ECHOED[task] - {"words"}  # which are always printed
        for name in ECHOED[task]:
            texts = [row[name]] if isinstance(row[name], str) else row[name]
            assert all(text in content for text in texts)
    assert len({json.dumps([row[name] for name in sorted(ECHOED[task])]) for row in printed[1]}) > 6


@pytest.mark.slow
def test_lists_and_pairs_are_echoed(tuned, pretrained, tmp_path, capsys):
    pair = tmp_path / "pair.tsv"
    pair.write_text("sentence1\tsentence2\ngood film\tbad film\n\tgood\n")
    where = {"input_file": str(pair), "device": "cpu", "echo_texts": True}
    predict(PredictSettings.of(model_name_or_path=str(tuned[0]), on_bad_rows="skip", **where))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (rows[0]["text"], rows[0]["text_pair"]) == ("good film", "bad film")
    lists = tmp_path / "lists.jsonl"
    documents = [["good film", "bad film"], ["plot"]]
    lists.write_text(
        "".join(json.dumps({"query": "good", "docs": docs, "labels": [1, 0][: len(docs)]}) + "\n" for docs in documents)
    )
    finetune(settings_for("reranking", pretrained, lists, tmp_path / "out", max_steps=1))
    capsys.readouterr()
    predict(PredictSettings.of(model_name_or_path=str(tmp_path / "out"), **where | {"input_file": str(lists)}))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["query"], row["documents"], len(row["scores"])) for row in rows] == [
        ("good", docs, len(docs)) for docs in documents
    ]


@pytest.mark.slow
def test_the_batch_size_limits_the_texts_of_a_batch(tuned, files, capsys, monkeypatch):
    model_inputs, sizes = Features.model_inputs, []

    def recorded(self, rows, **options):
        sizes.append(len(rows))
        return model_inputs(self, rows, **options)

    monkeypatch.setattr(Features, "model_inputs", recorded)
    where = {"model_name_or_path": str(tuned[0]), "input_file": files["test_file"], "device": "cpu"}
    printed = []
    for size in (None, 7):
        sizes.clear()
        predict(PredictSettings.of(**where, precision="fp32", batch_size=size))
        printed.append([json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()])
        assert (max(sizes) > 7) == (size is None)
    assert printed[0] == printed[1]


@pytest.fixture
def asked(monkeypatch):
    """Return a function that runs a program on an open pipe, and returns the first line it prints for each line.

    A line is written when the one before has been answered; None: it was not.
    """

    def ask(program, *lines: str) -> list[str | None]:
        reader, writer = os.pipe()
        out_reader, out_writer = os.pipe()
        with (
            os.fdopen(reader, encoding="ascii") as standard_input,
            os.fdopen(out_reader) as answers,
            os.fdopen(out_writer, "w") as standard_output,
        ):
            monkeypatch.setattr("sys.stdin", standard_input)
            monkeypatch.setattr("sys.stdout", standard_output)
            thread = threading.Thread(target=program)
            thread.start()
            found = []
            for line in lines:
                os.write(writer, f"{line}\n".encode())
                found.append(answers.readline() if select.select([answers], [], [], 60)[0] else None)
            os.close(writer)
            thread.join()
        return found

    return ask


def test_a_line_of_an_open_pipe_is_answered_before_the_next(tuned, asked):
    settings = PredictSettings.of(model_name_or_path=tuned[0], device="cpu", precision="fp32")
    found = asked(lambda: predict(settings), "good", "bad", "the good film")
    assert None not in found
    answers = [json.loads(line) for line in found]
    assert [(answer["row"], answer["label"]) for answer in answers] == [(1, "good"), (2, "bad"), (3, "good")]


def test_a_query_of_an_open_pipe_is_answered_before_the_next(pretrained, tmp_path, asked):
    (tmp_path / "a.txt").write_text("good\nbad\n")
    where = {"model_name_or_path": pretrained, "device": "cpu", "precision": "fp32"}
    folder = embed(EmbedSettings.of(**where, input_file=tmp_path / "a.txt", output_dir=tmp_path / "out"))
    settings = SearchSettings.of(**where, embeddings_dir=folder, top_k=1)
    found = asked(lambda: search(settings), "bad", "good")
    assert None not in found
    assert [json.loads(line)["hits"][0]["row"] for line in found] == [2, 1]


def test_a_text_with_masks_of_an_open_pipe_is_answered_before_the_next(pretrained, asked):
    settings = FillMaskSettings(str(pretrained), "-", top_k=1)
    found = asked(lambda: fill_mask_command(settings), "the [MASK]")
    assert found == ["the [MASK]\n"]


def test_int8_is_calibrated_on_the_first_lines_however_fast_they_arrive(tuned, monkeypatch, pipe, capsys):
    texts = ["good film", "bad plot", *["the music"] * 40]
    pipe("\n".join(texts))
    calibrated, freeze_on_cpu = [], predict_module.freeze_on_cpu

    def recorded(model, precision, features, run):
        calibrated.append(len(features))
        freeze_on_cpu(model, precision, features, run)

    monkeypatch.setattr(predict_module, "freeze_on_cpu", recorded)
    monkeypatch.setattr(text_files.ArrivingInput, "line_arrives", lambda self, until: False)  # one by one
    predict(PredictSettings.of(model_name_or_path=tuned[0], device="cpu", precision="int8"))
    assert calibrated[:2] == [32, 1]
    assert [json.loads(line)["row"] for line in capsys.readouterr().out.splitlines()] == [*range(1, 43)]


@pytest.mark.parametrize("name", ["a.tsv", "a.jsonl", "a.json", "header.tsv", None])
def test_input_without_rows_is_refused(name, tuned, tmp_path, pipe, capsys):
    pipe("")
    arguments = ["--model-name-or-path", str(tuned[0]), "--device", "cpu"]
    if name is not None:
        content = {"header.tsv": "sentence\n", "a.json": "[]"}.get(name, "")
        (tmp_path / name).write_text(content)
        arguments += ["--input-file", str(tmp_path / name)]
    assert main(["predict", *arguments]) == 1
    out, error = capsys.readouterr()
    assert not out
    message = "standard input is empty: it needs one text" if name is None else f"{tmp_path / name} holds no rows"
    assert f"bertfast predict: {message}" in error


def test_fill_mask_without_lines_is_refused(pretrained, pipe, capsys):
    pipe("")
    assert main(["fill-mask", str(pretrained), "-"]) == 1
    assert "bertfast fill-mask: standard input is empty: it needs one text per line" in capsys.readouterr().err
