"""Tasks by name, by the class of a fine-tuned model, or by the format of a file."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import BertConfig, PreTrainedModel

from bertfast.architectures import BERT
from bertfast.data.text_files import read_json, read_lines
from bertfast.models.families import architecture_of, class_like, has_class_like
from bertfast.runtime.settings import given, refuse_without_effect
from bertfast.tasks.columns import LABEL_COLUMN, TEXT_COLUMNS
from bertfast.tasks.conll import is_tagged
from bertfast.tasks.embedding import EmbeddingTask
from bertfast.tasks.glue import infer_benchmark
from bertfast.tasks.multiple_choice import CHOICE_COLUMNS, MultipleChoiceTask
from bertfast.tasks.question_answering import QuestionAnsweringTask
from bertfast.tasks.ranked_pairs import DOCUMENT_LISTS, LIST_LABELS, POSITIVES
from bertfast.tasks.ranked_pairs import NEEDED as NEEDED_BY_RERANKERS
from bertfast.tasks.records import json_records
from bertfast.tasks.reranking import RerankingTask
from bertfast.tasks.sequence_classification import SequenceClassificationTask
from bertfast.tasks.settings import (
    CLASSIFICATION_NAMES,
    MULTIPLE_CHOICE_NAMES,
    QUESTION_ANSWERING_NAMES,
    TOKEN_CLASSIFICATION_NAMES,
    ColumnSettings,
    TaskSettings,
)
from bertfast.tasks.task import FINETUNING_TASK, Task
from bertfast.tasks.text_groups import NEEDED, SCORE_COLUMNS, SECOND_COLUMNS
from bertfast.tasks.token_classification import TokenClassificationTask

_RECORDS = 20  # of a .json or .jsonl file, of which one that can be read tells the task
# Names in the objects of a .json or .jsonl file that tell the task.
_CHOICES = {"endings", "ending0", "choices"}
_SQUAD = {"data", "paragraphs", "qas"}
_GROUPS = {"anchor", "positive"}
_DOCUMENTS = {*DOCUMENT_LISTS, *SECOND_COLUMNS}
_LABELLED = {*SCORE_COLUMNS, *LIST_LABELS}
_NEEDED = (
    f"classification needs {' or '.join(TEXT_COLUMNS)}, and {LABEL_COLUMN}; multiple choice {CHOICE_COLUMNS}; question "
    f"answering question, context and answers; embeddings {NEEDED}; reranking {NEEDED_BY_RERANKERS}; token "
    "classification is read from .conll files"
)
logger = logging.getLogger("bertfast")

TASKS: dict[str, type[Task[Any]]] = {
    **dict.fromkeys(CLASSIFICATION_NAMES, SequenceClassificationTask),
    **dict.fromkeys(MULTIPLE_CHOICE_NAMES, MultipleChoiceTask),
    **dict.fromkeys(QUESTION_ANSWERING_NAMES, QuestionAnsweringTask),
    **dict.fromkeys(TOKEN_CLASSIFICATION_NAMES, TokenClassificationTask),
    "embedding": EmbeddingTask,
    "reranking": RerankingTask,
}
# Those whose models have heads, by which they are known; a model of embeddings is an encoder.
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
        ValueError: The model was fine-tuned for a task of another kind, or a flag has no
            effect on the task.
    """
    name, architectures = settings.task, [] if config is None else config.architectures or []
    task_of_model = getattr(config, FINETUNING_TASK, None)
    if name == "auto" and task_of_model in TASKS:
        name = task_of_model
    of_model = next((cls for cls in _TASK_CLASSES for model in _names(cls, config) if model in architectures), None)
    task_class = TASKS.get(name) or of_model or _by_file(file, settings.columns)
    if of_model is not None and not {*_names(task_class, config)} & {*architectures}:
        raise ValueError(
            f"--task {name} requires a {_names(task_class, config)[0]}, but {settings.model_name_or_path} is a "
            f"{', '.join(architectures)}: leave --task out, or fine-tune a model for that task"
        )
    groups = (settings.columns, settings.question_answering, settings.embedding)
    flags = {name for group in groups for name in given(group)} - {"--on-bad-rows", *task_class.flags}
    kind = name if name in TASKS else next(known for known, other in TASKS.items() if other is task_class)
    refuse_without_effect(sorted(flags), f"the task is {kind}")
    if name == "auto" and of_model is None and task_class is not SequenceClassificationTask:
        logger.info("inferred --task %s from %s", kind, file)  # that of labels is inferred from them
    task = task_class(replace(settings, task=name))
    models = zip(_models(task_class), _names(task_class, config), strict=False)
    task.model_class = next((model for model, known in models if known in architectures), task_class.model_class)
    return task


