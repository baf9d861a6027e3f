"""Arguments that the benchmarks share: folders of results, data and models, and the types of values."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection
from pathlib import Path

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


def one_of(kind: str, names: Collection[str]) -> Callable[[str], str]:
    """Return an argparse type that accepts only the given names.

    Args:
        kind: What is named, in the message about another name: "unknown KIND NAME".
        names: Names to choose from.
    """

    def known(name: str) -> str:
        if name not in names:
            raise argparse.ArgumentTypeError(f"unknown {kind} {name!r}: choose from {', '.join(map(repr, names))}")
        return name

    return known
