"""Arguments that the benchmarks share: folders of results, data and models, and the types of values."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from bench.result_files import ROOT, machine_folder

DATA = ROOT.parent / "shared" / "data"  # texts next to the checkout, which are not part of the project
PUBLISHED = ROOT / "build" / "minilm"  # a package with a published model, see the Makefile


def result_parser(description: str | None, results: Path | None = None) -> argparse.ArgumentParser:
    """Return a parser of a program's flags with `--results`, the folder for result files.

    Args:
        description: Text above the flags in `--help`.
        results: Default of the folder; None: that of this processor, as results depend on it.
    """
    results = machine_folder() if results is None else results
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    help_text = f"folder for result files (default: {results.relative_to(ROOT)})"
    parser.add_argument("--results", type=Path, default=results, metavar="FOLDER", help=help_text)
    return parser


def model_parser(description: str | None) -> argparse.ArgumentParser:
    """Return `result_parser` with the folders of a model and of the data as positional arguments."""
    parser = result_parser(description)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("data", type=Path, help="folder of the data")
    return parser


def at_least_one(text: str) -> int:
    """Return a positive integer, as the type of a flag.

    Raises:
        argparse.ArgumentTypeError: It is not an integer, or less than 1.
    """
    if not re.fullmatch(r"\+?0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer: type 1 or more")
    return int(text)


def add_names(
    parser: argparse.ArgumentParser, argument: str, kind: str, names: Collection[str], note: str = "", **options: Any
) -> None:
    """Add an argument that takes some of the given names and refuses others.

    Args:
        parser: Parser of the program.
        argument: Name of the argument.
        kind: What one of the names is, for the help and the message.
        names: Names to choose from.
        note: Added to the help.
        options: Options of `add_argument`, such as the default.
    """

    def known(name: str) -> str:
        if name not in names:
            raise argparse.ArgumentTypeError(f"unknown {kind} {name!r}: choose from {quoted(names)}")
        return name

    help_text = f"of {quoted(names)}{note}"
    parser.add_argument(argument, type=known, metavar=kind.upper(), help=help_text, **{"nargs": "*", **options})


def quoted(names: Iterable[str]) -> str:
    """Return names as they are typed: some contain spaces and commas."""
    return ", ".join(f"'{name}'" for name in names)