def _by_file(file: str | None, columns: ColumnSettings) -> type[Task[Any]]:
    """Return the task that a file looks like.

    Raises:
        ValueError: It is a CoNLL file named like a table, or holds JSON objects that fit no task.
    """
    path = Path(file or "")
    suffixes = {*path.suffixes[-2:]}
    if path.is_file() and suffixes & {".tsv", ".csv", ".jsonl", ".json"}:
        if suffixes & {".tsv", ".csv"}:
            header = next((line for _, line in read_lines(path)), "")
            names = {*re.split(r'[\t,"\r\n]+', header)}
            if "ending0" in names:
                return MultipleChoiceTask
            if (task := _by_pairs(path, names, columns)) is not None:
                return task
        elif names := _names_in_json(path) or _names_on_several_lines(path):
            return _by_names(path, names, columns)
        if ".tsv" in suffixes and is_tagged(path):
            raise ValueError(
                f"{path} looks like a CoNLL file, with one word and its tag per line and an empty line between "
                "sentences: add --task token-classification, or give the file the suffix .conll"
            )
    return next((_BY_SUFFIX[suffix] for suffix in _BY_SUFFIX if suffix in suffixes), SequenceClassificationTask)


def _names_in_json(path: Path) -> set[str]:
    """Return the names of values in the first object that can be read of a .jsonl or .json file; none: there is none.

    Reading the file for the task says what is wrong with it.
    """
    with suppress(ValueError):
        for record in islice(json_records(path), _RECORDS):
            if isinstance(record.values, dict) and record.values:
                return {*record.values}
    return set()


def _names_on_several_lines(path: Path) -> set[str]:
    """Return the names in a file of one object on several lines, as SQuAD's are; ValueError if it is another task's."""
    if ".json" not in path.suffixes[-2:]:
        return set()
    try:
        names = {*read_json(path)}
    except ValueError:
        return set()
    if names and not names & _SQUAD:
        raise ValueError(
            f"{path} holds one object on several lines, with {', '.join(map(repr, sorted(names)))}: write each object "
            "on one line, or a list of them, [{…}, …]"
        )
    return names


def _by_names(path: Path, names: set[str], columns: ColumnSettings) -> type[Task[Any]]:
    """Return the task that JSON objects with values of these names fit; ValueError if they fit none."""
    if names & _CHOICES and "answers" not in names:
        return MultipleChoiceTask
    if (task := _by_pairs(path, names, columns)) is not None:
        return task
    if names & _SQUAD or names >= {"question", "context"}:
        return QuestionAnsweringTask
    chosen = {columns.text_column, columns.label_column} - {None}
    if chosen or names & {*TEXT_COLUMNS, LABEL_COLUMN} or infer_benchmark(names) is not None:
        return SequenceClassificationTask
    raise ValueError(
        f"{path} fits no task, as its objects hold {', '.join(map(repr, sorted(names)))}: {_NEEDED}; rename them, name "
        "them with --text-column and --label-column, or add --task"
    )


def _by_pairs(path: Path, names: set[str], columns: ColumnSettings) -> type[Task[Any]] | None:
    """Return the task that pairs of a query and a document, or of an anchor and a positive, are for; None: neither.

    Raises:
        ValueError: They may be for both tasks.
    """
    if names >= _GROUPS:
        return EmbeddingTask
    if "query" not in names or columns.text_column is not None:
        return None
    if names & _DOCUMENTS and names & _LABELLED and not names & {*POSITIVES}:
        return RerankingTask
    if names & {*POSITIVES}:
        raise ValueError(
            f"{path} has queries and their positives, on which embeddings and rerankers are trained: add --task "
            "embedding or --task reranking"
        )
    return None


def _names(task_class: type[Task[Any]], config: BertConfig | None) -> list[str]:
    """Return the names of a task's classes in a configuration's family."""
    first, *others = _models(task_class)
    if config is not None and architecture_of(config) is not BERT:
        return [class_like(first, config).__name__] if has_class_like(first, config) else []
    return [first.__name__, *(model.__name__ for model in others)]


def _models(task_class: type[Task[Any]]) -> list[type[PreTrainedModel]]:
    feature_based = task_class.feature_based_model
    return [task_class.model_class, *([] if feature_based is None else [feature_based])]
