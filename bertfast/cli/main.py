"""`bertfast COMMAND …`: the flags, the YAML entries and the help of a command come from one dataclass of settings."""

from __future__ import annotations

import difflib
import importlib
import sys
from pathlib import Path
from typing import NamedTuple

from bertfast.cli.console import console, require_standard_output, say, use_utf8
from bertfast.cli.errors import describe, is_user_error
from bertfast.cli.flags import parse
from bertfast.cli.recipes import recipe_names
from bertfast.runtime.display import require_utf8
from bertfast.runtime.malloc import keep_freed_memory
from bertfast.runtime.settings import Settings
from bertfast.runtime.signals import exit_on_sigterm


class Command(NamedTuple):
    """Where a command is implemented; it is imported only when it runs.

    Attributes:
        module: Module below `bertfast`.
        settings: Name of the dataclass of its settings.
        function: Name of the function that takes the settings; if it returns an int, that is the exit status.
        summary: What the command does, for `bertfast --help`.
        example: Arguments of a typical call, for the command's own help.
    """

    module: str
    settings: str
    function: str
    summary: str
    example: str


COMMANDS = {
    "demo": Command(
        "cli.demo",
        "DemoSettings",
        "demo",
        "Pre-train, fine-tune and query a small BERT in a few minutes.",
        "--output-dir demo",
    ),
    "prepare": Command(
        "data.prepare",
        "PrepareSettings",
        "prepare",
        "Tokenize text into memory-mapped shards.",
        "--output-dir shards --train-file text/",
    ),
    "pretrain": Command(
        "training.pretraining",
        "PretrainSettings",
        "pretrain",
        "Pre-train with masked LM and, optionally, next-sentence prediction.",
        "--output-dir bert --train-file text/ --preset base --max-seq-length 128",
    ),
    "finetune": Command(
        "training.finetuning",
        "FinetuneSettings",
        "finetune_command",
        "Fine-tune a pre-trained model on a labelled task.",
        "--model-name-or-path bert --train-file train.tsv --validation-file dev.tsv --output-dir tuned",
    ),
    "evaluate": Command(
        "training.evaluate",
        "EvaluateSettings",
        "evaluate",
        "Evaluate a model on labelled data or on plain text.",
        "--model-name-or-path tuned --validation-file dev.tsv --output-dir evaluated",
    ),
    "predict": Command(
        "inference.predict",
        "PredictSettings",
        "predict",
        "Write a fine-tuned model's predictions as JSON lines.",
        "--model-name-or-path tuned --input-file sentences.tsv",
    ),
    "sweep": Command(
        "training.sweep",
        "SweepSettings",
        "sweep",
        "Fine-tune over a grid of hyperparameters and seeds, and keep the best model.",
        "--model-name-or-path bert --train-file train.tsv --validation-file dev.tsv --output-dir swept",
    ),
    "compare": Command(
        "cli.compare_runs",
        "CompareSettings",
        "compare",
        "Compare runs: results, settings that differ, and a plot of their curves.",
        "tuned-a tuned-b",
    ),
    "reproduce": Command(
        "cli.reproduce",
        "ReproduceSettings",
        "reproduce",
        "Reproduce a table of the BERT paper with your own data.",
        "--table 7 --data DATA --output-dir OUT",
    ),
    "embed": Command(
        "inference.embed",
        "EmbedSettings",
        "embed",
        "Write token or sentence embeddings of texts to disk.",
        "--model-name-or-path bert --input-file texts.txt --output-dir vectors --pooling mean",
    ),
    "search": Command(
        "inference.search",
        "SearchSettings",
        "search",
        "Print the vectors of `bertfast embed` that are nearest to queries, as JSON lines.",
        "--embeddings-dir vectors --model-name-or-path bert --input-file queries.txt",
    ),
    "fill-mask": Command(
        "inference.fill_mask",
        "FillMaskSettings",
        "fill_mask_command",
        "Predict the likeliest tokens for each [MASK].",
        'bert "The capital of France is [MASK]."',
    ),
    "import": Command(
        "convert.import_tf",
        "ImportSettings",
        "import_checkpoint",
        "Convert a TensorFlow checkpoint of Google's BERT.",
        "uncased_L-12_H-768_A-12/bert_model.ckpt out",
    ),
    "export": Command(
        "convert.export",
        "ExportSettings",
        "export",
        "Export a model to Hugging Face format, ONNX or torch.export.",
        "bert out --to onnx",
    ),
    "verify": Command(
        "cli.verify",
        "VerifySettings",
        "verify",
        "Check a model's outputs and gradients against transformers.",
        "bert --input-file mine.txt",
    ),
    "bench": Command(
        "cli.bench",
        "BenchSettings",
        "bench",
        "Measure and plot a model's speedup over transformers on this machine.",
        "bert --input-file mine.txt",
    ),
    "doctor": Command(
        "cli.doctor",
        "DoctorSettings",
        "doctor",
        "Report hardware, versions and kernels; --check tests the kernels.",
        "--check",
    ),
}

