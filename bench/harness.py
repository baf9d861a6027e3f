"""Time functions (rounds side by side, medians, CUDA graphs) on the GPU if there is one, and configure models."""

from __future__ import annotations

import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import BertConfig

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
