"""Calls of the commands with generated bad inputs."""

import os
import random
import shlex
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import get_args, get_origin

from bad_inputs import FILE_FAULTS, GOOD, write_files, write_yaml
from bad_models import write_checkpoints, write_models
from bad_states import DAMAGED, STATES, TINY, Damage, arguments_of, write_recipes

from bertfast.cli.main import COMMANDS
from bertfast.runtime.settings import Setting, range_of, settings_of
from bertfast.tasks.registry import TASKS

LENGTHS = ("max_steps", "num_train_epochs", "minutes", "epochs", "seconds", "seeds", "batch_sizes", "learning_rates")
_MIX = [*COMMANDS, *(command for command in [*COMMANDS] * 2 if command not in ("demo", "doctor")), "predict"]

BAD_TEXTS = {  # by setting: values that only look right
    "config_overrides": [
        *("hidden_size=33", "num_hidden_layers=0", "hidden_act=x", "layer_norm_eps=nan", "pad_token_id=1000000"),
        *("hidden_size=-64", "initializer_range=-1", "vocab_size=3", "=", ",", "hidden_size", "model_type=gpt2"),
    ],
    "task": [*TASKS, "x", ""],
    "to": ["x", ""],  # an export that starts takes long
}
_LABELLED = [  # task, format of its files, and class of its model
    ("auto", "tsv", "BertForSequenceClassification"),
    ("sequence-classification", "csv", "BertForSequenceClassification"),
    ("auto", "jsonl", "model"),
    ("multi-label", "jsonl", "multi_label"),
    ("regression", "tsv", "model"),
    ("question-answering", "squad", "BertForQuestionAnswering"),
    ("auto", "squad", "BertForQuestionAnswering"),
    ("token-classification", "conll", "BertForTokenClassification"),
    ("multiple-choice", "choices", "BertForMultipleChoice"),
    ("sst-2", "tsv", "model"),
    ("embedding", "tsv", "model"),
    ("reranking", "tsv", "model"),
]
# Settings without which a call takes long: docstrings are gathered, or a large model is trained.
_KEPT = ("train_file", "input_file", "seconds", "max_steps", "config_overrides", "output_dir")
# Settings by command that a call has as they are: a demo that starts takes minutes.
_FIXED = (("demo", "output_dir"), ("demo", "overwrite_output_dir"), ("doctor", "check"))
_POSITIONAL = {  # by command: settings that are arguments without a flag
    "fill-mask": ("model_name_or_path", "text"),
    "import": ("checkpoint", "output_dir"),
    "export": ("model_name_or_path", "output_dir"),
    "verify": ("model_name_or_path",),
    "bench": ("model_name_or_path",),
    "compare": ("runs",),
}


@dataclass(frozen=True)
class Inputs:
    """Names of the inputs in a folder, by kind, and the folder of what commands have written."""

    folder: Path
    states: Path
    files: dict[str, list[str]]
    models: list[str]
    configs: list[str]
    checkpoints: list[str]
    recipes: list[str]

    @classmethod
    def write(cls, folder: Path) -> "Inputs":
        return cls(
            folder,
            folder.with_name(f"{folder.name}-states"),
            write_files(folder),
            write_models(folder),
            write_yaml(folder),
            write_checkpoints(folder),
            write_recipes(folder),
        )


@dataclass(frozen=True)
class Call:
    """A command line, the file that is its standard input, and the damaged folder that it finds."""

    arguments: list[str]
    standard_input: str | None = None
    damage: Damage | None = None

    def __str__(self) -> str:
        end = "" if self.standard_input is None else f" < {self.standard_input}"
        found = "" if self.damage is None else f"  # {self.damage}"
        return shlex.join(["bertfast", *self.arguments]) + end + found


