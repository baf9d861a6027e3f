"""What the benchmarks share: the clocks, the ceilings of the machine, and results with their origin.

Everything runs on the GPU if there is one. Run as a program, it measures the ceilings:

    python -m bench.harness [--results FOLDER]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from bertfast.cli.doctor import driver_version
from bertfast.ops.matmul import linear

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parents[2] / "shared" / "data"  # beside the checkout: texts that are no part of the project
PACKAGES = ("torch", "triton", "transformers", "numpy", "tokenizers", "liger-kernel", "cut-cross-entropy")
PACKAGES += ("onnxruntime", "openvino")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"

# A round of `device_seconds` lasts at least ROUND seconds on a GPU, against which a launch is nothing, and its rounds
# together about BUDGET.
ROUND = 0.01
BUDGET = 0.2 if ON_GPU else 0.02
FEW = 2  # rounds in one mode of the machine that say something
APART = 0.7  # of the threads, which work side by side where the cores are a core each


def stopwatch(function: Callable[[], object]) -> float:
    """Seconds of one call; on a GPU by CUDA events, from when the device could begin until it has ended."""
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
    return start.elapsed_time(end) / 1000


class Sample(NamedTuple):
    """Seconds of a call, and how many threads worked side by side just before and just after it, at least."""

    seconds: float
    cores: float


def cores_at_work() -> float:
    """How many threads' work all threads do in the time of one: cores may be a core each, or behave like one."""
    threads = torch.get_num_threads()
    if ON_GPU or threads == 1:
        return float(threads)
    rows, right = torch.ones(threads * 256, 256), torch.ones(256, 256)
    torch.set_num_threads(1)
    alone = min(stopwatch(lambda: rows[:256] @ right) for _ in range(3))
    torch.set_num_threads(threads)
    return threads * alone / min(stopwatch(lambda: rows @ right) for _ in range(3))


def side_by_side(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[Sample]]:
    """Samples of each function, in turn A B A B …, after one uncounted round; so a drift of the machine hits all.

    A round in which the cores did not stay apart is repeated, until there are `repeats` that did or twice as many in
    all.
    """
    for function in functions.values():
        function()
    rounds, good, cores = [], 0, cores_at_work()
    while good < repeats and len(rounds) < 2 * repeats:
        rounds.append([])
        for function in functions.values():
            elapsed, before, cores = stopwatch(function), cores, cores_at_work()
            rounds[-1].append(Sample(elapsed, min(before, cores)))
        good += all(map(_apart, rounds[-1]))
    return {name: list(column) for name, column in zip(functions, zip(*rounds, strict=True), strict=True)}


def in_one_mode(*columns: list[Sample]) -> list[tuple[float, ...]]:
    """The seconds of the rounds, of these functions, in which the cores stayed apart; if these are few, of those in
    which they never did; if these are few too, of all."""
    rounds = list(zip(*columns, strict=True))
    apart = [all(map(_apart, samples)) for samples in rounds]
    together = [not any(map(_apart, samples)) for samples in rounds]
    chosen = next((mode for mode in (apart, together) if sum(mode) >= FEW), [True] * len(rounds))
    return [tuple(s.seconds for s in samples) for samples, good in zip(rounds, chosen, strict=True) if good]


def _apart(sample: Sample) -> bool:
    return sample.cores >= APART * torch.get_num_threads()


def seconds_of(samples: list[Sample]) -> list[float]:
    """The seconds of the samples in one mode."""
    return [seconds for (seconds,) in in_one_mode(samples)]


