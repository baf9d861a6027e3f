"""Every operation on a CPU beside its alternatives, in turn A B A B …, each sample between two probes of the cores.

    python -m bench.cpu_operators [OPERATION …] [--shapes cpu|small] [--seconds S] [--results FOLDER]

The contenders and cases of `bench/ops`, each first held to float64. The floor is what a copy of as many bytes takes, in
the same rounds, or the products at the rate that blocks (attention) or matrices are multiplied here. Memory that is
freed is kept, so that no one's results cost page faults. FOLDER gets cpu_operators.json, summary.md and plots.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from statistics import median
from types import ModuleType

import pytest
import torch

from bench.cases import OUR_MASKS, WRONG, Case, calls, checked, measured
from bench.harness import (
    DEVICE,
    ON_GPU,
    RESULTS,
    block_rate,
    matrix_rate,
    median_ratio,
    seconds_of,
    side_by_side,
    stopwatch,
    write_result,
)
from bench.report import plot, read, short, summary
from bertfast.ops import native
from bertfast.runtime.malloc import keep_freed_memory
from bertfast.runtime.precision import has_bf16_gemm

OPERATIONS = sorted(path.stem for path in Path(__file__).parent.glob("ops/[!_]*.py") if path.stem != "conftest")
PRODUCTS = ("linear_gelu", "linear_cross_entropy")  # their products are PyTorch's
ROUNDS = (5, 50)  # at least and at most
SETS = 2  # of inputs, that take turns
SLOW = 50  # times as slow as ours: not worth the rounds; beyond all that is aimed at
NO_BF16 = "this processor multiplies no bf16, and PyTorch's products are many times slower in it"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", default=OPERATIONS, metavar="OPERATION", help=", ".join(OPERATIONS))
    parser.add_argument("--shapes", choices=("cpu", "small"), default="cpu")
    parser.add_argument("--seconds", type=float, default=5, help="for the rounds of a case in one direction, about")
    parser.add_argument("--results", type=Path, default=RESULTS / "cpu-operators")
    arguments = parser.parse_args()
    if unknown := set(arguments.operations) - set(OPERATIONS):
        parser.error(f"there is no operation {', '.join(sorted(unknown))}; there are {', '.join(OPERATIONS)}")
    if ON_GPU:
        parser.error("this is for a CPU; where there is a GPU `make gpu-check` measures")
    keep_freed_memory()
    runs, not_timed = [], []
    for operation in arguments.operations:
        module = import_module(f"bench.ops.{operation}")
        for case in module.CASES[arguments.shapes]:
            print(operation, case, file=sys.stderr, flush=True)
            runs += measure(module, case, arguments.seconds, not_timed)
    result = {
        "instruction_set": None if native.UNAVAILABLE_REASON else native.instruction_set(),
        "rates_gflops": {name: rate / 1e9 for name, rate in rates().items()},
        "benchmarks": runs,
        "not_timed": not_timed,
        "goals": list(reached(runs)),
    }
    results = read([write_result("cpu_operators", result, arguments.results)])
    (arguments.results / "summary.md").write_text(summary(results), encoding="utf-8")
    plot(results, arguments.results)
    print(f"{short(results)}\n\nwritten to {arguments.results}")
    return int(any(entry["provider"] == "bertfast" and entry["reason"] != NO_BF16 for entry in not_timed))


def measure(module: ModuleType, case: Case, seconds: float, not_timed: list[dict]) -> Iterator[dict]:
    """Time a case's contenders that are right, each direction for about `seconds`; the others go to `not_timed`."""
    operation, ready = module.__name__.rpartition(".")[2], {}
    for name, provider in module.PROVIDERS.items():
        with reasons(not_timed, operation=operation, case=str(case), provider=name, direction="any"):
            if operation in PRODUCTS and case.dtype == torch.bfloat16 and not has_bf16_gemm(DEVICE):
                pytest.skip(NO_BF16)
            made, error = checked(provider, case, name in OUR_MASKS)
            if not error <= WRONG[case.dtype]:
                pytest.skip(f"wrong, so not timed: its relative error is {error:.2g}")
            ready[name] = made, error
    for direction in case.directions if ready else ():
        work, functions, once = case.work(direction), {}, {}
        for name, (made, _) in ready.items():
            with reasons(not_timed, operation=operation, case=str(case), provider=name, direction=direction):
                some = calls(case, made, direction)[:SETS]
                took = stopwatch(some[0])
                if took > SLOW * once.get("bertfast", took):
                    pytest.skip(f"more than {SLOW} times as slow as ours: a call took {took:.3g} s")
                functions[name], once[name] = in_turn(some), took
        functions["copy"] = in_turn([copying(work.bytes) for _ in range(SETS)])
        rounds = round(seconds / (SETS * sum(once.values())))
        samples = side_by_side(functions, min(max(rounds, ROUNDS[0]), ROUNDS[1]))
        copied = median(seconds_of(samples.pop("copy"))) / SETS
        floor = max(copied, work.flops / rates()[rate_name(operation, case)])
        for name, mine in samples.items():
            of_one_mode = [some / SETS for some in seconds_of(mine)]
            info = measured(case, name, direction, of_one_mode, floor, ready[name][1])
            info |= {"operation": operation, "clock": "host", "extra_memory_bytes": None, "copy_s": copied}
            info["times_ours"] = median_ratio(mine, samples["bertfast"]) if "bertfast" in samples else None
            info["cores"] = [round(sample.cores, 2) for sample in mine]
            yield {"extra_info": info, "stats": {"median": median(of_one_mode)}}


