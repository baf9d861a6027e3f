"""Shared parts of the benchmarks: timing, result files with their origin, and the check for uncommitted changes.

Everything runs on the GPU if there is one. A program that writes results calls `require_clean_tree` before it measures,
so that each file in bench/results/ belongs to a commit. By default that is one in the folder of this processor.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bertfast.cli.doctor import driver_version, package_version
from bertfast.ops import cuda_build, native
from bertfast.runtime.machine import output_of, processor

if TYPE_CHECKING:
    from transformers import BertConfig

ROOT = Path(__file__).resolve().parents[1]  # `bench` may be a link, see `gpu_check`
RESULTS = ROOT / "bench" / "results"
DATA = ROOT.parent / "shared" / "data"  # texts next to the checkout, which are not part of the project
PUBLISHED = ROOT / "build" / "minilm"  # a package with a published model, see the Makefile
PACKAGES = ["torch", "triton", "transformers", "numpy", "tokenizers", "liger-kernel", "cut-cross-entropy"]
PACKAGES += ["onnxruntime", "openvino", "nncf", "sentence-transformers", "optimum", "accelerate", "datasets"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"

ROUND_SECONDS = 0.01  # shortest round of `device_seconds` on a GPU, so that launch overhead is negligible
MAX_REPETITIONS = 500  # of all calls in a round
TOTAL_SECONDS = 0.2 if ON_GPU else 0.02  # approximate duration of all rounds of `device_seconds`
MIN_ROUNDS = 2  # rounds in one mode of the machine from which a median is taken
FULL_SPEED = 0.7  # share of the threads that must run in parallel for the cores to count as independent


class Sample(NamedTuple):
    """A timed call.

    Attributes:
        seconds: Duration of the call.
        cores: Threads that ran in parallel just before and just after the call, the smaller of the two measurements.
    """

    seconds: float
    cores: float


def stopwatch(function: Callable[[], object]) -> float:
    """Return the seconds of one call; on a GPU measured by CUDA events, without the wait before the device starts."""
    if not ON_GPU:
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def parallel_cores() -> float:
    """Return how many threads run in parallel at full speed; virtual cores may share a physical one."""
    threads = torch.get_num_threads()
    if ON_GPU or threads == 1:
        return float(threads)
    rows, right = torch.ones(threads * 256, 256), torch.ones(256, 256)
    torch.set_num_threads(1)
    alone = min(stopwatch(lambda: rows[:256] @ right) for _ in range(3))
    torch.set_num_threads(threads)
    return threads * alone / min(stopwatch(lambda: rows @ right) for _ in range(3))


def side_by_side(
    functions: Mapping[str, Callable[[], object]], repeats: int, *, warm: bool = False
) -> dict[str, list[Sample]]:
    """Time functions alternately, A B A B …, after an untimed round, so that drift of the machine affects all of them.

    A round in which the cores were not independent is repeated, until `repeats` rounds were good or twice as many ran.

    Args:
        functions: What to time.
        repeats: Number of good rounds.
        warm: Whether an untimed round has run already.

    Returns:
        The samples of each function, one per round.
    """
    for function in functions.values() if not warm else ():
        function()
    rounds: list[list[Sample]] = []
    good, cores = 0, parallel_cores()
    while good < repeats and len(rounds) < 2 * repeats:
        rounds.append([])
        for function in functions.values():
            elapsed, before, cores = stopwatch(function), cores, parallel_cores()
            rounds[-1].append(Sample(elapsed, min(before, cores)))
        good += all(map(_at_full_speed, rounds[-1]))
    return {name: list(column) for name, column in zip(functions, zip(*rounds, strict=True), strict=True)}


def in_one_mode(*columns: list[Sample]) -> list[tuple[float, ...]]:
    """Return the seconds of the rounds that ran in one mode of the machine, a tuple per round.

    These are the rounds with independent cores; if there are fewer than MIN_ROUNDS, the rounds in which the cores were
    never independent; if these are too few as well, all rounds.
    """
    rounds = list(zip(*columns, strict=True))
    independent = [all(map(_at_full_speed, samples)) for samples in rounds]
    shared = [not any(map(_at_full_speed, samples)) for samples in rounds]
    chosen = next((mode for mode in (independent, shared) if sum(mode) >= MIN_ROUNDS), [True] * len(rounds))
    return [tuple(s.seconds for s in samples) for samples, good in zip(rounds, chosen, strict=True) if good]


def _at_full_speed(sample: Sample) -> bool:
    return sample.cores >= FULL_SPEED * torch.get_num_threads()


def seconds_of(samples: list[Sample]) -> list[float]:
    """Return the seconds of the samples that were taken in one mode of the machine."""
    return [seconds for (seconds,) in in_one_mode(samples)]


def median_ratio(slow: list[Sample], fast: list[Sample]) -> float:
    """Return the median of the ratios per round of two functions that were timed alternately."""
    return statistics.median(a / b for a, b in in_one_mode(slow, fast))


def reason_of(error: BaseException) -> str:
    """Return an error in one line for a result file, without paths of this machine in brackets."""
    return re.sub(r" \(/[^)]*\)", "", f"{type(error).__name__}: {error}".strip().splitlines()[0])


@contextmanager
def time_limit(seconds: int, error: type[Exception] = TimeoutError) -> Iterator[None]:
    """Raise an error in the body after `seconds` (0: never); a call that hangs in C code is not interrupted."""

    def stop(*_: object) -> None:
        raise error(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def compile_backward_with_forward() -> None:
    """Have torch.compile compile a backward pass together with its forward pass, if this version of PyTorch can.

    By default a thread of autograd compiles it in the first backward pass, while the main thread, which alone receives
    the signal of `time_limit`, waits in C++ code.
    """
    import torch._functorch.config as config

    if hasattr(config, "force_non_lazy_backward_lowering"):
        config.force_non_lazy_backward_lowering = True


def device_seconds(calls: Sequence[Callable[[], object]]) -> tuple[list[float], str]:
    """Time calls of one function on different inputs, so that no round finds its inputs in a cache.

    On a GPU a round is the replay of a CUDA graph, so that launches leave no gaps. A call that synchronises with the
    device cannot be captured; its rounds are plain calls between CUDA events, and the gaps are part of its time.

    Returns:
        The seconds per call, a mean for each round, and the clock: "graph", "events" or, on a CPU, "host".
    """
    results: list[object] = [None] * len(calls)

    def run_all(times: int) -> None:
        for _ in range(times):
            for index, call in enumerate(calls):
                results[index] = call()  # kept for a round, so that the outputs rotate through memory too

    run_all(1)  # compiles and tunes
    times = _repetitions(stopwatch(lambda: run_all(1))) if ON_GPU else 1
    if not ON_GPU:
        clock, run = "host", lambda: run_all(times)
    elif _never_synchronises(calls[0]):
        # Checked first, because a failed capture leaves the allocator unusable.
        graph = _capture(partial(run_all, times))
        # Launches may take longer than the kernels: without them as many calls can be much shorter than a round.
        needed = _repetitions(stopwatch(graph.replay) / times)
        if needed > times:
            del graph
            times = needed
            graph = _capture(partial(run_all, times))
        clock, run = "graph", graph.replay
    else:
        clock, run = "events", lambda: run_all(times)
    rounds = min(max(round(TOTAL_SECONDS / stopwatch(run)), 5), 50)
    samples = seconds_of(side_by_side({"run": run}, rounds)["run"])
    return [seconds / (times * len(calls)) for seconds in samples], clock


def _repetitions(seconds: float) -> int:
    """Return how many repetitions of `seconds` make a round."""
    return min(max(round(ROUND_SECONDS / seconds), 1), MAX_REPETITIONS)


def _capture(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of what a function launches, which has been replayed once: the first replay is slower."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        function()
    graph.replay()
    return graph


def _never_synchronises(call: Callable[[], object]) -> bool:
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def hf_config(config: BertConfig, attention: str | None = "sdpa") -> BertConfig:
    """Return a configuration for a model of transformers, with the name of its implementation of attention."""
    from transformers import CONFIG_MAPPING

    kind: Any = CONFIG_MAPPING[config.model_type]
    found: BertConfig = kind.from_dict({**config.to_dict(), "attn_implementation": attention})
    return found


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


def changed_files(root: Path) -> list[str]:
    """Return the tracked files with uncommitted changes, except results and the log."""
    lines = output_of("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", "--", ".", *_NOT_SOURCES)
    return [line[2:].strip() for line in lines.splitlines()]


def commit_of(root: Path, has_changes: bool) -> str:
    """Return the commit of a checkout, with "+changes" if it has uncommitted ones; else that of BERTFAST_COMMIT."""
    found = output_of("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    return found + "+changes" * has_changes if found else os.environ.get("BERTFAST_COMMIT", "")


def require_clean_tree(target: Path) -> None:
    """End the program if it would write into bench/results/ although it is not known which commit was measured.

    Args:
        target: File or folder to which results are to be written.

    Raises:
        SystemExit: There is no commit, or tracked files have uncommitted changes. The message says what to do.
    """
    if not target.resolve().is_relative_to(RESULTS):
        return
    if not _COMMIT:
        raise SystemExit(
            "no results are written to bench/results/ without a repository: set BERTFAST_COMMIT to the commit of these "
            "files, or name another folder with --results"
        )
    if _CHANGED:
        files = ", ".join(_CHANGED[:3]) + ", …" * (len(_CHANGED) > 3)
        raise SystemExit(
            f"no results are written to bench/results/ with uncommitted changes ({files}): commit them, or name "
            "another folder with --results"
        )


def origin() -> dict[str, Any]:
    """Return when, at which commit, on which hardware and with which versions a result was measured."""
    return {
        "date": date.today().isoformat(),
        "commit": _COMMIT,
        **({"gpu": _gpu(), "library": _library()} if ON_GPU else {}),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := package_version(name))},
    }


def write_result(name: str, values: dict[str, Any], folder: Path) -> Path:
    """Write the values and their origin to the file NAME.json in `folder`; return its path."""
    require_clean_tree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"origin": origin(), **values}, indent=1) + "\n", encoding="utf-8")
    return path


def machine_folder(results: Path = RESULTS) -> Path:
    """Return the folder below `results` for this processor, which never has files of another one.

    It is the one that has most of its results and none of others, or a new one that is named after it.
    """
    mine = processor()
    folders: dict[Path, list[Any]] = {}
    for file in sorted(results.rglob("*.json")):
        if file.parent != results:  # those of several CPUs are in `results` itself
            folder = results / file.relative_to(results).parts[0]
            folders.setdefault(folder, []).append(origin_of(file).get("processor"))
    own = [folder for folder, owners in folders.items() if set(owners) == {mine}]
    if own:
        return max(own, key=lambda folder: len(folders[folder]))
    name = re.sub(r"[^a-z0-9]+", "-", mine.lower().replace("(r)", "")).strip("-")
    taken = {folder.name for folder in folders}
    return results / next(each for each in chain([name], (f"{name}-{n}" for n in count(2))) if each not in taken)


def origin_of(file: Path) -> dict[str, Any]:
    """Return the origin of a result file; empty if it has none or cannot be read."""
    try:
        origin = json.loads(file.read_text(encoding="utf-8")).get("origin", {})
    except (OSError, ValueError, AttributeError):
        return {}
    return origin if isinstance(origin, dict) else {}


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(DEVICE)
    clocks = output_of("nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits")
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9),
        "l2_cache_mb": round(properties.L2_cache_size / 1e6),
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        "max_sm_mhz": clocks.partition("\n")[0],
    }


def _library() -> dict[str, str | None]:
    """Return what identifies the native library: the nvcc and the commit of its build, and a hash of the file."""
    if native.UNAVAILABLE_REASON is not None:
        return {}
    digest = hashlib.sha256(native.path().read_bytes()).hexdigest()[:16]
    built = cuda_build.BUILD
    return {"sha256": digest, **({} if built is None else {"nvcc": built.nvcc, "commit": built.commit})}


_NOT_SOURCES = (":(exclude)bench/results", ":(exclude)bench/LOG.md")
# Both are read when the program starts: the code that runs does not change when files are edited meanwhile.
_CHANGED = changed_files(ROOT)
_COMMIT = commit_of(ROOT, bool(_CHANGED))
