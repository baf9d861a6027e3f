"""Multiple choice: SWAG's files, and JSON lines."""

import json

import numpy as np
import pytest

from bertfast import BertConfig
from bertfast.data.tokenizer import train_tokenizer
from bertfast.tasks.multiple_choice import MultipleChoiceTask
from bertfast.tasks.registry import choose_task
from bertfast.tasks.settings import TaskSettings

HEADER = ",video-id,fold-ind,startphrase,sent1,sent2,gold-source,ending0,ending1,ending2,label"


def task_for(**settings) -> MultipleChoiceTask:
    task = MultipleChoiceTask(TaskSettings.of(model_name_or_path="model", **settings))
    task.set_config(BertConfig())
    return task


def test_swag_files_are_read_in_their_published_format(tmp_path):
    path = tmp_path / "swag.csv"
    path.write_text(f'{HEADER}\n0,v,1,"a b, c","a b,",c,gold,d,"e, f",g,2\n1,v,1,a,a b,,gold,d,e,f,0\n')
    task = task_for()
    examples = task.read(str(path), labelled=True)
    assert examples.texts == ["a b,", "a b"]
    assert examples.endings == [["c d", "c e, f", "c g"], ["d", "e", "f"]]
    assert examples.labels == [2, 0]
    tokenizer = train_tokenizer(["a b c d e f g"], 64)
    _, features = task.featurize(examples, tokenizer, 32)
    assert (len(features), features.num_choices) == (2, 3)
    batch = features.batch(np.array([1]))
    expected = [tokenizer.encode("a b", ending).ids for ending in ("d", "e", "f")]
    assert batch["input_ids"][0].tolist() == [token for ids in expected for token in ids]
    outputs = [np.array([0.0, 0.0, 3.0]), np.array([0.0, 2.0, 0.0])]
    assert task.compute_metrics(examples, features, outputs)["accuracy"] == 0.5
    predictions = list(task.predictions(examples, features, outputs))
    assert predictions[0]["ending"] == "c g"
    task.write_predictions(tmp_path, "dev", examples, features, outputs)
    assert (tmp_path / "predictions_dev.tsv").read_text().splitlines()[1].startswith("1\t2\t")


def test_json_lines_may_have_any_number_of_endings(tmp_path):
    rows = [{"sent1": "a", "endings": ["b", "c"], "label": 1}, {"sent1": "d", "endings": ["e", "f"], "label": "0"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert task_for().read(str(path), labelled=True).labels == [1, 0]
    lines = [json.dumps({name: row[name] for name in ("sent1", "endings")}) for row in rows]
    assert task_for().parse_lines(lines).endings == [["b", "c"], ["e", "f"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sent1": "a", "endings": ["b"], "label": 0}, "line 2: 1 ending where the first row has 2"),
        ({"sent1": "a", "endings": None, "label": 0}, "line 2: the endings are null or missing, not a list"),
        ({"sent1": "a", "endings": ["b", None], "label": 0}, "line 2: the endings are .*, not a list of texts"),
        ({"sent1": None, "endings": ["b", "c"], "label": 0}, "line 2: column 'sent1' is null or missing"),
        ({"sent1": "a", "sent2": 1, "endings": ["b", "c"], "label": 0}, "line 2: column 'sent2' holds 1, not a text"),
        ({"sent1": "a", "endings": ["b", "c"], "label": -1}, "line 2: the label -1 is not in 0 to 1"),
        ({"sent1": "a", "endings": ["b", "c"], "label": 2}, "line 2: the label 2 is not in 0 to 1"),
    ],
)
def test_bad_rows_are_reported_or_skipped(row, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"sent1": "a", "endings": ["b", "c"], "label": 1}) + "\n" + json.dumps(row))
    with pytest.raises(ValueError, match=message):
        task_for().read(str(path), labelled=True)
    task = task_for(on_bad_rows="skip")
    assert (len(task.read(str(path), labelled=True)), task.bad_rows.count) == (1, 1)


def test_malformed_lines_raise():
    with pytest.raises(ValueError, match="standard input, line 1: not JSON"):
        task_for().parse_lines(["a b c"])
    with pytest.raises(ValueError, match="line 1: no 'sent1' as in"):
        task_for().parse_lines(['{"text": "a"}'])


def test_codah_has_the_published_number_of_rows(shared_data):
    counts = {"train": 1665, "dev": 556, "test": 555}
    for split, count in counts.items():
        examples = task_for().read(str(shared_data / "swag" / f"codah_{split}.csv.gz"), labelled=True)
        assert (len(examples), {len(endings) for endings in examples.endings}) == (count, {4})
    assert len(task_for().read(str(shared_data / "swag" / "swag_sample.csv"), labelled=True)) == 11


