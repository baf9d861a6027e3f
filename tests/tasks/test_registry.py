"""The choice of a task."""

import pytest

from bertfast.tasks.registry import choose_task
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
