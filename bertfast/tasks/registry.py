"""Tasks by name, by the class of a fine-tuned model, or by the format of a file."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import BertConfig, PreTrainedModel

from bertfast.architectures import BERT
from bertfast.data.text_files import read_lines
from bertfast.models.families import architecture_of, class_like, has_class_like
from bertfast.runtime.settings import given, refuse_without_effect
from bertfast.tasks.conll import is_tagged
from bertfast.tasks.glue import BENCHMARKS
from bertfast.tasks.labels import PROBLEM_TYPES
from bertfast.tasks.multiple_choice import MultipleChoiceTask
from bertfast.tasks.question_answering import QuestionAnsweringTask
from bertfast.tasks.sequence_classification import SequenceClassificationTask
from bertfast.tasks.settings import TaskSettings
from bertfast.tasks.task import Task
from bertfast.tasks.token_classification import TokenClassificationTask

_LINES = 20  # of a .json or .jsonl file, which may be indented; the keys of its first object are in them
FINETUNING_TASK = "finetuning_task"  # entry of a model's configuration, as in transformers' example scripts

TASKS: dict[str, type[Task[Any]]] = {
    **dict.fromkeys([*PROBLEM_TYPES, *BENCHMARKS], SequenceClassificationTask),
    **dict.fromkeys(["multiple-choice", "swag"], MultipleChoiceTask),
    **dict.fromkeys(["question-answering", "squad", "squad-2"], QuestionAnsweringTask),
    **dict.fromkeys(["token-classification", "conll", "wnut"], TokenClassificationTask),
}
_TASK_CLASSES = (SequenceClassificationTask, MultipleChoiceTask, QuestionAnsweringTask, TokenClassificationTask)
_BY_SUFFIX: dict[str, type[Task[Any]]] = {
    ".json": QuestionAnsweringTask,
    **dict.fromkeys([".conll", ".iob", ".bio"], TokenClassificationTask),
}


def choose_task(settings: TaskSettings, *, file: str | None = None, config: BertConfig | None = None) -> Task[Any]:
    """Return the task that `settings.task` names; if that is "auto", the model's, else the one the file looks like.

    Args:
        settings: Settings of the command.
        file: A labelled file.
        config: Configuration of a fine-tuned model.

    Raises:
        ValueError: There is no task of that name, the model was fine-tuned for a task of another kind, or a flag has no
            effect on the task.
    """
    name, architectures = settings.task, [] if config is None else config.architectures or []
    task_of_model = getattr(config, FINETUNING_TASK, None)
    if name == "auto" and task_of_model in TASKS:
        name = task_of_model
    if name not in ("auto", *TASKS):
        raise ValueError(f"there is no task {name!r}; choose --task from auto, {', '.join(TASKS)}")
    of_model = next((cls for cls in _TASK_CLASSES for model in _names(cls, config) if model in architectures), None)
    task_class = TASKS.get(name) or of_model or _by_file(file)
    if of_model not in (None, task_class):
        raise ValueError(
            f"--task {name} requires a {_names(task_class, config)[0]}, but {settings.model_name_or_path} is a "
            f"{', '.join(architectures)}: leave --task out, or fine-tune a model for that task"
        )
    flags = {*given(settings.columns), *given(settings.question_answering)} - {"--on-bad-rows", *task_class.flags}
    kind = name if name in TASKS else next(known for known, other in TASKS.items() if other is task_class)
    refuse_without_effect(sorted(flags), f"the task is {kind}")
    task = task_class(replace(settings, task=name))
    models = zip(_models(task_class), _names(task_class, config), strict=False)
    task.model_class = next((model for model, known in models if known in architectures), task_class.model_class)
    return task


def _by_file(file: str | None) -> type[Task[Any]]:
    """Return the task that a file looks like; ValueError for a CoNLL file named like a table."""
    path = Path(file or "")
    suffixes = {*path.suffixes[-2:]}
    if path.is_file() and suffixes & {".tsv", ".csv", ".jsonl", ".json"}:
        if suffixes & {".tsv", ".csv"}:
            header = next((line for _, line in read_lines(path)), "")
            if re.search(r'(^|[\t,"])ending0($|[\t,"\r\n])', header):
                return MultipleChoiceTask
        else:
            start = "".join(line for _, line in islice(read_lines(path), _LINES))
            if re.search(r'"(endings|ending0)"\s*:', start):
                return MultipleChoiceTask
            if '"question"' in start and '"context"' in start:
                return QuestionAnsweringTask
            if re.search(r'"label"\s*:', start) and '"paragraphs"' not in start:
                return SequenceClassificationTask
        if ".tsv" in suffixes and is_tagged(path):
            raise ValueError(
                f"{path} looks like a CoNLL file, with one word and its tag per line and an empty line between "
                "sentences: add --task token-classification, or give the file the suffix .conll"
            )
    return next((_BY_SUFFIX[suffix] for suffix in _BY_SUFFIX if suffix in suffixes), SequenceClassificationTask)


def _names(task_class: type[Task[Any]], config: BertConfig | None) -> list[str]:
    """Return the names of a task's classes in a configuration's family."""
    first, *others = _models(task_class)
    if config is not None and architecture_of(config) is not BERT:
        return [class_like(first, config).__name__] if has_class_like(first, config) else []
    return [first.__name__, *(model.__name__ for model in others)]


def _models(task_class: type[Task[Any]]) -> list[type[PreTrainedModel]]:
    feature_based = task_class.feature_based_model
    return [task_class.model_class, *([] if feature_based is None else [feature_based])]
