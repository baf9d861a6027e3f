"""Measure the throughput of one process and of several, with replicated and with sharded parameters.

    python -m bench.end_to_end.scaling SHARDS [--preset NAME] [--processes N …] [--rounds N] [--results FOLDER]

Each process runs one thread with its own batch. SHARDS is a folder written by `bertfast prepare`. The parallel
efficiency is the throughput divided by that of one process in the same round, and by the number of processes, or of
cores if it is lower.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.arguments import at_least_one, result_parser
from bench.result_files import require_clean_tree, write_result
from bertfast.runtime.precision import has_bf16_gemm

BERTFAST = str(Path(sys.executable).with_name("bertfast"))
TOKENS = 2048  # of a process per step
STEPS, WARMUP = 20, 4


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("shards", type=Path, help="folder of the token shards")
    parser.add_argument("--preset", default="mini", help="size of the model")
    parser.add_argument(
        "--processes", type=at_least_one, nargs="+", default=[2, 4], help="numbers of processes; 1 is always measured"
    )
    parser.add_argument("--rounds", type=at_least_one, default=5, help="runs of each case, which alternate")
    arguments = parser.parse_args()
    require_clean_tree(arguments.results)
    precision = "bf16" if has_bf16_gemm(torch.device("cpu")) else "fp32"
    numbers = sorted({1, *arguments.processes})
    cases = [(processes, sharded) for processes in numbers for sharded in (False, True) if processes > 1 or not sharded]
    rounds = []
    for number in range(1, arguments.rounds + 1):
        rounds.append([tokens_per_second(arguments, *case, precision) for case in cases])
        print(f"round {number}: {', '.join(map(label, cases, rounds[-1]))}", flush=True)
    values = {"preset": arguments.preset, "precision": precision, "tokens_per_process": TOKENS}
    print(f"written to {write_result('scaling', values | compared(cases, rounds), arguments.results)}")


def tokens_per_second(arguments: argparse.Namespace, processes: int, sharded: bool, precision: str) -> float:
    """Return the median over the steps of a run of the throughput of all processes together."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [BERTFAST, "pretrain", "--output-dir", folder, "--data-dir", str(arguments.shards.resolve())]
        command += ["--preset", arguments.preset, "--max-seq-length", "128", "--tokens-per-batch", str(TOKENS)]
        command += ["--max-steps", str(STEPS), "--logging-steps", "1", "--eval-batches", "1", "--device", "cpu"]
        command += ["--precision", precision, *["--shard"] * sharded]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rates = [entry["tokens_per_second"] for entry in map(json.loads, lines) if "tokens_per_second" in entry]
        return float(statistics.median(rates[WARMUP:]))


def label(case: tuple[int, bool], rate: float) -> str:
    """Return the description of a measured case, for a line of progress."""
    processes, sharded = case
    return f"{processes} {'process' if processes == 1 else 'processes'}{', sharded' * sharded} {rate:,.0f} tokens/s"


def compared(cases: list[tuple[int, bool]], rounds: list[list[float]]) -> dict[str, Any]:
    """Return throughputs and parallel efficiencies.

    Args:
        cases: Number of processes, and whether parameters are sharded; the first is one process.
        rounds: Throughput of each case in each round, in tokens/s.

    Returns:
        The number of cores, and for each case its values by round, of which the page shows the median and the range.
    """
    cores = len(os.sched_getaffinity(0))
    runs = []
    for (processes, sharded), rates in zip(cases, zip(*rounds, strict=True), strict=True):
        ideal = [min(processes, cores) * measured[0] for measured in rounds]
        efficiencies = [rate / most for rate, most in zip(rates, ideal, strict=True)]
        run = {"processes": processes, "sharded": sharded, "tokens_per_second": rates}
        runs.append(run | {"parallel_efficiency": efficiencies})
    return {"cores": cores, "runs": runs}


if __name__ == "__main__":
    main()