def median_ratio(slow: list[Sample], fast: list[Sample]) -> float:
    """The median of the pairwise ratios of two functions timed in turn, in one mode of the machine."""
    return statistics.median(a / b for a, b in in_one_mode(slow, fast))


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the code inside after so many seconds (0: never); a call that hangs in C goes on."""

    def stop(*_) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def device_seconds(calls: Sequence[Callable[[], object]]) -> tuple[list[float], str]:
    """Seconds of one call: samples, each the mean over a round in which `calls` follow one another; and the clock.

    The calls are one function on inputs of its own each, so that no round finds its inputs in a cache. On a GPU a
    round is the replay of a CUDA graph, so that launches leave no gaps ("graph"). A call that waits for the device
    cannot be recorded; there the gaps are its own, and rounds are plain calls between CUDA events ("events"). On a
    CPU the clock is "host".
    """
    results = [None] * len(calls)

    def play(times: int) -> None:
        for _ in range(times):
            for place, call in enumerate(calls):
                results[place] = call()  # kept for a round: the memory of results rotates too

    play(1)  # compiles and tunes
    times = min(max(round(ROUND / stopwatch(lambda: play(1))), 1), 100) if ON_GPU else 1
    if not ON_GPU:
        clock, run = "host", lambda: play(times)
    elif _never_waits(calls[0]):
        # A broken capture would leave the allocator unusable, hence the question before.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            play(times)
        clock, run = "graph", graph.replay
    else:
        clock, run = "events", lambda: play(times)
    rounds = min(max(round(BUDGET / stopwatch(run)), 5), 50)
    samples = seconds_of(side_by_side({"run": run}, rounds)["run"])
    return [seconds / (times * len(calls)) for seconds in samples], clock


def _never_waits(call: Callable[[], object]) -> bool:
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def matrix_rate(shapes: list[tuple[int, int, int]], dtype: torch.dtype, repeats: int = 3) -> float:
    """FLOP/s of the products [m, k] [k, n] of `shapes`, all in a row, on random data: the best of `repeats`."""
    options = {"dtype": dtype, "device": DEVICE}
    operands = {(m, k, n): (torch.randn(m, k, **options), torch.randn(n, k, **options)) for m, k, n in set(shapes)}
    work = sum(2 * m * k * n for m, k, n in shapes)

    def multiply() -> None:
        for shape in shapes:
            linear(*operands[shape])

    return work / min(side_by_side({"products": multiply}, repeats)["products"]).seconds


@cache
def block_rate(dtype: torch.dtype, repeats: int = 300) -> float | None:
    """FLOP/s of all threads if each multiplied blocks of 64³ in its cache as one core does alone; None if no compiler
    can build `block_product.cpp`."""
    source, times = Path(__file__).with_name("block_product.cpp"), 40
    flags = ["-shared", "-fPIC", "-std=c++20", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno"]
    with TemporaryDirectory() as folder:
        target = str(Path(folder, "block_product.so"))
        try:
            subprocess.run(["c++", *flags, str(source), "-o", target], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        multiply = ctypes.CDLL(target).multiply_blocks
    best = min(stopwatch(lambda: multiply(dtype == torch.bfloat16, times)) for _ in range(repeats))
    return torch.get_num_threads() * times * 2 * 64**3 / best


def copy_bandwidth(bytes_to_copy: int, repeats: int = 10) -> float:
    """Bytes/s of a copy within the device's memory, read and written both counted: the best of `repeats`."""
    source = torch.randn(bytes_to_copy // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * bytes_to_copy / min(side_by_side({"copy": lambda: target.copy_(source)}, repeats)["copy"]).seconds


def ceilings() -> dict[str, float]:
    """What bounds any kernel: {"flops": of bf16 products, "bytes": to and from memory}, per second, measured now."""
    size, copied = (8192, 2 << 30) if ON_GPU else (256, 32 << 20)
    return {"flops": matrix_rate([(size,) * 3] * 4, torch.bfloat16, 10), "bytes": copy_bandwidth(copied)}


def origin() -> dict:
    """Where and with what a result was measured."""
    return {
        "date": date.today().isoformat(),
        "commit": _COMMIT,
        **({"gpu": _gpu()} if ON_GPU else {}),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def write_result(name: str, values: dict, folder: Path = RESULTS) -> Path:
    """Write NAME.json into `folder`: the values and their origin."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"origin": origin(), **values}, indent=1) + "\n", encoding="utf-8")
    return path


def _answer(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # there is no such program
        return ""


def _commit() -> str:
    git = ("git", "-C", str(RESULTS.parent))
    changed = _answer(*git, "status", "--porcelain", "--untracked-files=no")
    return _answer(*git, "rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")


def _gpu() -> dict:
    properties = torch.cuda.get_device_properties(DEVICE)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9),
        "second_level_cache_mb": round(properties.L2_cache_size / 1e6),
        "cuda": torch.version.cuda,
        "driver": driver_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {name.strip(): value.strip() for name, value in fields.items()}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in values.get("flags", "").split()]
    return f"{values.get('model name', platform.machine())} (family {values.get('cpu family')}, {' '.join(flags)})"


_COMMIT = _commit()  # of the code that runs, whatever is edited meanwhile


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> None:
    """Measure the ceilings, write them to FOLDER/ceilings.json and say them in a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    measured = ceilings()
    write_result("ceilings", {"ceilings": measured}, parser.parse_args().results)
    print(f"bf16 products {measured['flops'] / 1e12:.3g} TFLOP/s, copies {measured['bytes'] / 1e12:.3g} TB/s")


if __name__ == "__main__":
    main()
