"""How many tokens a second one process and several make, averaged gradients and sharded, each on one core and with a
batch of its own.

    python -m bench.end_to_end.scaling SHARDS [--preset NAME] [--processes N …] [--results FOLDER]

SHARDS is what `bertfast prepare` wrote. Perfect would be as many times the tokens as there are processes; what is
lost is the gradients' way, and that cores share their memory.
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

from bench.harness import RESULTS, write_result

BERTFAST = str(Path(sys.executable).with_name("bertfast"))
STEPS, UNCOUNTED = 20, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for what was measured")
    arguments = parser.parse_args()
    measured = []
    for processes in arguments.processes:
        for flags in ([], ["--shard"]) if processes > 1 else ([],):
            rate = tokens_per_second(arguments, processes, flags)
            measured.append({"processes": processes, "sharded": bool(flags), "tokens_per_second": rate})
            print(f"{processes} processes{', sharded' * bool(flags)}: {rate:.0f} tokens/s", flush=True)
    for one in measured:
        one["of_perfect"] = one["tokens_per_second"] / (one["processes"] * measured[0]["tokens_per_second"])
    print(f"written to {write_result('scaling', {'preset': arguments.preset, 'runs': measured}, arguments.results)}")


def tokens_per_second(arguments: argparse.Namespace, processes: int, flags: list[str]) -> float:
    """The median of a run's steps, of all processes together."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [BERTFAST, "pretrain", "--output-dir", folder, "--data-dir", str(arguments.shards.resolve())]
        command += ["--preset", arguments.preset, "--max-seq-length", "128", "--tokens-per-batch", "2048"]
        command += ["--max-steps", str(STEPS), "--logging-steps", "1", "--eval-batches", "1", "--device", "cpu", *flags]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rates = [entry["tokens_per_second"] for entry in map(json.loads, lines) if "tokens_per_second" in entry]
        return statistics.median(rates[UNCOUNTED:])


if __name__ == "__main__":
    main()
