"""Labels and columns of sequence classification: what is a label, and rows that have none."""

import json

import pytest

from bertfast.tasks.sequence_classification import SequenceClassificationTask
from bertfast.tasks.settings import TaskSettings


def task_for(name: str = "auto", **settings) -> SequenceClassificationTask:
    return SequenceClassificationTask(TaskSettings.of(model_name_or_path="model", task=name, **settings))


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        (0, ["0"]),
        (1.0, ["1.0"]),
        ([0, "x "], ["0", "x"]),
        ("x, y", ["x", "y"]),
        ([], []),
        ("", []),
        (None, None),
        (["x", None], None),
        ({"x": 1}, None),
        ([["x"]], None),
        ("missing", None),
    ],
)
def test_multi_label_values_are_labels_or_bad_rows(value, labels, tmp_path):
    path = tmp_path / "a.jsonl"
    row = {"text": "a"} if value == "missing" else {"text": "a", "label": value}
    path.write_text('{"text": "b", "label": ["x"]}\n' + json.dumps(row) + "\n")
    if labels is not None:
        assert task_for("multi-label").read(str(path), labelled=True).labels == [["x"], labels]
        return
    with pytest.raises(ValueError, match=r"line 2: column 'label' .* a list of texts; write \[\] if no label applies"):
        task_for("multi-label").read(str(path), labelled=True)
    skipping = task_for("multi-label", on_bad_rows="skip")
    assert skipping.read(str(path), labelled=True).labels == [["x"]]
    assert skipping.bad_rows.count == 1


@pytest.mark.parametrize(("first", "late"), [("text", "sentence2"), ("text", "sentence"), ("sentence1", "sentence2")])
def test_a_text_column_that_begins_in_a_later_part_is_refused(first, late, tmp_path, monkeypatch):
    monkeypatch.setattr("bertfast.tasks.sequence_classification.ROWS_PER_CHUNK", 2)
    path = tmp_path / "a.jsonl"
    rows = [{first: "a"}] * 4 + [{first: "a", late: None}, {first: "a", late: "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=f"line 6: the text column '{late}', which the first rows lack, begins here"):
        list(task_for().read_chunks(str(path)))
    path.write_text("".join(json.dumps(row | {"other": 1}) + "\n" for row in rows[:4]))
    assert [len(part) for part in task_for().read_chunks(str(path))] == [2, 2]


@pytest.mark.parametrize("task", ["auto", "multi-label"])
def test_labels_of_thousands_of_characters_are_bad_rows(task, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"text,label\na,{'1' * 5000}\nb,{'2' * 5000}\n")
    with pytest.raises(ValueError, match=r"line 2: the label in column 'label' has 5,000 characters, more than 1,000"):
        task_for(task).read(str(path), labelled=True)


def test_objects_without_values_have_no_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n{}\n")
    with pytest.raises(ValueError, match=r"none of the columns sentence, .*, as its objects are empty: name the text"):
        task_for().read(str(tmp_path / "a.jsonl"), labelled=True)
