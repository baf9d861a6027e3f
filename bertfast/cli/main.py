"""`bertfast COMMAND …`: one dataclass of settings a command gives its flags, its YAML file and its help."""

from __future__ import annotations

import difflib
import importlib
import sys
from pathlib import Path

import tyro
import yaml

from bertfast.runtime.malloc import keep_freed_memory
from bertfast.runtime.signals import RunStopped

# command: (module, settings, function, what it does)
COMMANDS = {
    "demo": ("cli.demo", "DemoSettings", "demo", "pre-train, fine-tune and ask a BERT of your own, in minutes"),
    "prepare": ("data.prepare", "PrepareSettings", "prepare", "turn text into token shards"),
    "pretrain": ("training.pretrain", "PretrainSettings", "pretrain", "pre-train on text: masked LM, sentence pairs"),
    "finetune": (
        "training.finetune",
        "FinetuneSettings",
        "finetune",
        "fine-tune for classification, multiple choice or question answering",
    ),
    "evaluate": ("training.evaluate", "EvaluateSettings", "evaluate", "score a model on labelled data or on text"),
    "predict": (
        "inference.predict",
        "PredictSettings",
        "predict",
        "print predictions of a fine-tuned model as JSON lines",
    ),
    "sweep": ("training.sweep", "SweepSettings", "sweep", "fine-tune with many settings and seeds, and keep the best"),
    "reproduce": (
        "cli.reproduce",
        "ReproduceSettings",
        "reproduce",
        "the paper's tables, with models and data at hand",
    ),
    "embed": ("inference.embed", "EmbedSettings", "embed", "write embeddings of texts to disk"),
    "fill-mask": (
        "inference.fill_mask",
        "FillMaskSettings",
        "fill_mask_command",
        "name the best words for each [MASK]",
    ),
    "import": (
        "convert.import_tf",
        "ImportSettings",
        "import_checkpoint",
        "make a model's folder of Google's TensorFlow checkpoint",
    ),
    "export": ("convert.export", "ExportSettings", "export", "write a model for transformers, ONNX or torch.export"),
    "verify": ("cli.verify", "VerifySettings", "verify", "compare with transformers on one's own model and text"),
    "bench": ("cli.bench", "SpeedupSettings", "speedup", "say how much faster one's own model is here, with a picture"),
    "doctor": ("cli.doctor", "DoctorSettings", "doctor", "say what this machine has, and check its kernels"),
}

# Errors whose message is the whole story; anything else is a mistake of ours and shows where it happened.
EXPECTED = (ValueError, TypeError, OSError, ImportError, RunStopped)


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Return the exit status: the command's own if it returns an int."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"bertfast: there is no command {name!r}; {hint}", file=sys.stderr)
        return 2
    keep_freed_memory()  # a command is a process of its own, which makes tensors of the same sizes over and over
    module_name, settings_class, function, _ = COMMANDS[name]
    module = importlib.import_module(f"bertfast.{module_name}")
    try:
        result = getattr(module, function)(parse(name, getattr(module, settings_class), rest))
    except KeyboardInterrupt:
        print(f"\nbertfast {name}: interrupted; the same command begins where finished work ends", file=sys.stderr)
        return 130
    except EXPECTED as error:
        print(f"bertfast {name}: {error}", file=sys.stderr)
        return getattr(error, "status", 1)
    return result if isinstance(result, int) else 0


def parse(command: str, settings_class: type, arguments: list[str]):
    """Settings from flags, and from the YAML files that `--config` names; what stands further right wins."""
    flags = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config":
            flags += _flags_in(next(rest, None))
        elif argument.startswith("--config="):
            flags += _flags_in(argument.removeprefix("--config="))
        else:
            flags.append(argument)
    return tyro.cli(
        settings_class, prog=f"bertfast {command}", args=flags, config=(tyro.conf.OmitArgPrefixes,), description=None
    )


def _flags_in(path: str | None) -> list[str]:
    """A YAML file's entries as the flags they stand for, so that both are checked alike."""
    if path is None or not Path(path).is_file():
        raise FileNotFoundError(f"--config wants a YAML file, and {path} is none")
    entries = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must hold `name: value` lines")
    return flags_of(entries)


def flags_of(entries: dict) -> list[str]:
    """Names and values as the flags they stand for."""
    flags = []
    for name, value in entries.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (*_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: bertfast COMMAND [--config FILE.yaml] [--flag value …]",
            "",
            *lines,
            "",
            "bertfast COMMAND --help lists the flags of a command; a YAML file holds the same names.",
        ]
    )
