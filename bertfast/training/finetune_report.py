"""What a finished fine-tuning run leaves next to its model: run.json, and a model card in README.md."""

from __future__ import annotations

import logging
import platform
import re
import shlex
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bertfast.data.text_files import read_json
from bertfast.models.extensions import ExtendedBertConfig
from bertfast.models.weights import is_adapter
from bertfast.runtime.atomic_write import write_atomically
from bertfast.runtime.machine import commit, processor
from bertfast.runtime.output_folder import described
from bertfast.runtime.settings import flag, given
from bertfast.tasks.task import FINETUNING_TASK
from bertfast.training.evaluate import write_results
from bertfast.training.finetune_data import data_files
from bertfast.training.finetune_folder import RUN, finetune_origin
from bertfast.training.finetune_settings import FinetuneSettings
from bertfast.training.report_plots import draw_run, report_file

logger = logging.getLogger("bertfast")

CARD = "README.md"
_MARK = "<!-- `bertfast finetune` wrote this file and may replace it. To keep changes, remove this line. -->"
_RERANKER = "reranking"
_CLASSES_LISTED = 30  # on the card
_SENTENCE_TRANSFORMERS = {  # classes of sentence-transformers, and a call
    "": ("SentenceTransformer", 'encode(["A text."]).shape'),
    _RERANKER: ("CrossEncoder", 'predict([("A query.", "A document.")])'),
}
# The end of a model class's name, and the task in the words of the Hugging Face hub.
_PIPELINES = {
    "": "sentence-similarity",
    _RERANKER: "text-ranking",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "MultipleChoice": "multiple-choice",
}
# By the end of the class's name: a line of standard input, as printf writes it.
_INPUTS = {
    "": "A text.",
    _RERANKER: r"A query.\tA document.",
    "SequenceClassification": "A text.",
    "TokenClassification": "The words of a sentence",
    "QuestionAnswering": '{"question": "What is it?", "context": "It is a text."}',
    "MultipleChoice": '{"sent1": "A text", "sent2": "that", "endings": ["ends", "goes on"]}',
}
_NOT_OF_PREDICT = {"--label-column", "--n-best"}
# Settings that the card names in other words, or not at all.
_NOT_LISTED = {"--model-name-or-path", "--train-file", "--validation-file", "--test-file", "--output-dir", "--resume"}


