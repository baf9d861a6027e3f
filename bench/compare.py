"""Compare the speed of two commits.

    python -m bench.compare BASE [--head REF] [--cases NAME …] [--rounds N] [--results FOLDER]

Both commits are installed below build/compare/, the native library is compiled only if its sources differ. Each round
runs every case once with either commit, in processes of their own, in the order A B, B A, A B …, so that drift of the
machine affects both. The result of a case is head's time divided by base's, estimated from the ratios of the rounds,
with its 99 % confidence interval. If the interval contains 1, there is "no difference" that this many rounds can show.
Ctrl-C reports the rounds that are complete. Cases: `bench/compare_cases.py` and COMMANDS.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench.harness import ON_GPU, ROOT, changed_files, require_clean_tree, result_parser, write_result

WORK = ROOT / "build" / "compare"
NATIVE = ("csrc", "setup.py", "build_support")  # sources of the native library
LIBRARY = ("_C.abi3.so", "_C.cuda.json")
IN_PROCESS = (
    "pre-training step",
    "fine-tuning step",
    "inference",
    "patched model",
    "sentence of 8 tokens",
    "sentence of 128 tokens",
)
COMMANDS = {  # timed as whole processes; {text} is a text file, {output} an empty folder
    "import": ["-c", "import bertfast; bertfast.BertModel, bertfast.patch"],
    "bertfast --help": ["-m", "bertfast", "--help"],
    "bertfast pretrain": [
        *("-m", "bertfast", "pretrain", "--train-file", "{text}", "--output-dir", "{output}/run", "--preset", "tiny"),
        *("--vocab-size", "500", "--max-seq-length", "128", "--tokens-per-batch", "2048", "--max-steps", "30"),
        *("--eval-batches", "1", "--device", "cpu"),
    ],
}
CASES = (*IN_PROCESS, *COMMANDS)
# As `bertfast.runtime.malloc` does in bertfast's programs; older commits have no function for it.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_TOP_PAD_": "67108864"}
CONFIDENCE = 0.99
MIN_ROUNDS = 8  # with fewer, not even the range of all ratios has that confidence
SAME_VALUE = 1e-3  # largest relative difference of the outputs of two commits that compute the same
CASE_MINUTES = 10  # after which a process is ended


@dataclass
class Commit:
    """An installed commit.

    Attributes:
        name: As it was given.
        sha: Its full hash.
        folder: Folder to put on the path.
        seconds: By case, the seconds of each round.
        values: By case, a number computed from the outputs of the first round.
        reasons: By case, why it did not run.
    """

    name: str
    sha: str
    folder: Path
    seconds: dict[str, list[float]] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def main() -> None:
    arguments = parse_arguments()
    require_clean_tree(arguments.results)
    base, head = resolve(arguments.base), resolve(arguments.head)
    commits = {"base": base, "head": head}
    install(commits, arguments.rebuild)
    try:
        measure(list(commits.values()), arguments.cases, arguments.rounds, arguments.seconds)
    except KeyboardInterrupt:
        print("\ninterrupted; only complete rounds count", file=sys.stderr)
    rows = [compare(case, base, head) for case in arguments.cases]
    print(table(base, head, rows))
    result = {name: {"ref": commit.name, "commit": commit.sha} for name, commit in commits.items()}
    path = write_result(f"{base.sha[:9]}-{head.sha[:9]}", result | {"cases": rows}, arguments.results)
    print(f"\nwritten to {path}")


def parse_arguments() -> argparse.Namespace:
    parser = result_parser(__doc__, WORK)
    parser.add_argument("base", metavar="BASE", help="commit to compare with: a hash, branch or tag")
    parser.add_argument("--head", default="HEAD", metavar="REF", help="commit to measure (default: HEAD)")
    names = ", ".join(CASES)
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="NAME", help=f"of {names}")
    parser.add_argument("--rounds", type=int, default=10, help="pairs of processes per case (default: 10)")
    parser.add_argument("--seconds", type=float, default=1.0, help="duration of a case in a process (default: 1)")
    parser.add_argument("--rebuild", action="store_true", help="install both commits again")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"--cases: unknown name {', '.join(sorted(unknown))}; choose from {names}")
    if arguments.rounds < MIN_ROUNDS:
        parser.error(f"--rounds {arguments.rounds}: at least {MIN_ROUNDS} are needed for a confidence interval")
    if arguments.head == "HEAD" and (changed := changed_files(ROOT)):
        parser.error(
            f"uncommitted changes ({', '.join(changed[:3])}) would not be measured: commit them, or name a commit "
            "with --head"
        )
    return arguments


def git(*arguments: str) -> str:
    """Return what git prints.

    Raises:
        SystemExit: It fails, with its message.
    """
    ran = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"git {arguments[0]}: {ran.stderr.strip() or ran.returncode}")
    return ran.stdout.strip()


def resolve(ref: str) -> Commit:
    """Return the commit that `ref` names.

    Raises:
        SystemExit: There is none.
    """
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}"]
    sha = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not sha:
        raise SystemExit(f"there is no commit {ref!r}: name a hash, branch or tag that `git log` shows")
    return Commit(ref, sha, WORK / sha[:12])


def same_native_sources(*refs: str) -> bool:
    """Return whether two commits, or one and the checkout, have the same sources of the native library."""
    return not git("diff", "--name-only", *refs, "--", *NATIVE)


def install(commits: dict[str, Commit], rebuild: bool) -> None:
    """Install the commits into their folders, each with the native library of its sources.

    Equal sources get the same file: that of the checkout, if it is of these sources too, or one that is compiled.
    """
    base, head = commits["base"], commits["head"]
    for commit in {commit.sha: commit for commit in commits.values()}.values():
        if rebuild:
            shutil.rmtree(commit.folder, ignore_errors=True)
    same = same_native_sources(base.sha, head.sha)
    checkout = ROOT / "bertfast"
    from_checkout = same and (checkout / LIBRARY[0]).is_file() and same_native_sources(head.sha)
    _install(head, checkout if from_checkout else None)
    _install(base, head.folder / "bertfast" if same else None)


def _install(commit: Commit, library_folder: Path | None) -> None:
    """Install a commit with the library in `library_folder`; None: compile it."""
    step = "build" if library_folder is None else "build_py"
    done = commit.folder / "installed.txt"  # the last step, written at the end
    if not done.is_file() or (library_folder is None and done.read_text(encoding="utf-8") != "build"):
        compiling = ", compiling the native library" * (library_folder is None)
        print(f"installing {commit.name} ({commit.sha[:9]}){compiling}", file=sys.stderr, flush=True)
        shutil.rmtree(commit.folder, ignore_errors=True)
        commit.folder.mkdir(parents=True)
        _run_setup(commit, step)
    if library_folder is not None:
        for name in LIBRARY:
            if (library_folder / name).is_file():
                shutil.copy2(library_folder / name, commit.folder / "bertfast" / name)
    done.write_text(step, encoding="utf-8")


def _run_setup(commit: Commit, step: str) -> None:
    """Run a step of setup.py in a worktree of the commit.

    Raises:
        SystemExit: It fails.
    """
    environment = os.environ | ({} if ON_GPU else {"NVCC": ""})  # a CPU needs no CUDA kernels
    with TemporaryDirectory(dir=WORK) as folder:
        checkout = Path(folder, "checkout")
        git("worktree", "add", "--quiet", "--detach", str(checkout), commit.sha)
        try:
            command = [sys.executable, "setup.py", "--quiet", step, "--build-lib", str(commit.folder)]
            ran = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        finally:
            git("worktree", "remove", "--force", str(checkout))
    if ran.returncode:
        raise SystemExit(f"{commit.name} cannot be installed:\n{ran.stdout}{ran.stderr}")


def measure(commits: Sequence[Commit], cases: Sequence[str], rounds: int, seconds: float) -> None:
    """Run all rounds, after an untimed one that fills the caches of the file system and finds cases that cannot run."""
    with TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        sentences = (f"the house {i} is old and the river is {i % 7} miles wide .\nit was cold ." for i in range(2000))
        text.write_text("\n\n".join(sentences), encoding="utf-8")
        print("warm-up", file=sys.stderr, flush=True)
        runnable = list(cases)
        for commit in commits:
            first = run_cases(commit, runnable, 0, text)
            commit.reasons = {case: found["reason"] for case, found in first.items() if "reason" in found}
            commit.values = {case: found["value"] for case, found in first.items() if "value" in found}
            commit.seconds = {case: [] for case in cases}
        runnable = [case for case in cases if not any(case in commit.reasons for commit in commits)]
        started = time.monotonic()
        for number in range(rounds):
            order = list(commits) if number % 2 == 0 else list(commits)[::-1]
            results = {id(commit): run_cases(commit, runnable, seconds, text) for commit in order}
            for commit in commits:
                found = results[id(commit)]
                for case in runnable:
                    commit.seconds[case].append(found[case].get("seconds", float("nan")))
            left = (time.monotonic() - started) / (number + 1) * (rounds - number - 1)
            print(f"round {number + 1} of {rounds}, {left / 60:.0f} min left", file=sys.stderr, flush=True)


def run_cases(commit: Commit, cases: Sequence[str], seconds: float, text: Path) -> dict[str, dict[str, Any]]:
    """Run the cases once; return by case its "seconds" and "value", or the "reason" why it did not run."""
    environment = os.environ | KEEP_FREED_MEMORY | {"PYTHONPATH": str(commit.folder), "PYTHONSAFEPATH": "1"}
    found: dict[str, dict[str, Any]] = {}
    if in_process := [case for case in cases if case in IN_PROCESS]:
        command = [sys.executable, str(ROOT / "bench" / "compare_cases.py"), "--seconds", str(seconds), *in_process]
        output, reason = _run(command, environment)
        for line in output.splitlines():
            entry = json.loads(line)
            if not Path(entry["package"]).is_relative_to(commit.folder):
                raise SystemExit(f"the commit {commit.name} was not measured, but {entry['package']}")
            found[entry.pop("case")] = entry
        missing = {"reason": reason or "the process printed no result"}
        found |= {case: missing for case in in_process if case not in found}
    for case in cases:
        if case in COMMANDS:
            with TemporaryDirectory() as output_folder:
                words = [part.format(text=text, output=output_folder) for part in COMMANDS[case]]
                started = time.perf_counter()
                _, reason = _run([sys.executable, *words], environment)
                elapsed = time.perf_counter() - started
            found[case] = {"reason": reason} if reason else {"seconds": elapsed}
    return found


def _run(command: list[str], environment: dict[str, str]) -> tuple[str, str | None]:
    """Return what a process prints, and why it failed (None: it did not)."""
    try:
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60 * CASE_MINUTES)
    except subprocess.TimeoutExpired:
        return "", f"not done after {CASE_MINUTES} minutes"
    lines = [line for line in ran.stderr.splitlines() if line.strip()]
    return ran.stdout, (lines[-1] if lines else f"exit status {ran.returncode}") if ran.returncode else None


def ratio_interval(ratios: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Return the Hodges-Lehmann estimate of a ratio and the bounds of its exact interval, from ratios of rounds.

    The estimate is the median of the means of all pairs of logarithms. The interval contains each ratio that the
    signed-rank test of Wilcoxon does not reject. A bootstrap of ten rounds covers equal commits in 94 % of all cases
    instead of 99 %.
    """
    logs = np.log(ratios)
    first, second = np.triu_indices(len(logs))
    means = np.sort((logs[first] + logs[second]) / 2)
    ways = np.ones(1)  # by the sum of ranks: the number of subsets of ranks with that sum
    for rank in range(1, len(logs) + 1):
        ways = np.pad(ways, (0, rank)) + np.pad(ways, (rank, 0))
    outside = int((np.cumsum(ways) / 2 ** len(logs) <= (1 - confidence) / 2).sum()) - 1
    low, high = np.exp([means[outside], means[-1 - outside]])
    return float(np.exp(np.median(means))), float(low), float(high)


