"""Predict again, with the constants of today, what earlier commits predicted.

    python -m bench.sass_model.history [--language cuda] [--output bench/results/sass_model_history.md]

Each commit that renewed bench/results/sass_listings.json.xz has the machine code of its CUDA C++ kernels there, and the
cases that belong to it. So its program predicts them again, after `constants.py` was replaced: nvcc is not needed, and
Triton compiles its kernels as they were. The simulator is that of the commit, too. A row has a kernel in a case and its
predicted time at each of these commits; rows that never differ by more than 1 % are left out.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from bench.result_files import ROOT, require_clean_tree
from bench.sass_model import constants
from bench.sass_model.predict import KEPT, TOLERANCE
from bench.sass_model.predictions import microseconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", choices=["triton", "cuda"], help="only kernels in this language")
    parser.add_argument("--output", type=Path, help="write the table to this Markdown file instead of printing it")
    arguments = parser.parse_args()
    if arguments.output:
        require_clean_tree(arguments.output)
    path = KEPT.relative_to(ROOT).as_posix()
    commits = _git("log", "--reverse", "--format=%h", "--", path).decode().split()
    if not commits:
        parser.error(f"no commit has {path}: `make predictions` writes it")
    language = ["--language", arguments.language] if arguments.language else []
    text = "\n".join(table({commit: microseconds(predict_again(commit, language)) for commit in commits})) + "\n"
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


def predict_again(commit: str, options: list[str]) -> list[str]:
    """Return what the program of a commit prints with the constants of today.

    Raises:
        subprocess.CalledProcessError: It failed, for instance because it misses a constant.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with tarfile.open(fileobj=io.BytesIO(_git("archive", "--format=tar", commit))) as archive:
            archive.extractall(folder, filter="data")
        if not (folder / "bertfast" / "kernels").exists():
            (folder / "bertfast" / "kernels").symlink_to("../kernels")
        shutil.copy(constants.__file__, folder / "bench" / "sass_model" / "constants.py")
        command = [sys.executable, "-m", "bench.sass_model.predict", *options]
        environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
        ran = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return ran.stdout.splitlines()


def table(times: dict[str, dict[str, float]]) -> list[str]:
    """Return the lines of the page, from the times by commit in µs."""
    rows = dict.fromkeys(row for of_commit in times.values() for row in of_commit)
    lines = [
        "# Predictions of earlier commits, computed with the constants of today",
        "",
        f"By `python -m bench.sass_model.history`, constants of version {constants.VERSION}: µs on an H200, by the "
        "commit whose machine code it is, with the simulator and the cases of that commit: what changes is the kernel "
        "or a correction of these, see bench/LOG.md. What never changed by more than 1 % is left out. **Nothing here "
        "was measured.**",
        "",
        f"| kernel, case | {' | '.join(times)} |",
        "|---" * (1 + len(times)) + "|",
    ]
    for row in rows:
        values = [of_commit.get(row) for of_commit in times.values()]
        known = [value for value in values if value is not None]
        if len(known) < len(values) or max(known) > (1 + TOLERANCE) * min(known):
            lines.append(f"| {row} | {' | '.join('' if value is None else f'{value:.1f}' for value in values)} |")
    return lines


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
