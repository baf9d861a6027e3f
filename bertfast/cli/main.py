"""`bertfast COMMAND …`: the flags, the YAML entries and the help of a command come from one dataclass of settings."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import tyro
import yaml

from bertfast.cli.recipes import find_config, recipe_names
from bertfast.runtime.malloc import keep_freed_memory
from bertfast.runtime.signals import RunStopped

Settings = TypeVar("Settings")


class Command(NamedTuple):
    """Where a command is implemented; it is imported only when it runs.

    Attributes:
        module: Module below `bertfast`.
        settings: Name of the dataclass of its settings.
        function: Name of the function that takes the settings; if it returns an int, that is the exit status.
        summary: What the command does, for `bertfast --help`.
    """

    module: str
    settings: str
    function: str
    summary: str


COMMANDS = {
    "demo": Command(
        "cli.demo", "DemoSettings", "demo", "Pre-train, fine-tune and query a small BERT in a few minutes."
    ),
    "prepare": Command("data.prepare", "PrepareSettings", "prepare", "Tokenize text into memory-mapped shards."),
    "pretrain": Command(
        "training.pretrain",
        "PretrainSettings",
        "pretrain",
        "Pre-train with masked LM and, optionally, next-sentence prediction.",
    ),
    "finetune": Command(
        "training.finetune", "FinetuneSettings", "finetune", "Fine-tune a pre-trained model on a labelled task."
    ),
    "evaluate": Command(
        "training.evaluate", "EvaluateSettings", "evaluate", "Evaluate a model on labelled data or on plain text."
    ),
    "predict": Command(
        "inference.predict", "PredictSettings", "predict", "Write a fine-tuned model's predictions as JSON lines."
    ),
    "sweep": Command(
        "training.sweep",
        "SweepSettings",
        "sweep",
        "Fine-tune over a grid of hyperparameters and seeds, and keep the best model.",
    ),
    "reproduce": Command(
        "cli.reproduce",
        "ReproduceSettings",
        "reproduce",
        "Reproduce a table of the BERT paper with your own data.",
    ),
    "embed": Command(
        "inference.embed", "EmbedSettings", "embed", "Write token or sentence embeddings of texts to disk."
    ),
    "fill-mask": Command(
        "inference.fill_mask",
        "FillMaskSettings",
        "fill_mask_command",
        "Predict the likeliest tokens for each [MASK].",
    ),
    "import": Command(
        "convert.import_tf", "ImportSettings", "import_checkpoint", "Convert a TensorFlow checkpoint of Google's BERT."
    ),
    "export": Command(
        "convert.export", "ExportSettings", "export", "Export a model to Hugging Face format, ONNX or torch.export."
    ),
    "verify": Command(
        "cli.verify", "VerifySettings", "verify", "Check a model's outputs and gradients against transformers."
    ),
    "bench": Command(
        "cli.bench", "BenchSettings", "bench", "Measure and plot a model's speedup over transformers on this machine."
    ),
    "doctor": Command(
        "cli.doctor", "DoctorSettings", "doctor", "Report hardware, versions and kernels; --check tests the kernels."
    ),
}

# Errors whose message tells the user what to do. Anything else is a bug of this program and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, RunStopped)


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command line without the program's name; None: that of this process.

    Returns:
        The exit status: the command's own if it returns an int, else 0; 1 after an error of the user's, 2 for an
        unknown command, 130 after an interrupt.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"bertfast {importlib.import_module('bertfast').__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(COMMANDS)}"
        print(f"bertfast: unknown command {name!r}; {hint}", file=sys.stderr)
        return 2
    keep_freed_memory()  # a command allocates tensors of the same sizes over and over
    command = COMMANDS[name]
    module = importlib.import_module(f"bertfast.{command.module}")
    try:
        result = getattr(module, command.function)(parse(name, getattr(module, command.settings), rest))
    except KeyboardInterrupt:
        print(
            f"\nbertfast {name}: interrupted; run the same command again to continue after the last finished step",
            file=sys.stderr,
        )
        return 130
    except USER_ERRORS as error:
        print(f"bertfast {name}: {error}", file=sys.stderr)
        return getattr(error, "status", 1)
    return result if isinstance(result, int) else 0


def parse(command: str, settings_class: type[Settings], arguments: list[str]) -> Settings:
    """Return the settings of a command from its arguments.

    Args:
        command: Name of the command, for help and messages.
        settings_class: Dataclass of its settings.
        arguments: Flags with their values. `--config` inserts the entries of a YAML file or of an installed recipe in
            its place; of a flag given more than once, the last value counts.
    """
    flags = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config":
            flags += _config_flags(next(rest, None))
        elif argument.startswith("--config="):
            flags += _config_flags(argument.removeprefix("--config="))
        else:
            flags.append(argument)
    return tyro.cli(
        settings_class, prog=f"bertfast {command}", args=flags, config=(tyro.conf.OmitArgPrefixes,), description=None
    )


def _config_flags(name: str | None) -> list[str]:
    """Return a YAML file's entries as flags, so that files and command lines are validated alike."""
    if name is None:
        raise ValueError("--config requires a YAML file or the name of a recipe")
    path = find_config(name)
    entries = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(entries, dict):
        raise ValueError(f"--config {name}: {path} must hold `name: value` lines")
    return flags_of(entries)


def flags_of(entries: Mapping[str, Any]) -> list[str]:
    """Return names and values as command-line flags: True as `--name`, False as `--no-name`, a list as many values."""
    flags = []
    for name, value in entries.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def _usage() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: bertfast COMMAND [--config FILE.yaml | RECIPE] [--flag value …]",
            "       bertfast --version",
            "",
            "Commands:",
            *(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()),
            "",
            "`bertfast COMMAND --help` lists a command's flags; a YAML file uses the same names.",
            f"Recipes for `bertfast pretrain`: {', '.join(recipe_names())}.",
        ]
    )