def compare(case: str, base: Commit, head: Commit) -> dict[str, Any]:
    """Return the result of a case: medians, ratio of head to base, its interval and the verdict in words."""
    for commit in (base, head):
        if reason := commit.reasons.get(case):
            return {"case": case, "verdict": f"not compared: {commit.name} lacks it or fails ({reason})"}
    columns = [commit.seconds.get(case, []) for commit in (base, head)]
    rounds = [pair for pair in zip(*columns, strict=True) if not np.isnan(pair).any()]
    row: dict[str, Any] = {"case": case, "base_s": [a for a, _ in rounds], "head_s": [b for _, b in rounds]}
    values = [commit.values.get(case) for commit in (base, head)]
    if None not in values:
        row["values"] = values
    if len(rounds) < MIN_ROUNDS:
        return row | {"verdict": f"not compared: {len(rounds)} complete rounds, at least {MIN_ROUNDS} are needed"}
    ratios = [after / before for before, after in rounds]
    ratio, low, high = ratio_interval(ratios)
    return row | {"ratio": ratio, "low": low, "high": high, "verdict": verdict(low, ratio, high, values)}


def verdict(low: float, ratio: float, high: float, values: Sequence[float | None]) -> str:
    """Return in words what the interval of the ratio shows, and whether both commits computed the same."""
    if low > 1:
        text = f"slower by {ratio - 1:.1%}"
    elif high < 1:
        text = f"faster by {1 - ratio:.1%}"
    else:
        text = f"no difference (one of {max(high - 1, 1 - low):.1%} would show)"
    first, second = values
    if first is not None and second is not None and abs(first - second) > SAME_VALUE * max(abs(first), abs(second)):
        text += f"; THE OUTPUTS DIFFER: {first:.6g}, {second:.6g}"
    return text


def table(base: Commit, head: Commit, rows: Iterable[dict[str, Any]]) -> str:
    """Return the results as a table in Markdown."""
    lines = [
        f"base: {base.name} ({base.sha[:9]}), head: {head.name} ({head.sha[:9]}); medians, seconds\n",
        f"| case | base | head | head / base | {CONFIDENCE:.0%} interval | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = ["", "", "", ""]
        if "ratio" in row:
            medians = [f"{statistics.median(row[side]):.4f}" for side in ("base_s", "head_s")]
            cells = [*medians, f"{row['ratio']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}"]
        lines.append("| " + " | ".join([row["case"], *cells, row["verdict"]]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
