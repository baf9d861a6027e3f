"""What the benchmarks share: the clocks, the ceilings of the machine, and results with their origin.

Everything runs on the GPU if there is one. Run as a program, it measures the ceilings:

    python bench/harness.py [--results FOLDER]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "numpy", "tokenizers", "liger-kernel", "cut-cross-entropy")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"

# A round of `device_seconds` lasts at least ROUND seconds on a GPU, against which a launch is nothing, and its rounds
# together about BUDGET.
ROUND = 0.01
BUDGET = 0.2 if ON_GPU else 0.02


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


def side_by_side(functions: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, in turn A B A B …, after one uncounted round; so a drift of the machine hits all."""
    seconds = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            elapsed = stopwatch(function)
            if repeat:
                seconds[name].append(elapsed)
    return seconds


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
    return [stopwatch(run) / (times * len(calls)) for _ in range(rounds)], clock


def _never_waits(call: Callable[[], object]) -> bool:
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """The median of the pairwise ratios of two functions timed in turn."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def matrix_rate(shapes: list[tuple[int, int, int]], dtype: torch.dtype, repeats: int = 3) -> float:
    """FLOP/s of the products [m, k] [k, n] of `shapes`, all in a row, on random data: the best of `repeats`."""
    options = {"dtype": dtype, "device": DEVICE}
    operands = {(m, k, n): (torch.randn(m, k, **options), torch.randn(n, k, **options)) for m, k, n in set(shapes)}
    work = sum(2 * m * k * n for m, k, n in shapes)

    def multiply() -> None:
        for shape in shapes:
            torch.nn.functional.linear(*operands[shape])

    return work / min(side_by_side({"products": multiply}, repeats)["products"])


def copy_bandwidth(bytes_to_copy: int, repeats: int = 10) -> float:
    """Bytes/s of a copy within the device's memory, read and written both counted: the best of `repeats`."""
    source = torch.randn(bytes_to_copy // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * bytes_to_copy / min(side_by_side({"copy": lambda: target.copy_(source)}, repeats)["copy"])


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
        "driver": _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
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
