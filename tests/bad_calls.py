"""Calls of the commands with generated bad inputs, and what they may print."""

import io
import linecache
import os
import random
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import get_args, get_origin

from bad_inputs import GOOD, write_files, write_yaml
from bad_models import write_checkpoints, write_models

import bertfast
from bench.harness import time_limit
from bertfast.cli.errors import is_out_of_memory
from bertfast.cli.main import COMMANDS, main
from bertfast.runtime.atomic_write import remove
from bertfast.runtime.settings import Setting, flag, range_of, settings_of
from bertfast.tasks.registry import TASKS

SECONDS = 60  # after which a call is taken to hang
PACKAGE = str(Path(bertfast.__file__).parent)
LENGTHS = ("max_steps", "num_train_epochs", "minutes", "epochs", "seconds", "seeds", "batch_sizes", "learning_rates")
_MIX = [
    *COMMANDS,
    *(command for command in COMMANDS if command not in ("demo", "reproduce", "doctor", "import")),
    "predict",
]
TINY = "num_hidden_layers=1,hidden_size=32,num_attention_heads=2,intermediate_size=32,max_position_embeddings=24"

BAD_TEXTS = {  # by setting: values that only look right
    "config_overrides": [
        *("hidden_size=33", "num_hidden_layers=0", "hidden_act=x", "layer_norm_eps=nan", "pad_token_id=1000000"),
        *("hidden_size=-64", "initializer_range=-1", "vocab_size=3", "=", ",", "hidden_size", "model_type=gpt2"),
    ],
    "task": [*TASKS, "x", ""],
    "to": ["x", ""],  # an export that starts takes long
}


@dataclass(frozen=True)
class Inputs:
    """Names of the inputs in a folder, by kind."""

    folder: Path
    files: dict[str, list[str]]
    models: list[str]
    configs: list[str]
    checkpoints: list[str]

    @classmethod
    def write(cls, folder: Path) -> "Inputs":
        return cls(folder, write_files(folder), write_models(folder), write_yaml(folder), write_checkpoints(folder))


@dataclass(frozen=True)
class Call:
    """A command line, and the file that is its standard input."""

    arguments: list[str]
    standard_input: str | None

    def __str__(self) -> str:
        end = "" if self.standard_input is None else f" < {self.standard_input}"
        return shlex.join(["bertfast", *self.arguments]) + end