def write_report(
    settings: FinetuneSettings,
    model: PreTrainedModel,
    precision: str,
    metric: str,
    results: dict[str, Any],
    processes: int = 1,
) -> None:
    """Write run.json and the model card of a finished run; a README.md that bertfast did not write stays as it is.

    Args:
        settings: Settings of the run.
        model: Its model.
        precision: Precision that it ran in.
        metric: Metric that selected the best model.
        results: The content of all_results.json.
        processes: Number of processes that it ran in.
    """
    folder = Path(settings.output_dir)
    run = described(folder, finetune_origin(settings, "finetune"))
    run |= {
        "settings": settings.flat(),
        "commit": commit(),
        "device": _device_name(model.device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "precision": precision,
        "metric_for_best_model": metric,
        "results": results,
    }
    write_results(folder / RUN, run)
    card = folder / CARD
    if card.exists() and _MARK not in card.read_text(encoding="utf-8", errors="replace"):
        logger.info("%s is kept as it is: bertfast did not write it", card)
        return
    write_atomically(card, _card(settings, model, run))


def draw_finished_run(folder: Path) -> None:
    """Draw the plots of a finished run from the files in its folder."""
    if not (folder / RUN).exists():  # an earlier version finished the run
        return
    run = read_json(folder / RUN)
    title = f"{folder.resolve().name} ({run.get('device')}, {run.get('precision')})"
    draw_run(folder, title, str(run.get("metric_for_best_model")))


def how_to_use(settings: FinetuneSettings) -> str:
    """Return where the model of a run is, and a command that predicts with it."""
    file = list(data_files(settings).values())[-1]
    words = ["bertfast", "predict", "--model-name-or-path", settings.output_dir, "--input-file", file]
    words += _flags_of_predictions(settings)
    return f"The best model is in {settings.output_dir}. To predict with it: {shlex.join(words)}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def _card(settings: FinetuneSettings, model: PreTrainedModel, run: dict[str, Any]) -> str:
    """Return the model card, in Markdown with the entries that the Hugging Face hub reads."""
    folder, head = Path(settings.output_dir).resolve().name, type(model).__name__.partition("For")[2]
    head = _RERANKER if getattr(model.config, FINETUNING_TASK, None) == _RERANKER else head
    source = settings.model_name_or_path
    is_local, extended = Path(source).exists(), isinstance(model.config, ExtendedBertConfig)
    adapted = is_adapter(Path(settings.output_dir))
    library = "peft" if adapted else "sentence-transformers" if head in _SENTENCE_TRANSFORMERS else "transformers"
    entries = [f"library_name: {library}", f"pipeline_tag: {_PIPELINES[head]}"]
    entries += [] if is_local else [f"base_model: {source}"]
    usage = _usage_of_adapter(folder, head) if adapted else _usage(folder, head, extended=extended)
    start = "its configuration with random weights" if settings.model.random_init else "the model"
    lines = ["---", *entries, "tags:", "- bertfast", "---", "", _MARK, "", f"# {_plain(folder)}", ""]
    lines += [
        f"A {type(model).__name__}, fine-tuned from {start} `{_plain(Path(source).name if is_local else source)}` with "
        f"bertfast {run['versions']['bertfast']} for {_PIPELINES[head]}.",
        "",
        *_results(run["results"]),
        *_classes(Path(settings.output_dir)),
        *_use(settings, folder, head),
        *usage,
        *_training(settings, run),
    ]
    return "\n".join(lines) + "\n"


def _results(results: dict[str, Any]) -> list[str]:
    rows = [(*name.split("_", 1), value) for name, value in results.items() if name.startswith(("eval_", "test_"))]
    if not rows:
        return []
    splits = {"eval": "validation", "test": "test"}
    table = [f"| {splits[split]} | {name} | {value:.4g} |" for split, name, value in rows]
    return ["## Results", "", "| data | metric | value |", "|---|---|---|", *table, ""]


def _classes(folder: Path) -> list[str]:
    """Return the scores of each type of entity, or else of each class, in the validation data."""
    file = folder / report_file("validation")
    report = read_json(file) if file.exists() else {}
    kind = "entities" if "entities" in report else "classes"
    scores = report.get(kind, {})
    if not 0 < len(scores) <= _CLASSES_LISTED:
        return []
    rows = [
        f"| {_plain(name)} | {row['precision']:.4g} | {row['recall']:.4g} | {row['f1']:.4g} | {row['examples']} |"
        for name, row in scores.items()
    ]
    title = "entity" if kind == "entities" else "label"
    return [f"| {title} | precision | recall | F1 | examples |", "|---|---|---|---|---|", *rows, ""]


def _usage(folder: str, head: str, *, extended: bool) -> list[str]:
    """Return how to use a model from Python."""
    if extended:
        return ["The model has parts that transformers does not have: only bertfast opens it.", ""]
    if head in _SENTENCE_TRANSFORMERS:
        return _usage_in_sentence_transformers(folder, head)
    code = [
        f"from transformers import AutoModelFor{head}, AutoTokenizer",
        "",
        f"model = AutoModelFor{head}.from_pretrained({folder!r})",
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})",
    ]
    return [*_python(code), f"`bertfast.AutoModelFor{head}` opens it with fast kernels.", ""]


def _usage_in_sentence_transformers(folder: str, head: str) -> list[str]:
    name, call = _SENTENCE_TRANSFORMERS[head]
    return _python(
        [f"from sentence_transformers import {name}", "", f"model = {name}({folder!r})", f"print(model.{call})"]
    )


