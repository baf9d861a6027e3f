"""Compare the speed of two commits.

    python -m bench.compare BASE [--head REF] [--cases NAME …] [--rounds N] [--results FOLDER]

Both commits are installed below build/compare/ once; that takes minutes if a native library has to be compiled because
its sources differ from those of the checkout. Each round starts a process of either commit, which take turns call by
call, in the order A B, B A, A B …, so that drift of the machine affects both; commands take turns as whole processes.
The ratio of a round is the median over its pairs of calls. The result of a case is head's time divided by base's,
estimated from the ratios of the rounds, with its 99 % confidence interval. If the interval contains 1, there is "no
difference" that this many rounds can show. Ctrl-C reports the rounds that are complete. Cases: `bench/compare_cases.py`
and COMMANDS.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, NamedTuple, cast

import numpy as np

from bench.arguments import add_names, result_parser
from bench.installed_commits import WORK, Commit, install, resolve
from bench.result_files import ROOT, require_clean_tree, write_result
from bertfast.runtime.machine import changed_files

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
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**63 - 1), "MALLOC_TOP_PAD_": "67108864"}
CONFIDENCE = 0.99
MIN_ROUNDS = 8  # with fewer, not even the range of all ratios has that confidence
SAME_VALUE = 1e-3  # largest relative difference of the outputs of two commits that compute the same
COMMAND_MINUTES = 10  # after which a process is ended
MIN_PAIRS, MAX_PAIRS = 3, 200  # of calls per case and round
PAUSE = 0.01  # seconds before a call, in which the threads of the other process go to sleep


class Round(NamedTuple):
    """A case in one round: median seconds of a call of either commit, and the median of head's time over base's."""

    base_s: float
    head_s: float
    ratio: float

    @classmethod
    def of_pairs(cls, pairs: Sequence[tuple[float, float]]) -> Round:
        """Return the round of pairs of calls, base's seconds first."""
        base, head = zip(*pairs, strict=True)
        return cls(statistics.median(base), statistics.median(head), statistics.median(b / a for a, b in pairs))


def main() -> None:
    arguments = parse_arguments()
    require_clean_tree(arguments.results)
    base, head = resolve(arguments.base), resolve(arguments.head)
    commits = {"base": base, "head": head}
    try:
        install(commits, arguments.rebuild)
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted while installing: nothing was measured") from None
    rounds: dict[str, list[Round]] = {case: [] for case in arguments.cases}
    try:
        measure(base, head, rounds, arguments.rounds, arguments.seconds)
    except KeyboardInterrupt:
        print("\ninterrupted; only complete rounds count", file=sys.stderr)
    rows = [compare(case, base, head, rounds[case]) for case in arguments.cases]
    print(table(base, head, rows))
    result = {name: {"ref": commit.name, "commit": commit.sha} for name, commit in commits.items()}
    path = write_result(f"{base.sha[:9]}-{head.sha[:9]}", result | {"cases": rows}, arguments.results)
    print(f"\nwritten to {path}")


def parse_arguments() -> argparse.Namespace:
    parser = result_parser(__doc__, WORK)
    parser.add_argument("base", metavar="BASE", help="commit to compare with: a hash, branch or tag")
    parser.add_argument("--head", default="HEAD", metavar="REF", help="commit to measure (default: HEAD)")
    add_names(parser, "--cases", "case", CASES, nargs="+", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=10, help="pairs of processes (default: 10)")
    parser.add_argument("--seconds", type=float, default=4.0, help="duration of a case in a round (default: 4)")
    parser.add_argument("--rebuild", action="store_true", help="install both commits again")
    arguments = parser.parse_args()
    if arguments.rounds < MIN_ROUNDS:
        parser.error(f"--rounds {arguments.rounds}: at least {MIN_ROUNDS} are needed for a confidence interval")
    if arguments.head == "HEAD" and (changed := changed_files(ROOT)):
        parser.error(
            f"uncommitted changes ({', '.join(changed[:3])}) would not be measured: commit them, or name a commit "
            "with --head"
        )
    return arguments


def measure(base: Commit, head: Commit, rounds: dict[str, list[Round]], count: int, seconds: float) -> None:
    """Append rounds to the lists of the cases that run, after an untimed one that finds those that do not.

    Args:
        base, head: The installed commits.
        rounds: A list for each case.
        count: Number of rounds.
        seconds: Duration of a case in a round.
    """
    with TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        sentences = (f"the house {i} is old and the river is {i % 7} miles wide .\nit was cold ." for i in range(2000))
        text.write_text("\n\n".join(sentences), encoding="utf-8")
        print("warm-up", file=sys.stderr, flush=True)
        runnable = [*take_turns(base, head, rounds, 0, text, 0)]
        started = time.monotonic()
        for number in range(count):
            found = take_turns(base, head, runnable, seconds, text, number)
            for case in runnable:
                if case in found:
                    rounds[case].append(found[case])
            left = (time.monotonic() - started) / (number + 1) * (count - number - 1)
            print(f"round {number + 1} of {count}, {left / 60:.0f} min left", file=sys.stderr, flush=True)