class Generator:
    """Calls of all commands with bad inputs; the same seed and index give the same call.

    Args:
        inputs: Names of the inputs.
    """

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.random = random.Random()
        self.standard_input: str | None = None
        self.damage = 0.0

    def call(self, index: int) -> Call:
        """Return call `index`: intact arguments of a command, of which one to three are replaced by bad ones."""
        self.random.seed(index)
        self.standard_input = None
        self.damage = self.random.choice([0.2, 1])
        command = self.random.choice(_MIX)
        values = self._arguments(command)
        settings = settings_of(
            getattr(import_module(f"bertfast.{COMMANDS[command].module}"), COMMANDS[command].settings)
        )
        if self.random.random() < 0.4:
            for _ in range(self.random.randint(1, 2)):
                name, value = self._bad_setting(settings)
                if (command, name) != ("demo", "output_dir"):  # a demo that starts takes minutes
                    values[name] = value
        if self.random.random() < 0.05 and command != "demo":
            # Without a text, the docstrings of all packages are gathered, which takes long.
            values.pop(self.random.choice([name for name in values if name != "train_file"]))
        arguments = [part for name, value in values.items() for part in self._parts(name, value)]
        if self.random.random() < 0.05:
            arguments += ["--config", self.random.choice(self.inputs.configs)]
        if self.random.random() < 0.02:
            arguments.insert(
                self.random.randrange(len(arguments) + 1), self.random.choice(["--", "--wrong", "-x", "é"])
            )
        return Call([command, *arguments], self.standard_input)

    def _parts(self, name: str, value: object) -> list[str]:
        if name.startswith("<"):  # an argument without a flag
            return [str(value)]
        if value is True or value is False:
            return [flag(name) if value else flag(f"no_{name}")]
        return [flag(name), *map(str, value if isinstance(value, list) else [value])]

    def _file(self, *forms: str, or_standard_input: bool = False) -> str:
        """Return a file: the intact one, or a damaged one, mostly of one of the forms, sometimes of another."""
        form = self.random.choice(forms if self.random.random() < 0.8 else list(self.inputs.files))
        name = self.random.choice(self.inputs.files[form])
        if self.random.random() >= self.damage and forms[0] in GOOD:
            name = f"{forms[0]}_good{GOOD[forms[0]][0]}"
        if or_standard_input and self.random.random() < 0.3 and os.path.isfile(self.inputs.folder / name):
            self.standard_input = name
            return "-"
        return name

    def _model(self, kind: str = "model") -> str:
        """Return a model: an intact one of a kind, or any model."""
        return (
            kind
            if self.random.random() < 1 - self.damage / 2
            else self.random.choice([*self.inputs.models, *self.inputs.files["path"]])
        )

    def _output(self) -> str:
        return "text_good.txt" if self.random.random() < self.damage / 4 else "out"

    def _labelled(self) -> tuple[str, dict[str, object], dict[str, object]]:
        """Return the format of a task's files, a model with its task, and the files of a run."""
        task, form, kind = self.random.choice(
            [
                ("auto", "tsv", "BertForSequenceClassification"),
                ("sequence-classification", "csv", "BertForSequenceClassification"),
                ("auto", "jsonl", "model"),
                ("multi-label", "jsonl", "model"),
                ("regression", "tsv", "model"),
                ("question-answering", "squad", "BertForQuestionAnswering"),
                ("auto", "squad", "BertForQuestionAnswering"),
                ("token-classification", "conll", "BertForTokenClassification"),
                ("multiple-choice", "choices", "BertForMultipleChoice"),
                ("mnli", "tsv", "model"),
            ]
        )
        labelled: dict[str, object] = {"model_name_or_path": self._model(kind), "task": task}
        if self.random.random() < 0.4:
            labelled["on_bad_rows"] = "skip"
        run: dict[str, object] = {"train_file": self._file(form), "output_dir": "out", "device": "cpu"}
        if self.random.random() < 0.5:
            run["validation_file"] = self._file(form)
        if self.random.random() < 0.5:
            run["test_file"] = self._file(form)
        return form, labelled, run

    def _corpus(self) -> dict[str, object]:
        """Return the text and the vocabulary of a corpus."""
        corpus: dict[str, object] = {
            "output_dir": "out",
            "train_file": [
                self._file("text", "path", or_standard_input=True) for _ in range(self.random.randint(1, 2))
            ],
            "vocab_size": 128,
            "processes": 1,
        }
        if self.random.random() < 0.3:
            corpus["tokenizer_name"] = self._model()
            del corpus["vocab_size"]
        if self.random.random() < 0.2:
            corpus["validation_file"] = [self._file("text", "path")]
        return corpus

    def _arguments(self, command: str) -> dict[str, object]:
        """Return valid arguments of a command, except that each file and model may be bad."""
        form, labelled, run = self._labelled()
        corpus = self._corpus()
        device: dict[str, object] = {"device": "cpu"}
        arguments: dict[str, Callable[[], dict[str, object]]] = {
            "demo": lambda: {"output_dir": "text_good.txt", "minutes": 0.001},
            "prepare": lambda: corpus,
            "pretrain": lambda: (
                corpus
                | {"max_steps": 1, "tokens_per_batch": 128, "max_seq_length": 16, "config_overrides": TINY}
                | (device if self.random.random() < 0.5 else device | {"init_from": self._model()})
            ),
            "finetune": lambda: labelled | run | {"num_train_epochs": 0.2},
            "evaluate": lambda: (
                labelled
                | device
                | {
                    "validation_file": self._file(form, "text"),
                    "objective": self.random.choice(["task", "task", "mlm"]),
                }
            ),
            "predict": lambda: labelled | device | {"input_file": self._file(form, or_standard_input=True)},
            "sweep": lambda: (
                labelled
                | run
                | {"epochs": [0.2], "batch_sizes": [8], "learning_rates": [1e-4], "validation_file": self._file(form)}
            ),
            "reproduce": lambda: {
                "table": self.random.randint(1, 8),
                "data": self._file("path"),
                "output_dir": "out",
                "minutes": 0.001,
            },
            **self._of_one_model(device),
        }
        return arguments[command]()

    def _of_one_model(self, device: dict[str, object]) -> dict[str, Callable[[], dict[str, object]]]:
        """Return what makes the arguments of commands on one model or checkpoint, and of `doctor`."""
        return {
            "embed": lambda: {
                "model_name_or_path": self._model(),
                "output_dir": "out",
                "input_file": self._file("text", "tsv", "csv", "jsonl", or_standard_input=True),
                **device,
            },
            "fill-mask": lambda: {
                "<model>": self._model("BertForPreTraining"),
                "<text>": self.random.choice(
                    ["the [MASK] film", "the film", "", "[MASK]" * 40, "\udc80 [MASK]", "[MASK]\0"]
                ),
            },
            "import": lambda: {
                "<checkpoint>": self.random.choice(
                    [*self.inputs.checkpoints, self._model(), self._file("path"), "model/model.safetensors"]
                ),
                "<output>": self._output(),
                "bert_config": self.random.choice(["checkpoint/bert_config.json", self._file("path", "squad")]),
            },
            "export": lambda: {"<model>": self._model(), "<output>": self._output()},
            "verify": lambda: {
                "<model>": self._model(),
                "input_file": self._file("text", or_standard_input=True),
                "texts": 4,
                **device,
            },
            "bench": lambda: {
                "<model>": self._model(),
                "input_file": self._file("text", or_standard_input=True),
                "texts": 1,
                "seconds": 0.1,
                **device,
            },
            "doctor": lambda: {"device": self.random.choice(["cpu", "cuda:99", "", "gpu", "cpu:x"])},
        }

    def _bad_setting(self, settings: dict[str, Setting]) -> tuple[str, object]:
        """Return a setting with a value that is out of its range or meaningless."""
        setting = settings[self.random.choice(list(settings))]
        if setting.name in BAD_TEXTS:
            return setting.name, self.random.choice(BAD_TEXTS[setting.name])
        if range_of(setting.hint) is not None:
            values = ["-1", "0", "nan", "inf", "-inf", "1e400", "x", "", "1.5", "-5", "1e-320", "٣", "0x10"]
            if setting.name not in (*LENGTHS, "dataloader_num_workers"):
                values += ["1000000000", str(2**70)]
            return setting.name, self.random.choice(values)
        hint = str(setting.hint)
        if "bool" in hint and "Literal" not in hint:
            return setting.name, self.random.choice([True, False, "1"])
        if get_origin(setting.hint) is not None and "Literal" in hint and self.random.random() < 0.5:
            return setting.name, self.random.choice(
                [*filter(lambda x: isinstance(x, str), get_args(setting.hint)), "x"]
            )
        values = ["", "x", "-", "a/b", "\udc80", "x" * 300, "a b", "label", "cuda", "é"]
        return setting.name, self.random.choice(values)


