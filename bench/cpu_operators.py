"""Time every operator on a CPU against its alternatives, alternately, each sample between two probes of the cores.

    python -m bench.cpu_operators [OPERATION …] [--shapes cpu|small] [--seconds S] [--results FOLDER]

Implementations and cases are those of `bench/ops`; each implementation is first compared with float64. The lower bound
is the time of a copy of as many bytes, in the same rounds, or of the matmuls at the measured throughput of 64³ blocks
(attention) or GEMMs (others). Freed memory is kept within a case, so that outputs cause no page faults. FOLDER gets
cpu_operators.json, summary.md and plots.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import pytest
import torch

from bench.arguments import add_names, result_parser
from bench.cases import Case, Implementation, calls, checked, measured
from bench.ceilings import block_throughput, gemm_throughput
from bench.figures import plot_operators
from bench.harness import DEVICE, ON_GPU, median_ratio, seconds_of, side_by_side, stopwatch
from bench.report import read, short, summary
from bench.result_files import require_clean_tree, write_result
from bertfast.ops import native
from bertfast.runtime.malloc import give_freed_memory_back, keep_freed_memory
from bertfast.runtime.precision import has_bf16_gemm

OPERATIONS = sorted(path.stem for path in Path(__file__).parent.glob("ops/[!_]*.py") if path.stem != "conftest")
WITH_GEMM = ("linear_gelu", "linear_cross_entropy")  # run PyTorch's GEMMs
ROUNDS = (5, 50)  # smallest and largest number
SETS = 2  # of inputs, used alternately
MAX_RELATIVE_TIME = 50  # slower implementations, relative to bertfast, are not timed
NO_BF16 = "this processor has no bf16 instructions, and PyTorch's bf16 GEMMs are many times slower on it"


def main() -> int:
    parser = result_parser(__doc__)
    add_names(parser, "operations", "operation", OPERATIONS, default=OPERATIONS)
    parser.add_argument("--shapes", choices=("cpu", "small"), default="cpu", help="sizes; small: to try the program")
    parser.add_argument("--seconds", type=float, default=5, help="approximate seconds per case and direction")
    arguments = parser.parse_args()
    if ON_GPU:
        parser.error("this program measures a CPU; on a GPU run `make gpu-check`")
    require_clean_tree(arguments.results)
    keep_freed_memory()
    runs: list[dict[str, Any]] = []
    not_timed: list[dict[str, Any]] = []
    for operation in arguments.operations:
        module = import_module(f"bench.ops.{operation}")
        for case in module.CASES[arguments.shapes]:
            print(operation, case, file=sys.stderr, flush=True)
            runs += measure(operation, module, case, arguments.seconds, not_timed)
            give_freed_memory_back()  # what one case has left is too small for the tensors of the next
    result = {
        "instruction_set": None if native.UNAVAILABLE_REASON else native.instruction_set(),
        "throughput_gflops": {name: rate / 1e9 for name, rate in throughputs().items()},
        "benchmarks": runs,
        "not_timed": not_timed,
        "goals": list(reached_goals(runs)),
    }
    results = read([write_result("cpu_operators", result, arguments.results)])
    (arguments.results / "summary.md").write_text(summary(results), encoding="utf-8")
    plot_operators(results, arguments.results)
    print(f"{short(results)}\n\nwritten to {arguments.results}")
    return int(any(entry["implementation"] == "bertfast" and entry["reason"] != NO_BF16 for entry in not_timed))


def measure(
    operation: str, module: ModuleType, case: Case, seconds: float, not_timed: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Time the correct implementations of a case, about `seconds` per direction; append the others to `not_timed`."""
    ready = {}
    for name, factory in module.IMPLEMENTATIONS.items():
        with noted(not_timed, operation=operation, case=str(case), implementation=name, direction="any"):
            if operation in WITH_GEMM and case.dtype == torch.bfloat16 and not has_bf16_gemm(DEVICE):
                pytest.skip(NO_BF16)
            made, error, wrong = checked(factory, case, name)
            if wrong:
                pytest.skip(wrong)
            ready[name] = made, error
    for direction in case.directions if ready else ():
        functions: dict[str, Callable[[], object]] = {}
        once: dict[str, float] = {}
        for name, (made, _) in ready.items():
            with noted(not_timed, operation=operation, case=str(case), implementation=name, direction=direction):
                repeated = calls(case, made, direction)[:SETS]
                elapsed = stopwatch(repeated[0])
                if elapsed > MAX_RELATIVE_TIME * once.get("bertfast", elapsed):
                    pytest.skip(f"more than {MAX_RELATIVE_TIME} times as slow as bertfast: {elapsed:.3g} s per call")
                functions[name], once[name] = in_turn(repeated), elapsed
        rounds = round(seconds / (SETS * sum(once.values())))
        yield from time_direction(operation, case, direction, functions, rounds, ready)


def time_direction(
    operation: str,
    case: Case,
    direction: str,
    functions: dict[str, Callable[[], object]],
    rounds: int,
    ready: dict[str, tuple[Implementation, float]],
) -> Iterator[dict[str, Any]]:
    """Time functions, each of which makes SETS calls, and a copy of as many bytes; yield an entry per function."""
    work = case.work(direction)
    functions["copy"] = in_turn([copying(work.bytes) for _ in range(SETS)])
    samples = side_by_side(functions, min(max(rounds, ROUNDS[0]), ROUNDS[1]))
    copy_seconds = median(seconds_of(samples.pop("copy"))) / SETS
    lower_bound = max(copy_seconds, work.flops / throughputs()[throughput_name(operation, case)])
    for name, timed in samples.items():
        seconds = [sample / SETS for sample in seconds_of(timed)]
        info = measured(case, name, direction, seconds, lower_bound, ready[name][1])
        info |= {"operation": operation, "clock": "host", "extra_memory_bytes": None, "copy_s": copy_seconds}
        info["relative_time"] = median_ratio(timed, samples["bertfast"]) if "bertfast" in samples else None
        info["cores"] = [round(sample.cores, 2) for sample in timed]
        yield {"extra_info": info, "stats": {"median": median(seconds)}}