def take_turns(
    base: Commit, head: Commit, cases: Iterable[str], seconds: float, text: Path, first: int
) -> dict[str, Round]:
    """Run a round of the cases; return those that both commits run. `first` is even if base begins, odd if head."""
    found: dict[str, Round] = {}
    in_process = [case for case in cases if case in IN_PROCESS]
    if in_process:
        with Process(base, in_process) as old, Process(head, in_process) as new:
            for case in in_process:
                if all([old.prepare(case), new.prepare(case)]):  # both read their line
                    found[case] = _pairs_of_calls(old, new, seconds, first)
                    old.send("next")
                    new.send("next")
    for case in cases:
        if case in COMMANDS:
            earlier, later = (_run_command(commit, case, text) for commit in _ordered(base, head, first))
            pair = _ordered(earlier, later, first)
            if None not in pair:
                found[case] = Round.of_pairs([cast(tuple[float, float], pair)])
    return found


def _ordered(base: Any, head: Any, number: int) -> tuple[Any, Any]:
    return (base, head) if number % 2 == 0 else (head, base)


def _pairs_of_calls(old: Process, new: Process, seconds: float, first: int) -> Round:
    """Time calls of both processes in turn."""
    pairs: list[tuple[float, float]] = []
    while len(pairs) < MIN_PAIRS or (sum(map(sum, pairs)) < seconds and len(pairs) < MAX_PAIRS):
        elapsed = {process: process.call() for process in _ordered(old, new, first + len(pairs))}
        pairs.append((elapsed[old], elapsed[new]))
    return Round.of_pairs(pairs)


class Process:
    """A process that runs cases of a commit, and waits while it is not its turn."""

    def __init__(self, commit: Commit, cases: Sequence[str]):
        self.commit = commit
        self._errors = TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "bench" / "compare_cases.py"), *cases],
            env=_environment(commit),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # Ctrl-C interrupts this program only, which ends its processes
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def prepare(self, case: str) -> bool:
        """Wait until a case can be called; False, with the reason in the commit, if it cannot."""
        line = self._read()
        entry: dict[str, Any] = json.loads(line) if line else {"reason": self._last_words()}
        if line and not Path(entry["package"]).is_relative_to(self.commit.folder):
            raise SystemExit(f"the commit {self.commit.name} was not measured, but {entry['package']}")
        if "reason" in entry:
            self.commit.reasons[case] = entry["reason"]
            return False
        self.commit.values[case] = entry["value"]
        return True

    def call(self) -> float:
        """Return the seconds of a call.

        Raises:
            SystemExit: The process has ended.
        """
        time.sleep(PAUSE)
        self.send("call")
        line = self._read()
        if not line:
            raise SystemExit(f"a process of {self.commit.name} ended: {self._last_words()}")
        return float(line)

    def send(self, word: str) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def _last_words(self) -> str:
        self._errors.seek(0)
        return _last_line(self._errors.read()) or f"exit status {self._process.wait()}"


def _environment(commit: Commit) -> dict[str, str]:
    return os.environ | KEEP_FREED_MEMORY | {"PYTHONPATH": str(commit.folder), "PYTHONSAFEPATH": "1"}


def _run_command(commit: Commit, case: str, text: Path) -> float | None:
    """Return the seconds of a command; None, with the reason in the commit, if it fails."""
    with TemporaryDirectory() as output_folder:
        command = [sys.executable, *(word.format(text=text, output=output_folder) for word in COMMANDS[case])]
        started = time.perf_counter()
        try:
            ran = subprocess.run(
                command, env=_environment(commit), capture_output=True, text=True, timeout=60 * COMMAND_MINUTES
            )
        except subprocess.TimeoutExpired:
            commit.reasons[case] = f"not done after {COMMAND_MINUTES} minutes"
            return None
        elapsed = time.perf_counter() - started
    if ran.returncode:
        commit.reasons[case] = _last_line(ran.stderr) or f"exit status {ran.returncode}"
        return None
    return elapsed


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


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


def compare(case: str, base: Commit, head: Commit, rounds: Sequence[Round]) -> dict[str, Any]:
    """Return the result of a case: medians, ratio of head to base, its interval and the verdict in words."""
    for commit in (base, head):
        if reason := commit.reasons.get(case):
            return {"case": case, "verdict": f"not compared: {commit.name} lacks it or fails ({reason})"}
    columns = ("base_s", [each.base_s for each in rounds]), ("head_s", [each.head_s for each in rounds])
    ratios = [each.ratio for each in rounds]
    row: dict[str, Any] = {"case": case, **dict(columns), "ratios": ratios}
    values = [commit.values.get(case) for commit in (base, head)]
    if None not in values:
        row["values"] = values
    if len(rounds) < MIN_ROUNDS:
        return row | {"verdict": f"not compared: {len(rounds)} complete rounds, at least {MIN_ROUNDS} are needed"}
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