_CONFIG_HELP = "--config FILE.yaml reads flags from a YAML file, in which they have the same names."
_RECIPE_HELP = "--config RECIPE reads those of an installed recipe: "

# Names that users of other tools may try, and the command that does it.
_SYNONYMS = {
    "features": "embed",
    "encode": "embed",
    "query": "search",
    "retrieve": "search",
    "train": "pretrain",
    "tokenize": "prepare",
    "classify": "predict",
    "convert": "import",
    "benchmark": "bench",
    "test": "evaluate",
}

# Commands whose results go to standard output and nowhere else.
_PRINT_ALL = ("predict", "compare", "search", "fill-mask", "verify", "bench", "doctor")
# Commands that, given again, continue where they were interrupted.
_CONTINUE = ("demo", "prepare", "sweep", "reproduce", "embed")


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command line without the program's name; None: that of this process.

    Returns:
        The exit status: the command's own if it returns an int, else 0; 1 after an error of the user's, 2 for an
        unknown command, 130 after Ctrl-C, 141 if the reader of the output has gone. SIGTERM raises SystemExit(143).
    """
    if arguments is None:
        use_utf8()
        arguments = sys.argv[1:]
    name, *rest = arguments or ["--help"]
    program = f"bertfast {name}" if name in COMMANDS else "bertfast"
    try:
        with console(), exit_on_sigterm():
            return _run(name, rest)
    except KeyboardInterrupt:
        again = "; run the same command again to continue after the last finished step" * (name in _CONTINUE)
        say(f"\n{program}: interrupted{again}")
        return 130
    except BrokenPipeError:
        return 141  # as for a program that SIGPIPE ends
    except Exception as error:
        if not is_user_error(error):
            raise
        say(f"{program}: {describe(error)}")
        return getattr(error, "status", 1)


def _run(name: str, rest: list[str]) -> int:
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"bertfast {importlib.import_module('bertfast').__version__}")
        return 0
    if name not in COMMANDS:
        near = [_SYNONYMS[name]] if name in _SYNONYMS else difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(COMMANDS)}"
        say(f"bertfast: unknown command {name!r}; {hint}")
        return 2
    keep_freed_memory()  # a command allocates tensors of the same sizes over and over
    command = COMMANDS[name]
    module = importlib.import_module(f"bertfast.{command.module}")
    about = f"{command.summary}\n\nExample: bertfast {name} {command.example}\n{_CONFIG_HELP}"
    if name == "pretrain":
        about += f"\n{_RECIPE_HELP}{', '.join(recipe_names())}."
    settings = parse(name, getattr(module, command.settings), rest, about)
    _require_folder(settings)
    if name in _PRINT_ALL or (name == "evaluate" and getattr(settings, "output_dir", None) is None):
        require_standard_output()
    result = getattr(module, command.function)(settings)
    return result if isinstance(result, int) else 0


def _require_folder(settings: Settings) -> None:
    """Raise an error if a command's output folder, or a folder above it, is a file, or its name is not UTF-8."""
    output = getattr(settings, "output_dir", None)
    if output is not None:
        require_utf8(output, "--output-dir")
        for path in (Path(output), *Path(output).parents):
            if path.exists() and not path.is_dir():
                raise NotADirectoryError(f"--output-dir {output}: {path} is a file; give a folder")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: bertfast COMMAND [--config FILE.yaml|RECIPE] [--flag value …]",
            "       bertfast --version",
            "",
            "Commands:",
            *(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()),
            "",
            "`bertfast COMMAND --help` lists a command's flags; a YAML file uses the same names.",
            f"Recipes for `bertfast pretrain`: {', '.join(recipe_names())}.",
        ]
    )
