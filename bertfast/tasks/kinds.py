"""Which kind of task it is: by its name, by what its file looks like, or by the model that was trained for it."""

from __future__ import annotations

from pathlib import Path

from bertfast.config import BertConfig
from bertfast.tasks.choices import ChoiceTask
from bertfast.tasks.glue import BENCHMARKS
from bertfast.tasks.sentences import PROBLEMS, SentenceTask
from bertfast.tasks.spans import SpanTask
from bertfast.tasks.tags import TagTask
from bertfast.tasks.task import Task, TaskSettings

KINDS: dict[str, type[Task]] = {
    **dict.fromkeys([*PROBLEMS, *BENCHMARKS], SentenceTask),
    **dict.fromkeys(["choices", "swag"], ChoiceTask),
    **dict.fromkeys(["answers", "squad", "squad-2"], SpanTask),
    **dict.fromkeys(["tags", "conll", "wnut"], TagTask),
}
_BY_SUFFIX = {".json": SpanTask, ".conll": TagTask, ".iob": TagTask, ".bio": TagTask, ".csv": ChoiceTask}


def choose_task(settings: TaskSettings, *, file: str | None = None, config: BertConfig | None = None) -> Task:
    """The task that `settings` name; else that of the model in `config`, else the one that `file` looks like."""
    if settings.task != "auto":
        if settings.task not in KINDS:
            raise ValueError(f"there is no task {settings.task!r}; there are auto, {', '.join(KINDS)}")
        return KINDS[settings.task](settings)
    for kind in (SentenceTask, ChoiceTask, SpanTask, TagTask) if config is not None else ():
        for model in filter(None, (kind.model, kind.of_features)):
            if model.__name__ in config.extra.get("architectures", []):
                task = kind(settings)
                task.model = model
                return task
    suffixes = Path(file).suffixes[-2:] if file is not None else []
    return next((kind for suffix, kind in _BY_SUFFIX.items() if suffix in suffixes), SentenceTask)(settings)
