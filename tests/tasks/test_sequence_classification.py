"""Sequence classification: labels of each problem type, and the files of GLUE as published."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bertfast import BertConfig
from bertfast.data.tokenizer import train_tokenizer
from bertfast.tasks.columns import Columns
from bertfast.tasks.features import Features
from bertfast.tasks.labels import LabelEncoder, has_fractions, require_classes, sorted_labels
from bertfast.tasks.rows import Rows
from bertfast.tasks.sequence_classification import SequenceClassificationTask, TextExamples
from bertfast.tasks.settings import TaskSettings
from bertfast.tasks.tables import Table
from bertfast.tasks.task import label_to_id


def table(**columns: list) -> Table:
    numbers = range(1, 1 + len(next(iter(columns.values()))))
    return Table(columns, Rows("a.tsv", numbers, numbers))


def test_columns_default_to_common_names():
    pair = table(idx=["0"], sentence1=["x"], sentence2=["y"], label=["1"])
    assert Columns.choose(pair, None, None, None) == Columns("sentence1", "sentence2", "label")
    assert Columns.choose(pair, "idx", None, "sentence1") == Columns("idx", "sentence2", "sentence1")
    assert Columns.choose(table(text=["x"]), None, None, None) == Columns("text", None, "label")
    with pytest.raises(ValueError, match="only 'review', 'stars': name the text column with --text-column"):
        Columns.choose(table(review=["x"], stars=["1"]), None, None, None)


@pytest.mark.parametrize(
    ("labels", "names"),
    [(["b", "a", "b"], ["a", "b"]), (["10", "9", "-1"], ["-1", "9", "10"]), (["1", "x"], ["1", "x"])],
)
def test_sorted_labels_sort_integers_by_value(labels, names):
    assert sorted_labels(labels) == names


def test_a_single_label_raises():
    with pytest.raises(ValueError, match=r"a\.tsv: every label is 'x'"):
        require_classes(sorted_labels(["x", "x"]), "a.tsv")


@pytest.mark.parametrize(
    ("labels", "fractions"),
    [
        (["0.5", "1"], True),
        (["5.000", "4.750"], True),
        (["0", "1"], False),
        (["1", "nan", "inf"], False),
        (["0.5", "nan"], True),
        (["1.0", "2.0"], False),
        (["0.5", "2", "n/a"], True),
        (["a"], False),
    ],
)
def test_only_numbers_that_are_not_all_integers_have_fractions(labels, fractions):
    assert has_fractions(labels) == fractions


def test_spellings_of_a_number_are_one_label_and_nan_is_none():
    assert sorted_labels(["1", "0", "1.0"]) == ["0", "1"]
    assert sorted_labels(["1.0", "0.0"]) == ["0.0", "1.0"]
    assert sorted_labels(["1", "nan", "0", "inf"]) == ["0", "1"]
    assert sorted_labels(["nan", "person"]) == ["nan", "person"]
    encoder = LabelEncoder({"0": 0, "1": 1}, "single_label_classification")
    assert [encoder.target(label) for label in ("0.0", "1", "1.00")] == [0, 1, 1]
    with pytest.raises(ValueError, match=r"unknown label '0\.1'; known labels: 0, 1"):
        encoder.target("0.1")
    with pytest.raises(ValueError, match="not a finite number"):
        LabelEncoder({"LABEL_0": 0}, "regression").target("1_0")


def task_for(name: str = "auto", **settings) -> SequenceClassificationTask:
    return SequenceClassificationTask(TaskSettings.of(model_name_or_path="model", task=name, **settings))


def encoded(folder: Path, name: str, text: str, config: BertConfig, **settings):
    """Return the examples of a file, their encoded labels, and the task."""
    path = folder / "rows.tsv"
    path.write_text(text, encoding="utf-8")
    task = task_for(name, **settings)
    task.set_config(config)
    examples, features = task.featurize(task.read(str(path), labelled=True), train_tokenizer(["a b c d"], 64), 32)
    return examples, features.labels["labels"], task


YES_OR_NO = BertConfig(id2label={0: "no", 1: "yes"})


def test_labels_are_encoded_by_problem_type(tmp_path):
    _, labels, _ = encoded(tmp_path, "auto", "text\tlabel\na\tno\nb\tyes\nc\tno\n", YES_OR_NO)
    assert (labels.tolist(), labels.dtype) == ([0, 1, 0], np.int64)
    _, labels, _ = encoded(tmp_path, "auto", "text\tlabel\na\t0.5\nb\t2\n", BertConfig(num_labels=1))
    assert (labels.tolist(), labels.dtype) == ([0.5, 2.0], np.float32)
    sets = BertConfig(id2label={0: "x", 1: "y", 2: "z"}, problem_type="multi_label_classification")
    _, labels, _ = encoded(tmp_path, "multi-label", "text\tlabel\na\tx,z\nb\t\n", sets)
    assert (labels.tolist(), labels.dtype) == ([[1, 0, 1], [0, 0, 0]], np.float32)


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        ("a\tno\nb\t2\n", YES_OR_NO, "line 3: unknown label '2'; known labels: no, yes \\(--on-bad-rows skip leaves"),
        ("a\t0\nb\tx\n", BertConfig(num_labels=11), r"known labels: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, … \(--on-bad"),
        ("a\tno\nb\t\n", YES_OR_NO, "line 3: no label in column 'label'"),
        ("a\t0.5\nb\tx\n", BertConfig(num_labels=1), "line 3: the label 'x' is not a finite number"),
        ("a\tnan\nb\t1\n", BertConfig(num_labels=1), "line 2: the label 'nan' is not a finite number"),
        ("a\t1e39\nb\t1\n", BertConfig(num_labels=1), "line 2: the label '1e39' is not a finite number in fp32"),
        ("a\tno\nb\n", YES_OR_NO, "line 3: 1 field where the header has 2"),
    ],
)
def test_bad_rows_are_reported_or_skipped_and_counted(rows, config, message, tmp_path):
    with pytest.raises(ValueError, match=r"rows\.tsv, line \d: ") as caught:
        encoded(tmp_path, "auto", "text\tlabel\n" + rows, config)
    assert caught.match(message)
    examples, labels, task = encoded(tmp_path, "auto", "text\tlabel\n" + rows, config, on_bad_rows="skip")
    assert len(examples) == len(labels) == task.bad_rows.count == 1


def test_label_to_id_of_named_and_unnamed_labels():
    assert label_to_id(BertConfig(id2label={0: "no", 1: "yes"})) == {"no": 0, "yes": 1}
    assert label_to_id(BertConfig(num_labels=2)) == {"0": 0, "1": 1, "LABEL_0": 0, "LABEL_1": 1}
    with pytest.raises(ValueError, match="was trained for regression, not for sequence-classification"):
        task_for("sequence-classification").set_config(BertConfig(problem_type="regression"))


def tsv(*rows: str) -> str:
    """Return TSV lines from rows with | between fields."""
    return "".join(row.replace("|", "\t") + "\n" for row in rows)


PAIR, PAIRS = "index|sentence1|sentence2", [("a", "b")]
PUBLISHED = {
    "cola": (tsv("gj04|1||a", "gj04|0|*|b"), tsv("index|sentence", "7|a"), ["a", "b"], ["1", "0"]),
    "mrpc": (
        tsv("\ufeffQuality|#1 ID|#2 ID|#1 String|#2 String", '1|5|6|He "said|so'),
        tsv("index|#1 ID|#2 ID|#1 String|#2 String", "7|5|6|a|b"),
        [('He "said', "so")],
        ["1"],
    ),
    "sts-b": (tsv(f"{PAIR}|score", "0|a|b|3.800"), tsv(PAIR, "7|a|b"), PAIRS, ["3.800"]),
    "mnli": (
        tsv(f"{PAIR}|label1|gold_label", "0|a|b|neutral|neutral", "1|c|d|neutral|-"),
        tsv(PAIR, "7|a|b"),
        PAIRS,
        ["neutral"],
    ),
    "qnli": (
        tsv("index|question|sentence|label", "0|a|b|entailment"),
        tsv("index|question|sentence", "7|a|b"),
        PAIRS,
        ["entailment"],
    ),
    "qqp": (
        tsv("id|qid1|qid2|question1|question2|is_duplicate", "0|1|2|a|b|0"),
        tsv("index|question1|question2", "7|a|b"),
        PAIRS,
        ["0"],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_benchmarks_are_read_in_their_published_format(name, tmp_path):
    labelled, unlabelled, texts, labels = PUBLISHED[name]
    task = task_for(name)
    (tmp_path / "train.tsv").write_text(labelled, encoding="utf-8")
    (tmp_path / "test.tsv").write_text(unlabelled, encoding="utf-8")
    examples = task.read(str(tmp_path / "train.tsv"), labelled=True)
    assert (examples.texts, examples.labels) == (texts, labels)
    test = task.read(str(tmp_path / "test.tsv"), labelled=False)
    assert (test.labels, test.rows.ids) == (None, ["7"])


def test_glue_files_have_the_published_number_of_rows(shared_data):
    counts = {"CoLA": (8551, 1043, 1063), "SST-2": (67349, 872, 1821), "MRPC": (3668, 408, 1725)}
    for name, expected in (counts | {"STS-B": (5749, 1500, 1379)}).items():
        task, folder = task_for(name.lower()), shared_data / "glue" / name
        splits = ("train", "dev", "test")
        found = [len(task.read(str(folder / f"{split}.tsv.gz"), labelled=split != "test")) for split in splits]
        assert tuple(found) == expected
    assert len(task_for("qnli").read(str(shared_data / "glue" / "QNLI" / "dev.tsv.gz"), labelled=True)) == 5463
    assert len(task_for("mnli").read(str(shared_data / "glue" / "MNLI" / "dev_matched.tsv.gz"), labelled=True)) == 9815


def test_submissions_have_the_format_of_the_evaluation_server(tmp_path):
    task = task_for("sts-b")
    task.set_config(BertConfig(num_labels=1, problem_type="regression"))
    examples = task.parse_lines(["a\tb", "c\td"])
    features = task.featurize(examples, train_tokenizer(["a b c d"], 64), 32)[1]
    task.write_predictions(tmp_path, "test", examples, features, [np.array([5.25]), np.array([2.0])])
    assert (tmp_path / "STS-B.tsv").read_text() == "index\tprediction\n0\t5.000\n1\t2.000\n"
    task = task_for("rte")
    task.set_config(BertConfig(id2label={0: "entailment", 1: "not_entailment"}))
    task.write_predictions(tmp_path, "test", examples, features, [np.array([0.0, 1.0]), np.array([2.0, 0.0])])
    assert (tmp_path / "RTE.tsv").read_text() == "index\tprediction\n0\tnot_entailment\n1\tentailment\n"
    names, counts = task.confusion_matrix(
        examples, with_labels(features, [0, 0]), [np.array([0.0, 1.0]), np.array([2.0, 0.0])]
    )
    assert (names, counts.tolist()) == (["entailment", "not_entailment"], [[1, 1], [0, 0]])


def with_labels(features: Features, labels: list) -> Features:
    return replace(features, labels={"labels": np.array(labels)})


def test_multi_label_predictions_and_metrics():
    task = task_for("multi-label")
    task.set_config(BertConfig(id2label={0: "x", 1: "y"}, problem_type="multi_label_classification"))
    outputs = [np.array([3.0, -3.0]), np.array([-1.0, -1.0])]
    predictions = list(task.predictions(None, None, outputs))
    assert [[*prediction["labels"]] for prediction in predictions] == [["x"], []]
    features = task.featurize(task.parse_lines(["a", "b"]), train_tokenizer(["a b c d"], 64), 32)[1]
    measured = task.compute_metrics(None, with_labels(features, [[1, 0], [1, 0]]), outputs)
    assert (measured["accuracy"], measured["f1_micro"]) == (0.5, pytest.approx(2 / 3))
    assert measured["loss"] == pytest.approx(np.log1p(np.exp([-3.0, -3.0, 1.0, -1.0])).mean())
    assert json.dumps(predictions)


@pytest.mark.parametrize(
    ("labels", "alike"),
    [
        (["True", "TRUE", "False"], "'TRUE' and 'True'"),
        (["1", "01", "+1", "0"], "'+1' and '01' and '1'"),
        (["\u00e9", "e\u0301", "bar"], "'e\u0301' and '\u00e9'"),
        (["0", "00", "10"], "'0' and '00'"),
        (["-1", "1", "0", "10"], None),
    ],
)
def test_labels_that_are_spelled_alike_are_reported(labels, alike, caplog):
    require_classes(sorted_labels(labels), "a.tsv")
    found = [f"a.tsv: the labels {alike} are different classes: write them alike if they are one"]
    assert caplog.messages == (found if alike else [])


def test_more_labels_than_rows_per_label_are_suspicious(caplog):
    task = task_for()
    rows = Rows("a.tsv", range(30), range(30))
    task.label_config(TextExamples(["x"] * 30, rows, [f"{i},5" for i in range(30)]))
    assert "a.tsv: 30 different labels in 30 rows: is 'label' the column of the labels?" in caplog.text


@pytest.mark.parametrize(
    ("labels", "inferred", "label_ids"),
    [
        (["1", "0", "1 ", "nan"], "--task sequence-classification from labels 0, 1 in column 'label'", [1, 0, 1]),
        (["0.5", "2", " 1", "inf"], "--task regression from labels 0.5, 1, 2 in column 'label'", [0.5, 2, 1]),
        (["1", "0", "1", "NA"], "--task sequence-classification from labels 0, 1 in column 'label'", [1, 0, 1]),
        (["0.5", "2", "1", "None"], "--task regression from labels 0.5, 1, 2 in column 'label'", [0.5, 2, 1]),
        (["b", " a", "b", ""], "--task sequence-classification from labels a, b in column 'label'", [1, 0, 1]),
    ],
)
def test_kind_of_task_is_inferred_from_valid_rows_and_said(labels, inferred, label_ids, tmp_path, caplog):
    caplog.set_level("INFO", "bertfast")
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\n" + "".join(f"a\t{label}\n" for label in labels))
    task = task_for(on_bad_rows="skip")
    examples = task.read(str(path), labelled=True)
    task.set_config(BertConfig(**task.label_config(examples)))
    assert f"inferred {inferred}" in caplog.messages
    examples, features = task.featurize(examples, train_tokenizer(["a b c d"], 64), 32)
    assert (features.labels["labels"].tolist(), examples.rows.numbers) == (label_ids, [1, 2, 3])


@pytest.mark.parametrize("name", PUBLISHED)
def test_benchmarks_are_recognised_by_their_columns(name, tmp_path, caplog):
    caplog.set_level("INFO", "bertfast")
    labelled, unlabelled, texts, labels = PUBLISHED[name]
    (tmp_path / "train.tsv").write_text(labelled, encoding="utf-8")
    (tmp_path / "test.tsv").write_text(unlabelled, encoding="utf-8")
    task = task_for()
    examples = task.read(str(tmp_path / "train.tsv"), labelled=True)
    assert (examples.texts, examples.labels) == (texts, labels)
    assert f"inferred --task {name} from the columns of {tmp_path / 'train.tsv'}" in caplog.messages
    assert task.metrics == task_for(name).metrics
    # Predictions need no --task either.
    test, named = (one.read(str(tmp_path / "test.tsv"), labelled=False) for one in (task_for(), task_for(name)))
    assert (test.texts, test.rows.ids) == (named.texts, ["7"])


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (["no", "-1"], r"line 3: unknown label '-1'"),
        (["", ""], "line 2: no label"),
        (["_", "no"], r"line 2: unknown label '_'"),
    ],
)
def test_test_files_without_labels_keep_all_rows_and_have_no_metrics(labels, named, tmp_path, caplog):
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\n" + "".join(f"a\t{label}\n" for label in labels))
    task = task_for()
    task.set_config(YES_OR_NO)
    examples, features = task.featurize(task.read(str(path), labelled=False), train_tokenizer(["a b c d"], 64), 32)
    assert (examples.rows.numbers, features.labels) == ([1, 2], {})
    assert task.compute_metrics(examples, features, [np.array([0.0, 1.0])] * 2) == {}
    [message] = caplog.messages
    assert "no metrics of" in message
    assert named in message


def test_no_submission_is_written_without_predictions_for_all_rows(tmp_path, caplog):
    (tmp_path / "test.tsv").write_text("index\tsentence\n7\ta\n8\n9\tb\n")
    task = task_for("sst-2", on_bad_rows="skip")
    task.set_config(YES_OR_NO)
    examples = task.read(str(tmp_path / "test.tsv"), labelled=False)
    features = task.featurize(examples, train_tokenizer(["a b c d"], 64), 32)[1]
    task.write_predictions(tmp_path, "test", examples, features, [np.array([0.0, 1.0])] * 2)
    lines = (tmp_path / "predictions_test.tsv").read_text().splitlines()
    assert [line.split("\t")[:3] for line in lines[1:]] == [["1", "7", "yes"], ["2", "", ""], ["3", "9", "yes"]]
    assert lines[2].endswith("line 3: 1 field where the header has 2")
    assert not (tmp_path / "SST-2.tsv").exists()
    assert "SST-2.tsv is not written" in caplog.text


def test_a_file_without_labels_cannot_train(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\na\t\nb\t\n")
    with pytest.raises(ValueError, match=r"line 2: no label in column 'label'"):
        task_for().read(str(path), labelled=True)
    with pytest.raises(ValueError, match="has no row with a text and a label"):
        task_for(on_bad_rows="skip").read(str(path), labelled=True)


def test_a_list_of_labels_needs_the_multi_label_task(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": ["x", "y"]}\n')
    with pytest.raises(ValueError, match=r"line 1: column 'label' holds \["):
        task_for().read(str(path), labelled=True)
    assert task_for("multi-label").read(str(path), labelled=True).labels == [["x", "y"]]


def test_lines_with_more_than_two_texts_are_bad_rows():
    task = task_for("sequence-classification", on_bad_rows="skip")
    examples = task.parse_lines(["a", "a\tb", "a\tb\tc"], 5)
    assert (examples.texts, examples.rows.numbers) == (["a", ("a", "b")], [5, 6])
    with pytest.raises(ValueError, match="line 7: 3 fields separated by tabs: give one text, or two"):
        task_for("sequence-classification").parse_lines(["a\tb\tc"], 7)