@contextlib.contextmanager
def noted(not_timed: list[dict[str, Any]], **where: str) -> Iterator[None]:
    """Catch what stops an implementation, and append the reason to `not_timed`."""
    try:
        yield
    except (Exception, pytest.skip.Exception) as error:
        reason = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        not_timed.append({**where, "reason": reason.removeprefix("Skipped: ")})


def in_turn(functions: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """Return a function that calls all, and keeps their outputs until its next call so that they rotate in memory."""
    results: list[object] = [None] * len(functions)

    def run() -> None:
        for index, function in enumerate(functions):
            results[index] = function()

    return run


def copying(moved: int) -> Callable[[], torch.Tensor]:
    """Return a copy that reads and writes `moved` bytes in total."""
    source = torch.ones(max(moved // 8, 1))
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def throughput_name(operation: str, case: Case) -> str:
    """Return the key in `throughputs` of the matmuls of an operation."""
    kind = "blocks" if operation == "attention" and throughputs().get("blocks fp32") else "gemm"
    return f"{kind} {'fp32' if case.dtype == torch.float32 else 'bf16'}"


@cache
def throughputs() -> dict[str, float]:
    """Return the FLOP/s of all threads, of 64³ blocks (if a compiler is available) and of the GEMMs of a layer.

    The value for bf16 GEMMs is that of fp32 where fp32 is faster.
    """
    found = {}
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        found[f"gemm {name}"] = gemm_throughput([(2048, 768, 768)], dtype)
        if blocks := block_throughput(dtype):
            found[f"blocks {name}"] = blocks
    found["gemm bf16"] = max(found["gemm bf16"], found["gemm fp32"])
    return found


# By (operation, case without its precision, direction): the goals by (alternative, precision). A goal is the time of
# the alternative relative to bertfast; that of "lower bound" is the roofline efficiency of bertfast.
GOALS: dict[tuple[str, str, str], dict[tuple[str, str], float]] = {
    ("attention", "8x512-d64", "forward"): {("sdpa", "bf16"): 2.5, ("sdpa", "fp32"): 1.4, ("lower bound", "bf16"): 0.8},
    ("attention", "8x512-d64", "backward"): {
        ("sdpa", "bf16"): 2.5,
        ("sdpa", "fp32"): 1.4,
        ("lower bound", "bf16"): 0.8,
    },
    ("attention", "32x128-d64", "forward"): {
        ("sdpa", "bf16"): 2.7,
        ("sdpa", "fp32"): 1.4,
        ("lower bound", "bf16"): 0.68,
    },
    ("attention", "32x128-d64", "backward"): {
        ("sdpa", "bf16"): 4.5,
        ("sdpa", "fp32"): 1.4,
        ("lower bound", "bf16"): 0.68,
    },
    ("attention", "64-ragged-d64", "forward"): {("sdpa", "bf16"): 14, ("sdpa-loop", "bf16"): 3},
    ("attention", "64-ragged-d64", "backward"): {("sdpa", "bf16"): 14, ("sdpa-loop", "bf16"): 3},
    ("attention", "8x512-d64-p0.1", "forward"): {("bertfast-p0", "bf16"): 1 / 1.12},
    ("attention", "8x512-d64-p0.1", "backward"): {("bertfast-p0", "bf16"): 1 / 1.12},
    ("attention", "2x1024-d64-w64", "forward"): {("bertfast-full", "fp32"): 4, ("bertfast-full", "bf16"): 4},
    ("attention", "2x1024-d64-w64", "backward"): {("bertfast-full", "fp32"): 4, ("bertfast-full", "bf16"): 4},
    ("add_layer_norm", "4096x768-p0.1", "forward"): {("torch", "fp32"): 12, ("torch", "bf16"): 12},
    ("add_layer_norm", "4096x768", "forward"): {
        ("torch", "fp32"): 1.8,
        ("torch", "bf16"): 3,
        ("lower bound", "fp32"): 0.8,
        ("lower bound", "bf16"): 0.8,
    },
    ("bias_gelu", "4096x768", "forward"): {("gelu.out", "fp32"): 1.2, ("gelu.out", "bf16"): 1.2},
}


def reached_goals(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield each goal of which both sides were timed, with what was reached."""
    timed: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for info in (run["extra_info"] for run in runs):
        timed[info["operation"], info["case"], info["direction"], info["implementation"]] = info
    for (operation, case, direction), goals in GOALS.items():
        for (alternative, precision), target in goals.items():
            name = case + ("-fp32" if precision == "fp32" else "")
            bound = alternative == "lower bound"
            info = timed.get((operation, name, direction, "bertfast" if bound else alternative))
            if info:
                value = info["roofline_efficiency" if bound else "relative_time"]
                where = {"operation": operation, "case": name, "direction": direction, "against": alternative}
                yield {**where, "target": round(target, 2), "reached": value}


if __name__ == "__main__":
    sys.exit(main())