def _usage_of_adapter(folder: str, head: str) -> list[str]:
    """Return how to use an adapter, which has the head if there is one, from Python."""
    name = f"AutoModelFor{'SequenceClassification' if head == _RERANKER else head}" if head else "AutoModel"
    config, options = [], ""
    if head == _RERANKER:
        options = ", num_labels=1, ignore_mismatched_sizes=True"
    elif head:
        config, options = ["AutoConfig"], f", config=AutoConfig.from_pretrained({folder!r})"
    code = [
        "from peft import PeftConfig, PeftModel",
        f"from transformers import {', '.join([*config, name, 'AutoTokenizer'])}",
        "",
        f"base = PeftConfig.from_pretrained({folder!r}).base_model_name_or_path",
        f"model = {name}.from_pretrained(base{options})",
        f"model = PeftModel.from_pretrained(model, {folder!r})",
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})",
    ]
    lines = ["It is a LoRA adapter: the weights of its base model are not in this folder.", ""]
    if head in _SENTENCE_TRANSFORMERS:
        version = " 6" * (head == _RERANKER)  # earlier ones look for a config.json
        lines += [f"sentence-transformers{version} opens it if peft is installed:", ""]
        lines += [*_usage_in_sentence_transformers(folder, head), "Without sentence-transformers:", ""]
    return [*lines, *_python(code)]


def _python(code: list[str]) -> list[str]:
    return ["```python", *code, "```", ""]


def _use(settings: FinetuneSettings, folder: str, head: str) -> list[str]:
    """Return a command that uses a model on a text, next to its folder, and what is added to use it on a file."""
    model, text = f"--model-name-or-path {shlex.quote(folder)}", _INPUTS[head]
    if not head:
        command, on_file = f"bertfast embed {model} --output-dir vectors", ["--input-file", "FILE"]
    else:
        options = _flags_of_predictions(settings, columns=False)
        command = " ".join(["bertfast predict", model, *map(shlex.quote, options)])
        on_file = ["--input-file", "FILE", *_flags_of_predictions(settings)[len(options) :]]
    lines = ["## Use", "", "```", f"printf '{text}\\n' | {command}", "```", ""]
    return [*lines, f"Add `{_plain(shlex.join(on_file))}` for the rows of a file.", ""]


def _training(settings: FinetuneSettings, run: dict[str, Any]) -> list[str]:
    files = [
        f"| {name} | `{_plain(Path(file['path']).name)}`, SHA-256 {file['sha256'][:16] or 'unknown'} |"
        for name in map(flag, ("train_file", "validation_file", "test_file"))
        for file in run["inputs"].get(name, [])
    ]
    listed = [f"| {name} | {_plain(value)} |" for name, value in _listed(settings).items()]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return [
        "## Training",
        "",
        f"On {run['results']['train_samples']:,} examples, in {run['precision']} on {run['device']}, with {versions}. "
        f"All settings are in `{RUN}`.",
        "",
        "| setting | value |",
        "|---|---|",
        *files,
        *listed,
    ]


def _listed(settings: FinetuneSettings) -> dict[str, str]:
    """Return the values, as text, of the hyperparameters and of the settings that were given, by flag.

    What had no effect is left out: values that are not given, and the number of epochs of a run whose length is set in
    steps.
    """
    values = {flag(name): value for name, value in settings.flat().items()}
    names = [*map(flag, settings.hyperparameters.flat()), *given(settings)]
    unused = {*_NOT_LISTED, *["--num-train-epochs"] * (settings.hyperparameters.max_steps is not None)}
    return {
        name: " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name in dict.fromkeys(names)
        if (value := values[name]) is not None and name not in unused
    }


def _flags_of_predictions(settings: FinetuneSettings, *, columns: bool = True) -> list[str]:
    """Return the flags of `bertfast predict`, with their values, with which it predicts as the run did.

    Args:
        settings: Settings of the run.
        columns: Whether to add those with which it reads a file.
    """
    names = ["--max-seq-length"] * (settings.max_seq_length is not None) + given(settings.question_answering)
    names += given(settings.columns) if columns else []
    values = {flag(name): str(value) for name, value in settings.flat().items()}
    return [word for name in names if name not in _NOT_OF_PREDICT for word in (name, values[name])]


def _plain(text: str) -> str:
    """Return a text in which nothing is Markdown."""
    return re.sub(r"[|`<>\r\n]", " ", text)