class Generator:
    """Calls of all commands with bad inputs; the same seed and index give the same call.

    Args:
        inputs: Names of the inputs.
    """

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.random = random.Random()
        self.standard_input: str | None = None
        self.damage: Damage | None = None
        self.bad_share = 0.0  # of the files

    def call(self, index: int) -> Call:
        """Return call `index`: intact arguments of a command, of which some are replaced by bad ones."""
        self.random.seed(index)
        self.standard_input = self.damage = None
        self.bad_share = self.random.choice([0.2, 1])
        command = self.random.choice(_MIX)
        values = self._again(command) if command in STATES and self._happens(0.15) else self._arguments(command)
        settings = settings_of(
            getattr(import_module(f"bertfast.{COMMANDS[command].module}"), COMMANDS[command].settings)
        )
        if self._happens(0.4):
            for _ in range(self.random.randint(1, 2)):
                name, value = self._bad_setting(settings)
                if (command, name) not in _FIXED:
                    values[name] = value
        if self._happens(0.05):
            values.pop(self.random.choice([name for name in values if name not in _KEPT]))
        # Last, as a list before them would take them in.
        positional = [str(values.pop(name)) for name in _POSITIONAL.get(command, ()) if name in values]
        arguments = [*positional, *arguments_of(values)]
        if self._happens(0.05):
            arguments += ["--config", self.random.choice(self.inputs.configs)]
        if self._happens(0.02):
            wrong = self.random.choice(["--", "--wrong", "-x", "é"])
            arguments.insert(self.random.randrange(len(arguments) + 1), wrong)
        return Call([command, *arguments], self.standard_input, self.damage)

    def _happens(self, share: float) -> bool:
        return self.random.random() < share

    def _file(self, *forms: str, or_standard_input: bool = False) -> str:
        """Return a file: the intact one, or a damaged one, mostly of one of the forms, sometimes of another."""
        form = self.random.choice(forms if self._happens(0.8) else list(self.inputs.files))
        name = self.random.choice(self.inputs.files[form])
        if not self._happens(self.bad_share) and forms[0] in GOOD:
            name = f"{forms[0]}_good{GOOD[forms[0]][0]}"
        if or_standard_input and self._happens(0.3) and os.path.isfile(self.inputs.folder / name):
            self.standard_input = name
            return "-"
        return name

    def _model(self, kind: str = "model") -> str:
        """Return a model: an intact one of a kind, or any model."""
        any_model = [*self.inputs.models, *self.inputs.files["path"]]
        return self.random.choice(any_model) if self._happens(self.bad_share / 2) else kind

    def _output(self) -> str:
        return "text_good.txt" if self._happens(self.bad_share / 4) else "out"

    def _damaged(self, command: str) -> str:
        """Return the damaged folder of a command."""
        self.damage = Damage(command, self.random.random(), self.random.choice([*FILE_FAULTS]))
        return DAMAGED

    def _again(self, command: str) -> dict[str, object]:
        """Return the arguments that wrote a folder which is now damaged."""
        values = STATES[command] | {"output_dir": self._damaged(command)}
        if command == "pretrain" and self._happens(0.7):
            values["resume"] = True
        elif self._happens(0.3):
            values["overwrite_output_dir"] = True
        return values

    def _arguments(self, command: str) -> dict[str, object]:
        """Return valid arguments of a command, except that each file and model may be bad."""
        match command:
            case "demo":
                folder = self._damaged("pretrain") if self._happens(0.5) else "text_good.txt"
                return {"output_dir": folder, "minutes": 0.001}  # both folders are refused
            case "prepare":
                return self._corpus()
            case "pretrain":
                return self._pretraining()
            case "finetune":
                form, labelled = self._labelled()
                return labelled | self._run(form) | {"num_train_epochs": 0.2}
            case "sweep":
                form, labelled = self._labelled()
                grid = {"epochs": [0.2], "batch_sizes": [8], "learning_rates": [1e-4]}
                return labelled | self._run(form) | grid | {"validation_file": self._file(form)}
            case "evaluate":
                return self._evaluation()
            case "predict":
                form, labelled = self._labelled()
                return labelled | {"input_file": self._file(form, or_standard_input=True)}
            case "reproduce":
                return {
                    "table": self.random.randint(1, 8),
                    "data": "." if self._happens(0.9) else self._file("path"),
                    "recipes": self.random.choice(self.inputs.recipes),
                    "model_name_or_path": self._model(),
                    "output_dir": "out",
                    "num_train_epochs": 0.2,
                    "device": "cpu",
                }
            case "compare":
                folder = self._damaged(self.random.choice(["pretrain", "finetune"])) if self._happens(0.8) else "out"
                return {"runs": folder}
            case "doctor":
                return {"device": self.random.choice(["cpu", "cuda:99", "", "gpu", "cpu:x"])}
            case _:
                return self._of_one_model(command)

    def _of_one_model(self, command: str) -> dict[str, object]:
        """Return the arguments of a command on one model or checkpoint."""
        if command == "import":
            checkpoints = [*self.inputs.checkpoints, self._model(), self._file("path"), "model/model.safetensors"]
            values: dict[str, object] = {"checkpoint": self.random.choice(checkpoints), "output_dir": self._output()}
            if self._happens(0.2):
                values["bert_config"] = self._file("path", "squad")
            return values
        if command == "fill-mask":
            texts = ["the [MASK] film", "the film", "", "[MASK]" * 40, "\udc80 [MASK]", "[MASK]\0"]
            return {"model_name_or_path": self._model("BertForPreTraining"), "text": self.random.choice(texts)}
        values = {"model_name_or_path": self._model()}
        if command == "export":
            return values | {"output_dir": self._output()}
        values |= {"device": "cpu"}
        if command == "embed":
            file = self._file("text", "tsv", "csv", "jsonl", or_standard_input=True)
            return values | {"input_file": file, "output_dir": self._output()}
        if command == "search":
            folder = self._damaged("embed") if self._happens(0.8) else self._file("path")
            file = self._file("text", "tsv", "csv", "jsonl", or_standard_input=True)
            return values | {"input_file": file, "embeddings_dir": folder}
        values |= {"input_file": self._file("text", or_standard_input=True)}
        return values | ({"texts": 1, "seconds": 0.1} if command == "bench" else {"texts": 4})

    def _labelled(self) -> tuple[str, dict[str, object]]:
        """Return the format of a task's files, and a model with its task."""
        task, form, kind = self.random.choice(_LABELLED)
        labelled: dict[str, object] = {"model_name_or_path": self._model(kind), "task": task, "device": "cpu"}
        if self._happens(0.4):
            labelled["on_bad_rows"] = "skip"
        return form, labelled

    def _run(self, form: str) -> dict[str, object]:
        """Return the files of a fine-tuning run."""
        run: dict[str, object] = {"train_file": self._file(form), "output_dir": "out"}
        return run | {name: self._file(form) for name in ("validation_file", "test_file") if self._happens(0.5)}

    def _evaluation(self) -> dict[str, object]:
        """Return the arguments of an evaluation on labelled rows or on text."""
        form, labelled = self._labelled()
        if self._happens(0.3):
            form, labelled = "text", {"model_name_or_path": self._model(), "objective": "mlm", "device": "cpu"}
        return labelled | {"validation_file": self._file(form)}

    def _corpus(self) -> dict[str, object]:
        """Return the text and the vocabulary of a corpus."""
        files = [self._file("text", "path", or_standard_input=True) for _ in range(self.random.randint(1, 2))]
        corpus: dict[str, object] = {"output_dir": self._output(), "train_file": files, "processes": 1}
        corpus |= {"tokenizer_name": self._model()} if self._happens(0.3) else {"vocab_size": 128}
        if self._happens(0.2):
            corpus["validation_file"] = [self._file("text", "path")]
        return corpus

    def _pretraining(self) -> dict[str, object]:
        """Return the arguments of a run on text or on shards, from random weights or from a model."""
        values = self._corpus()
        if self._happens(0.2):
            values = {"output_dir": self._output(), "data_dir": self._damaged("prepare")}
        elif self._happens(0.4):
            values |= {"init_from": self._model()}
            del values["vocab_size" if "vocab_size" in values else "tokenizer_name"]
        if "init_from" not in values:
            values["config_overrides"] = TINY
        return values | {"max_steps": 1, "tokens_per_batch": 128, "max_seq_length": 16, "device": "cpu"}

    def _bad_setting(self, settings: dict[str, Setting]) -> tuple[str, object]:
        """Return a setting with a value that is out of its range or meaningless."""
        setting = settings[self.random.choice(list(settings))]
        if setting.name in BAD_TEXTS:
            return setting.name, self.random.choice(BAD_TEXTS[setting.name])
        if range_of(setting.hint) is not None:
            values = ["-1", "0", "-5", "7", "1", "nan", "1e400", "1.5", "1e-320"]
            values += [self.random.choice(["x", "", "٣", "0x10", "-inf"])]  # that no numeric setting accepts
            if setting.name not in (*LENGTHS, "dataloader_num_workers", "processes"):
                values += ["1000000000", str(2**70)]
            return setting.name, self.random.choice(values)
        hint = str(setting.hint)
        if "bool" in hint and "Literal" not in hint:
            return setting.name, self.random.choice([True, False])
        if get_origin(setting.hint) is not None and "Literal" in hint:
            choices = [x for x in get_args(setting.hint) if isinstance(x, str)]
            return setting.name, self.random.choice([*choices, *choices, "x"])
        values = ["", "x", "-", "a/b", "\udc80", "x" * 300, "a b", "label", "cuda", "é"]
        return setting.name, self.random.choice(values)
