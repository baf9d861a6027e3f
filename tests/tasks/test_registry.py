"""The choice of a task."""

import json

import pytest

from bertfast.tasks.multiple_choice import MultipleChoiceTask
from bertfast.tasks.question_answering import QuestionAnsweringTask
from bertfast.tasks.registry import choose_task
from bertfast.tasks.reranking import RerankingTask
from bertfast.tasks.sequence_classification import SequenceClassificationTask
from bertfast.tasks.settings import TaskSettings


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("sst-2", {"doc_stride": 4}, "--doc-stride would have no effect: the task is sst-2"),
        ("squad", {"tag_column": 1}, "--tag-column would have no effect: the task is squad"),
        (
            "conll",
            {"n_best": 2, "label_column": "a"},
            "--label-column and --n-best would have no effect",
        ),
        ("multiple-choice", {"text_column": "a"}, "--text-column would have no effect: the task is multiple-choice"),
    ],
)
def test_flags_of_other_tasks_are_refused(task, flags, message):
    with pytest.raises(ValueError, match=message):
        choose_task(TaskSettings.of(model_name_or_path="model", task=task, **flags))


@pytest.mark.parametrize(
    ("task", "flags"),
    [("sst-2", {"text_column": "a"}), ("squad", {"doc_stride": 4}), ("conll", {"tag_column": 1}), ("swag", {})],
)
def test_flags_of_the_task_are_accepted(task, flags):
    choose_task(TaskSettings.of(model_name_or_path="model", task=task, on_bad_rows="skip", **flags))


def test_the_inferred_task_is_named():
    settings = TaskSettings.of(model_name_or_path="model", doc_stride=4)
    with pytest.raises(ValueError, match="--doc-stride would have no effect: the task is token-classification"):
        choose_task(settings, file="train.conll")


@pytest.mark.parametrize(
    ("names", "task"),
    [
        (("context", "question", "choices", "label"), MultipleChoiceTask),
        (("sent1", "ending0", "ending1", "label"), MultipleChoiceTask),
        (("context", "question", "answers"), QuestionAnsweringTask),
        (("context", "question", "choices", "answers"), QuestionAnsweringTask),
        (("data", "version"), QuestionAnsweringTask),
        (("text", "stars"), SequenceClassificationTask),
        (("review", "label"), SequenceClassificationTask),
        (("question", "sentence", "label"), SequenceClassificationTask),
        (("query", "document", "label"), RerankingTask),
        (("query", "passage", "score"), RerankingTask),
        (("query", "docs", "labels"), RerankingTask),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_the_names_in_the_first_object_that_can_be_read_tell_the_task(suffix, names, task, tmp_path):
    path, rows = tmp_path / f"a{suffix}", ["3", json.dumps(dict.fromkeys(names, "x"))]
    path.write_text(f"[{', '.join(rows)}]" if suffix == ".json" else "\n".join(rows))
    assert type(choose_task(TaskSettings.of(model_name_or_path="model"), file=str(path))) is task


def test_a_table_of_queries_documents_and_labels_trains_rerankers(tmp_path):
    (tmp_path / "a.tsv").write_text("query\tdocument\tlabel\nq\td\t1\n")
    assert type(choose_task(TaskSettings.of(model_name_or_path="model"), file=str(tmp_path / "a.tsv"))) is RerankingTask


@pytest.mark.parametrize("names", [("query", "positive"), ("query", "pos", "neg"), ("query", "positive", "label")])
def test_queries_and_positives_fit_two_tasks(names, tmp_path):
    (tmp_path / "a.tsv").write_text("\t".join(names) + "\n")
    (tmp_path / "a.jsonl").write_text(json.dumps(dict.fromkeys(names, "x")) + "\n")
    for file in ("a.tsv", "a.jsonl"):
        with pytest.raises(
            ValueError, match=r"queries and their positives, .*: add --task embedding or --task reranki"
        ):
            choose_task(TaskSettings.of(model_name_or_path="model"), file=str(tmp_path / file))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_a_file_that_fits_no_task_is_refused_with_the_columns_that_are_needed(name, tmp_path):
    path = tmp_path / name
    path.write_text('{"review": "good", "stars": 3}')
    needed = "a.json.* fits no task, as its objects hold 'review', 'stars': classification needs sentence or .* label;"
    with pytest.raises(
        ValueError, match=f"{needed} multiple choice sent1, .*question answering question, context.*reranking query, d"
    ):
        choose_task(TaskSettings.of(model_name_or_path="model"), file=str(path))
    settings = TaskSettings.of(model_name_or_path="model", text_column="review", label_column="stars")
    assert isinstance(choose_task(settings, file=str(path)), SequenceClassificationTask)


@pytest.mark.parametrize(
    ("name", "text", "task"),
    [
        ("a.conll", "the O\nfilm B-X\n", "token-classification"),
        ("a.csv", "sent1,ending0,ending1,label\na,b,c,0\n", "multiple-choice"),
        ("a.json", '{\n "data": []\n}\n', "question-answering"),
    ],
)
def test_the_task_that_a_file_looks_like_is_reported(name, text, task, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / name).write_text(text)
    choose_task(TaskSettings.of(model_name_or_path="model"), file=str(tmp_path / name))
    assert [record.getMessage() for record in caplog.records] == [f"inferred --task {task} from {tmp_path / name}"]


def test_one_object_on_several_lines_is_not_taken_for_squad(tmp_path):
    (tmp_path / "a.json").write_text('{\n "sentence": "a",\n "label": "b"\n}\n')
    with pytest.raises(
        ValueError, match=r"one object on several lines, with 'label', 'sentence': write each object on"
    ):
        choose_task(TaskSettings.of(model_name_or_path="model"), file=str(tmp_path / "a.json"))
