"""Run the parts of `bench.gpu_check`: commands in parallel, each with a log, for a limited time."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]
GRACE = 5  # seconds for an interrupted part to write its results
PACKING = 5  # seconds between two versions of the tar file
END = "GPU_CHECK_PART_END"  # environment variable of commands: the `time.time()` at which they are stopped
STOPPED = "stopped at its limit"
NOT_REACHED = "not reached"
# The last line of a self-test. The lines before it name the checks that failed; pytest's lines start in capitals.
_COUNTS = re.compile(r"(\d+) of (\d+) checks passed, (\d+) were not reached\.")
_FAILURE = re.compile(r": (?:failed|error): |^(?:FAILED|ERROR) ")
_FAILED_ROW = re.compile(r" (?:FAILED|ERROR): ")  # of a self-test that did not get to its last lines


@dataclass(frozen=True)
class Part:
    """A part of a check.

    Attributes:
        name: Name of the part, from which those of its logs follow.
        commands: Run in parallel, each with its own log.
        skip: Why the part is skipped; None if it runs.
        environment: Additional environment variables.
    """

    name: str
    commands: list[list[str]]
    skip: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a part ended.

    Attributes:
        name: Name of the part.
        status: "passed", "failed", "skipped", STOPPED or NOT_REACHED, for which no time was left.
        seconds: Duration.
        last_line: The counts of its self-tests, else the last line that it printed, or why it did not run.
        problems: Lines of the logs of commands that did not pass: what failed, and what ran last.
    """

    name: str
    status: str
    seconds: float
    last_line: str
    problems: tuple[str, ...] = ()


def run(part: Part, folder: Path, site: str, limit: float, keep: Callable[[], None] = lambda: None) -> Outcome:
    """Run a part for at most `limit` seconds, with the output of each command in a log in `folder`.

    Args:
        part: What to run.
        folder: Folder of the logs.
        site: Folder with bertfast and bench, for PYTHONPATH.
        limit: Time limit in seconds.
        keep: Called every few seconds.
    """
    if part.skip is not None:
        return Outcome(part.name, "skipped", 0.0, part.skip)
    if limit <= 0:
        return Outcome(part.name, NOT_REACHED, 0.0, "no time is left")
    environment = with_site(site) | part.environment | {END: str(time.time() + limit)}
    stem = re.sub(r"[^\w-]+", "_", part.name)
    logs = [folder / f"{stem}{'_' * bool(i)}{i or ''}.log" for i in range(len(part.commands))]
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        processes = []
        for command, log in zip(part.commands, logs, strict=True):
            output = stack.enter_context(log.open("w", encoding="utf-8"))
            output.write(f"$ {' '.join(command)}\n")
            output.flush()
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    process_group=0,  # of this session, which may be killed as a whole
                )
            )
        statuses = _wait(processes, started + limit, keep)
    return _outcome(part.name, statuses, logs, time.monotonic() - started)


def with_site(site: str) -> dict[str, str]:
    """Return the environment of a process that finds bertfast and bench in the folder `site`."""
    path = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
    # With PYTHONSAFEPATH the current folder is not on the path, where `kernels` would hide the package of that name.
    return os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def exit_on_signals() -> None:
    """Make signals that end this process raise an exception, so that it also ends the commands that it runs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # commands inherit it, even if the shell ignored it
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _exit)


def _exit(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def pack(folder: Path, target: Path) -> None:
    """Write all files of `folder` to the tar file `target`, which is replaced atomically."""
    unfinished = target.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, f"{target.stem}/{file.name}")
    os.replace(unfinished, target)


def _outcome(name: str, statuses: list[str], logs: list[Path], seconds: float) -> Outcome:
    status = next(status for status in ("failed", STOPPED, "passed") if status in statuses)
    printed = [_lines(log) for log in logs]
    last_line = _counts(printed) or printed[statuses.index(status)][-1]
    problems = [
        f"{log.name}: {line}"
        for log, lines, each in zip(logs, printed, statuses, strict=True)
        if each != "passed"
        for line in _problems(lines)
        if line != last_line
    ]
    return Outcome(name, status, seconds, last_line, tuple(problems))


def _lines(log: Path) -> list[str]:
    """Return what a command printed, without empty lines and repeated spaces."""
    _, *lines = log.read_text(encoding="utf-8", errors="replace").splitlines()  # the first is the command
    return [text for line in lines if (text := " ".join(line.split()).strip("= "))] or ["no output"]


def _counts(printed: list[list[str]]) -> str | None:
    """Return the sums of the counts of self-tests; None if no log has any."""
    found = [match for lines in printed for line in lines if (match := _COUNTS.fullmatch(line))]
    if not found:
        return None
    passed, checks, unreached = (sum(map(int, column)) for column in zip(*(m.groups() for m in found), strict=True))
    silent = len(printed) - len(found)
    unfinished = f"; {silent} of {len(printed)} processes did not finish" if silent else ""
    return f"{passed} of {checks} checks passed, {unreached} were not reached{unfinished}."


def _problems(lines: list[str]) -> list[str]:
    """Return the lines that name what failed, and the last line."""
    failures = [line for line in lines if _FAILURE.search(line)] or [line for line in lines if _FAILED_ROW.search(line)]
    return list(dict.fromkeys([*failures, lines[-1]]))


def _wait(processes: Sequence[subprocess.Popen[bytes]], end: float, keep: Callable[[], None]) -> list[str]:
    """Return how each process ended; at `end`, running ones are interrupted and then killed with their children."""
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            before = time.monotonic()
            while time.monotonic() < min(end, before + PACKING) and any(
                process.poll() is None for process in processes
            ):
                time.sleep(0.05)
            keep()
        stopped = [process for process in processes if process.poll() is None]
        for process in stopped:
            process.send_signal(signal.SIGINT)  # pytest then writes its results
        grace = time.monotonic() + GRACE
        for process in stopped:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(grace - time.monotonic(), 0))
        return [
            STOPPED if process in stopped else "failed" if process.returncode else "passed" for process in processes
        ]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and its children
            process.wait()
