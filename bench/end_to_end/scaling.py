"""Measure the throughput of one process and of several, with replicated and with sharded parameters.

    python -m bench.end_to_end.scaling SHARDS [--preset NAME] [--processes N …] [--results FOLDER]

Each process runs one thread with its own batch. SHARDS is a folder written by `bertfast prepare`. The parallel
efficiency is the throughput divided by that of one process, and by the number of processes, or of cores if it is lower.
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

from bench.arguments import at_least_one, result_parser
from bench.result_files import require_clean_tree, write_result

BERTFAST = str(Path(sys.executable).with_name("bertfast"))
STEPS, WARMUP = 20, 4


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("shards", type=Path, help="folder of the token shards")
    parser.add_argument("--preset", default="mini", help="size of the model")
    parser.add_argument(
        "--processes", type=at_least_one, nargs="+", default=[2, 4], help="numbers of processes; 1 is always measured"
    )
    arguments = parser.parse_args()
    require_clean_tree(arguments.results)
    cores = len(os.sched_getaffinity(0))
    measured: list[dict[str, Any]] = []
    for processes in sorted({1, *arguments.processes}):
        for flags in ([], ["--shard"]) if processes > 1 else ([],):
            rate = tokens_per_second(arguments, processes, flags)
            alone = measured[0]["tokens_per_second"] if measured else rate
            efficiency = rate / (min(processes, cores) * alone)
            run = {"processes": processes, "sharded": bool(flags), "tokens_per_second": rate}
            measured.append(run | {"parallel_efficiency": efficiency})
            print(f"{processes} processes{', sharded' * bool(flags)}: {rate:.0f} tokens/s", flush=True)
    values = {"preset": arguments.preset, "cores": cores, "runs": measured}
    print(f"written to {write_result('scaling', values, arguments.results)}")


def tokens_per_second(arguments: argparse.Namespace, processes: int, flags: list[str]) -> float:
    """Return the median over the steps of a run of the throughput of all processes together."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [BERTFAST, "pretrain", "--output-dir", folder, "--data-dir", str(arguments.shards.resolve())]
        command += ["--preset", arguments.preset, "--max-seq-length", "128", "--tokens-per-batch", "2048"]
        command += ["--max-steps", str(STEPS), "--logging-steps", "1", "--eval-batches", "1", "--device", "cpu", *flags]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rates = [entry["tokens_per_second"] for entry in map(json.loads, lines) if "tokens_per_second" in entry]
        return float(statistics.median(rates[WARMUP:]))


if __name__ == "__main__":
    main()