@contextlib.contextmanager
def reasons(not_timed: list[dict], **where: str) -> Iterator[None]:
    """Let nothing through that stops a contender, and note why."""
    try:
        yield
    except (Exception, pytest.skip.Exception) as error:
        reason = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        not_timed.append({**where, "reason": reason.removeprefix("Skipped: ")})


def in_turn(functions: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """All of them in a row; their results are kept until the next time, so that the memory of these rotates too."""
    results = [None] * len(functions)

    def run() -> None:
        for place, function in enumerate(functions):
            results[place] = function()

    return run


def copying(moved: int) -> Callable[[], torch.Tensor]:
    """A copy that reads and writes `moved` bytes in all."""
    source = torch.ones(max(moved // 8, 1))
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def rate_name(operation: str, case: Case) -> str:
    """Which rate bounds the products of an operation."""
    kind = "blocks" if operation == "attention" and rates().get("blocks fp32") else "matrices"
    return f"{kind} {'fp32' if case.dtype == torch.float32 else 'bf16'}"


@cache
def rates() -> dict[str, float]:
    """FLOP/s of blocks of 64³, all threads together, where a compiler is there, and of a layer's products; bf16 may
    be multiplied in fp32 where that is faster."""
    found = {}
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        found[f"matrices {name}"] = matrix_rate([(2048, 768, 768)], dtype)
        if blocks := block_rate(dtype):
            found[f"blocks {name}"] = blocks
    found["matrices bf16"] = max(found["matrices bf16"], found["matrices fp32"])
    return found


# (operation, case without its precision, direction): {(who, precision): how many times our time, or "floor", the share}
GOALS = {
    ("attention", "8x512-d64", "forward"): {("sdpa", "bf16"): 2.5, ("sdpa", "fp32"): 1.4, ("floor", "bf16"): 0.8},
    ("attention", "8x512-d64", "backward"): {("sdpa", "bf16"): 2.5, ("sdpa", "fp32"): 1.4, ("floor", "bf16"): 0.8},
    ("attention", "32x128-d64", "forward"): {("sdpa", "bf16"): 2.7, ("sdpa", "fp32"): 1.4, ("floor", "bf16"): 0.68},
    ("attention", "32x128-d64", "backward"): {("sdpa", "bf16"): 4.5, ("sdpa", "fp32"): 1.4, ("floor", "bf16"): 0.68},
    ("attention", "64-ragged-d64", "forward"): {("sdpa", "bf16"): 14, ("sdpa-loop", "bf16"): 3},
    ("attention", "64-ragged-d64", "backward"): {("sdpa", "bf16"): 14, ("sdpa-loop", "bf16"): 3},
    ("attention", "8x512-d64-p0.1", "forward"): {("bertfast-p0", "bf16"): 1 / 1.12},
    ("attention", "8x512-d64-p0.1", "backward"): {("bertfast-p0", "bf16"): 1 / 1.12},
    ("add_layer_norm", "4096x768-p0.1", "forward"): {("torch", "fp32"): 12, ("torch", "bf16"): 12},
    ("add_layer_norm", "4096x768", "forward"): {
        ("torch", "fp32"): 1.8,
        ("torch", "bf16"): 3,
        ("floor", "fp32"): 0.8,
        ("floor", "bf16"): 0.8,
    },
    ("bias_gelu", "4096x768", "forward"): {("gelu.out", "fp32"): 1.2, ("gelu.out", "bf16"): 1.2},
}


def reached(runs: list[dict]) -> Iterator[dict]:
    """Each goal of which both sides were timed, and what was reached."""
    timed = {}
    for info in (run["extra_info"] for run in runs):
        timed[info["operation"], info["case"], info["direction"], info["provider"]] = info
    for (operation, case, direction), goals in GOALS.items():
        for (who, precision), wanted in goals.items():
            name = case + ("-fp32" if precision == "fp32" else "")
            info = timed.get((operation, name, direction, "bertfast" if who == "floor" else who))
            if info:
                value = info["share_of_floor" if who == "floor" else "times_ours"]
                where = {"operation": operation, "case": name, "direction": direction, "against": who}
                yield {**where, "wanted": round(wanted, 2), "reached": value}


if __name__ == "__main__":
    sys.exit(main())