@pytest.mark.parametrize(
    ("name", "text", "task_class"),
    [
        ("a.csv", HEADER, "MultipleChoiceTask"),
        ("a.jsonl", '{"sent1": "a", "endings": ["b", "c"], "label": 0}', "MultipleChoiceTask"),
        ("a.csv", "text,label\na,b", "SequenceClassificationTask"),
        ("a.jsonl", '{"text": "a", "label": 0}', "SequenceClassificationTask"),
        ("a.tsv", "text\tlabel", "SequenceClassificationTask"),
        ("a.tsv", "sent1\tending0\tending1\tlabel\n", "MultipleChoiceTask"),
        ("a.tsv", "text\tlabel of ending0\n", "SequenceClassificationTask"),
        ("a.json", '[\n {\n  "sent1": "a",\n  "endings": ["b", "c"]\n }\n]', "MultipleChoiceTask"),
        ("a.json", '{"data": [{"title": "\\"endings\\": a title"}]}', "QuestionAnsweringTask"),
        ("a.json", "{}", "QuestionAnsweringTask"),
        ("a.conll", "a\tO", "TokenClassificationTask"),
    ],
)
def test_task_is_inferred_from_the_file(name, text, task_class, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    assert type(choose_task(TaskSettings.of(model_name_or_path="model"), file=str(path))).__name__ == task_class


def test_a_conll_file_named_like_a_table_is_named_with_the_remedy(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("Ann\tB-PER\nsees\tO\n\nRome\tB-LOC\n")
    with pytest.raises(ValueError, match=r"a\.tsv looks like a CoNLL file, .*: add --task token-classification"):
        choose_task(TaskSettings.of(model_name_or_path="model"), file=str(path))
    settings = TaskSettings.of(model_name_or_path="model", task="token-classification")
    assert len(choose_task(settings, file=str(path)).read(str(path), labelled=True)) == 2


CHOICES = [{"sent1": "a", "endings": ["b", "é"], "label": 0}, {"sent1": "[c", "endings": ["d,", "]"], "label": 1}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(CHOICES),
        json.dumps(CHOICES, indent=2, ensure_ascii=False),
        json.dumps(CHOICES, indent=2).replace("\n", "\r\n"),
        "\ufeff \n" + json.dumps(CHOICES) + "\n\n",
        "\n".join(map(json.dumps, CHOICES)),  # one object per line, as the library datasets writes it
    ],
)
def test_choices_in_a_json_file_are_read(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode())
    task = choose_task(TaskSettings.of(model_name_or_path="model"), file=str(path))
    examples = task.read(str(path), labelled=True)
    assert (examples.texts, examples.endings) == (["a", "[c"], [["b", "é"], ["d,", "]"]])
    assert (examples.labels, examples.rows.numbers) == ([0, 1], [1, 2])
    assert [part.texts for part in task_for().read_chunks(str(path))] == [["a", "[c"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[\n{}\n,\n3]", r"row 2: not an object"),
        ('[{"sent1": "a", "endings": ["b"]}]', r"row 1: 1 ending; at least two"),
        ("[\n{},\n{]", r"row 2: not JSON \(Expecting property .*: line 3 column 2"),
        ("[\n{}\n{}]", r"after row 1: not JSON \(',' or the '\]' at the end of the list is missing: line 3 column 1\)"),
        ("[\n{}\n", r"after row 1: not JSON \(',' or the '\]' at the end of the list is missing: line 3"),
        ("[{}] x", r"after row 1: not JSON \(text after the end of the list: line 1 column 6"),
        ("[" * 100_000, "not JSON"),
        ("[]", "holds no rows"),
    ],
)
def test_faults_of_a_list_in_json_are_named_with_their_row(text, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json.*{message}"):
        task_for().read(str(path), labelled=False)


def test_objects_of_a_list_that_cannot_be_used_are_skipped(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([CHOICES[0], 3, {"sent1": None}, CHOICES[1]]))
    task = task_for(on_bad_rows="skip")
    assert task.read(str(path), labelled=True).rows.numbers == [1, 4]
    assert sorted(task.bad_rows.skipped[str(path)]) == [2, 3]


@pytest.mark.parametrize("names", [("context", "question", "choices"), ("sent1", "choices"), ("text", "endings")])
def test_the_columns_that_multiple_choice_needs_are_named(names, tmp_path):
    path = tmp_path / "a.json"
    row = {"context": "a", "question": "b", "sent1": "c", "text": "d", "choices": ["x", "y"], "endings": ["x", "y"]}
    path.write_text(json.dumps([{name: row[name] for name in names} | {"label": 1}]))
    task = choose_task(TaskSettings.of(model_name_or_path="model"), file=str(path))
    with pytest.raises(ValueError, match=rf"a\.json: multiple choice needs the columns sent1.*rename .*'{names[0]}'"):
        task.read(str(path), labelled=True)


def test_endings_are_numbered_from_zero(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("sent1,ending0,ending2,label\na,b,c,1\n")
    with pytest.raises(ValueError, match="no column 'ending1', only"):
        task_for().read(str(path), labelled=True)


@pytest.mark.parametrize("labels", [(-1, -1), (0, -1), (0, ""), (None, 1)])
def test_test_files_without_labels_keep_all_rows(labels, tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    rows = [{"sent1": "a", "endings": ["b", "c"], "label": label} for label in labels]
    path.write_text("\n".join(map(json.dumps, rows)))
    examples = task_for().read(str(path), labelled=False)
    assert (examples.rows.numbers, examples.labels) == ([1, 2], None)
    assert "no metrics of" in caplog.text
    assert [part.rows.numbers for part in task_for().read_chunks(str(path))] == [[1, 2]]


def test_labels_may_be_written_as_decimals(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("sent1,ending0,ending1,label\na,b,c,1.0\na,b,c, 0\n")
    assert task_for().read(str(path), labelled=True).labels == [1, 0]


def test_a_label_of_thousands_of_digits_is_a_bad_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"sent1,ending0,ending1,label\na,b,c,{'1' * 5000}\n")
    with pytest.raises(ValueError, match=r"line 2: the label '1{50,60}.* is not in 0 to 1"):
        task_for().read(str(path), labelled=True)
