"""Which kind of task it is: by its name, by what its file looks like, or by the model that was trained for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import BertConfig, PreTrainedModel

from bertfast.data.corpus import read_lines
from bertfast.tasks.glue import BENCHMARKS
from bertfast.tasks.multiple_choice import ChoiceTask
from bertfast.tasks.question_answering import SpanTask
from bertfast.tasks.sequence_classification import PROBLEMS, SentenceTask
from bertfast.tasks.task import Task, TaskSettings
from bertfast.tasks.token_classification import TagTask

FINETUNING_TASK = "finetuning_task"  # a model's configuration names its task by it, as transformers' scripts did

KINDS: dict[str, type[Task]] = {
    **dict.fromkeys([*PROBLEMS, *BENCHMARKS], SentenceTask),
    **dict.fromkeys(["choices", "swag"], ChoiceTask),
    **dict.fromkeys(["answers", "squad", "squad-2"], SpanTask),
    **dict.fromkeys(["tags", "conll", "wnut"], TagTask),
}
_BY_MODEL = (SentenceTask, ChoiceTask, SpanTask, TagTask)
_BY_SUFFIX = {".json": SpanTask, ".conll": TagTask, ".iob": TagTask, ".bio": TagTask}


def choose_task(settings: TaskSettings, *, file: str | None = None, config: BertConfig | None = None) -> Task:
    """The task that `settings` name; else that of the model in `config`, else the one that `file` looks like."""
    name, trained = settings.task, [] if config is None else config.architectures or []
    known = getattr(config, FINETUNING_TASK, None)
    if name == "auto" and known in KINDS:
        name = known
    if name not in ("auto", *KINDS):
        raise ValueError(f"there is no task {name!r}; there are auto, {', '.join(KINDS)}")
    of_model = (kind for kind in _BY_MODEL for model in _models(kind) if model.__name__ in trained)
    kind = KINDS.get(name) or next(of_model, None) or _looks_like(file)
    task = kind(replace(settings, task=name))
    task.model = next((model for model in _models(kind) if model.__name__ in trained), kind.model)
    return task


def _looks_like(file: str | None) -> type[Task]:
    path = Path(file or "")
    for suffix, kind in _BY_SUFFIX.items():
        if suffix in path.suffixes[-2:]:
            return kind
    if path.is_file() and {".csv", ".jsonl"} & {*path.suffixes[-2:]}:
        first = next((line for _, line in read_lines(path)), "")
        if "ending0" in first or '"endings"' in first:
            return ChoiceTask
    return SentenceTask


def _models(kind: type[Task]) -> list[type[PreTrainedModel]]:
    return [kind.model, *([] if kind.of_features is None else [kind.of_features])]
