"""Predict again, with the constants of today, what earlier commits predicted.

    python -m bench.sass_model.history [--output bench/results/sass_model_history.md]

Each commit that renewed bench/results/sass_listings.json.xz has the machine code of its kernels there, so the history
of the repository has all that is needed. A row has a kernel in a case and its predicted time at each of these commits;
cases that do not differ by more than 1 % between any two of them are left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from bench.harness import ROOT, require_clean_tree
from bench.sass_model.cases import launches
from bench.sass_model.constants import VERSION
from bench.sass_model.machine_code import KEPT, Code, unpack
from bench.sass_model.predict import TOLERANCE, cuda_rows, rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the table to this Markdown file instead of printing it")
    arguments = parser.parse_args()
    if arguments.output:
        require_clean_tree(arguments.output)
    path = KEPT.relative_to(ROOT).as_posix()
    commits = _git("log", "--reverse", "--format=%h", "--", path).decode().split()
    if not commits:
        parser.error(f"no commit has {path}: `make predictions` writes it")
    times = {commit: seconds(unpack(_git("show", f"{commit}:{path}"))) for commit in commits}
    text = "\n".join(table(times)) + "\n"
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


def seconds(codes: list[Code]) -> dict[str, float]:
    """Return the predicted time of each case, by kernel and case. Cases whose kernel is missing are left out."""
    found = []
    for launch in launches():
        of_launch = [code for code in codes if code.launch == launch.name]
        if {case.kernel for case in launch.cases} <= {code.kernel for code in of_launch}:
            found += list(rows(launch, of_launch))
    found += list(cuda_rows([code for code in codes if not code.launch]))
    return {f"{row.kernel} | {row.case}": row.prediction.seconds for row in found}


def table(times: dict[str, dict[str, float]]) -> list[str]:
    """Return the lines of the page, from the times by commit."""
    cases = dict.fromkeys(case for of_commit in times.values() for case in of_commit)
    lines = [
        "# Predictions of earlier commits, computed with the constants of today",
        "",
        f"By `python -m bench.sass_model.history`, constants of version {VERSION}: µs on an H200, by the commit whose "
        "machine code it is. Cases that never changed by more than 1 % are left out. **Nothing here was measured.**",
        "",
        f"| kernel | case | {' | '.join(times)} |",
        "|---" * (2 + len(times)) + "|",
    ]
    for case in cases:
        values = [of_commit.get(case) for of_commit in times.values()]
        known = [value for value in values if value is not None]
        if len(known) < len(values) or max(known) > (1 + TOLERANCE) * min(known):
            cells = ["" if value is None else f"{value * 1e6:.1f}" for value in values]
            lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