class _ErrorStream(io.StringIO):
    """Standard error that notes the exception which is being handled when something is written to it."""

    error: BaseException | None = None

    def write(self, text: str) -> int:
        if text.startswith("bertfast "):
            self.error = self.error or sys.exception()
        return super().write(text)


def fault_of(call: Call, inputs: Inputs, folder: Path) -> str | None:
    """Run a call in a folder that links to the inputs; return what is wrong with how it ended, or None.

    The folder is made if it does not exist. What the call writes there is removed.
    """
    links = {folder / path.name: path for path in inputs.folder.iterdir()}
    if not folder.exists():
        folder.mkdir()
        for link, path in links.items():
            link.symlink_to(path)
    content = b"" if call.standard_input is None else (inputs.folder / call.standard_input).read_bytes()
    err, out = _ErrorStream(), io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    limit = time_limit(SECONDS, RuntimeError)  # a TimeoutError would be taken for one of the user's errors
    try:
        with _in_folder(folder), _standard_input(content), redirect_stderr(err), redirect_stdout(out), limit:
            status: object = main(call.arguments)
    except SystemExit as stop:
        status = stop.code
    except BaseException as error:
        return "".join(traceback.format_exception(error))
    finally:
        for written in folder.iterdir():
            if written not in links:
                remove(written)
    return _fault(status, err, out)


def _fault(status: object, err: _ErrorStream, out: io.TextIOWrapper) -> str | None:
    text = err.getvalue()
    sentences = re.findall(r"^bertfast(?: \S+)?: .*", text, re.MULTILINE)
    out.flush()
    printed = out.buffer.getvalue().decode()  # type: ignore[attr-defined]
    if status not in (0, 1, 2):
        return f"exit code {status}"
    if "Traceback (most recent call last)" in text + printed:
        return f"a traceback is printed:\n{text}"
    if len(sentences) > 1 or (status == 1) != bool(sentences):
        return f"exit code {status} with {len(sentences)} error sentences:\n{text}"
    if sentences and not text.rstrip().endswith(sentences[0].rstrip()):
        return f"the error has more than one line:\n{text}"
    if isinstance(err.error, Exception) and not (is_out_of_memory(err.error) or is_deliberate(err.error)):
        return "an error that was not worded for users:\n" + "".join(traceback.format_exception(err.error))
    return None


def is_deliberate(error: BaseException) -> bool:
    """Return whether an error was raised by a `raise` statement of this package, or by the system about a path."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if last.filename.startswith(PACKAGE):
        lines = linecache.getlines(last.filename)
        if last.lineno and lines[last.lineno - 1].lstrip().startswith("raise "):
            return True
    return isinstance(error, OSError) and error.filename is not None and error.strerror is not None


@contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _standard_input(content: bytes) -> Iterator[None]:
    before = sys.stdin
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO(content)), encoding="utf-8")  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.stdin = before
