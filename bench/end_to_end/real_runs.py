"""Run the commands of bertfast on real text: the demo, pre-training on WikiText-2 and fine-tuning on SST-2 from it.

    python -m bench.end_to_end.real_runs DATA [--output FOLDER] [--results FOLDER]

DATA contains corpus/wikitext2-detok-{train,valid}.txt.xz and glue/SST-2/{train,dev}.tsv.gz. Each command runs in its
own process; the result has its duration, its peak memory and its metrics.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.arguments import result_parser
from bench.result_files import RESULTS, require_clean_tree, write_result

BERTFAST = str(Path(sys.executable).with_name("bertfast"))


def main() -> None:
    parser = result_parser(__doc__, RESULTS)
    parser.add_argument("data", type=Path, help="folder of the data")
    parser.add_argument("--output", type=Path, help="folder to keep models and metrics")
    arguments = parser.parse_args()
    require_clean_tree(arguments.results)
    with TemporaryDirectory() as scratch:
        folder = arguments.output or Path(scratch)
        for name, command, results in runs(arguments.data, folder):
            seconds, peak = run([BERTFAST, *command])
            shown = [word.replace(str(folder), "OUT").replace(str(arguments.data), "DATA") for word in command]
            result = {"command": ["bertfast", *shown], "seconds": seconds, "peak_memory_mb": peak}
            result["metrics"] = last_of(results)
            path = write_result(name, result, arguments.results)
            print(f"\n{name}: {seconds:.0f} s, written to {path}\n", flush=True)


def run(command: list[str]) -> tuple[float, float]:
    """Run a command and return its seconds and its peak memory in MiB, which is at least that of this process.

    Raises:
        subprocess.CalledProcessError: It fails.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command)
    # The usage of all children together, RUSAGE_CHILDREN, would have the peak of the largest one so far.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def runs(data: Path, folder: Path) -> list[tuple[str, list[str], Path]]:
    """Return (name, arguments of bertfast, file to which it writes its metrics) for each run."""
    corpus, sst2 = data / "corpus", data / "glue" / "SST-2"
    wikitext, tuned = folder / "wikitext2", folder / "sst2"
    pretrain = f"""pretrain --output-dir {wikitext}
        --train-file {corpus}/wikitext2-detok-train.txt.xz --validation-file {corpus}/wikitext2-detok-valid.txt.xz
        --vocab-size 8192 --preset tiny --max-seq-length 128 --tokens-per-batch 2048 --num-train-epochs 3
        --optimizer muon --learning-rate 4e-3 --adam-beta2 0.98 --warmup-ratio 0.05 --dropout 0"""
    finetune = f"""finetune --model-name-or-path {wikitext} --output-dir {tuned}
        --train-file {sst2}/train.tsv.gz --validation-file {sst2}/dev.tsv.gz
        --learning-rate 3e-4 --num-train-epochs 2 --per-device-train-batch-size 64"""
    return [
        ("demo", ["demo", "--output-dir", str(folder / "demo")], folder / "demo" / "results.json"),
        ("pretrain-wikitext2", pretrain.split(), wikitext / "metrics.jsonl"),
        ("finetune-sst2", finetune.split(), tuned / "all_results.json"),
    ]


def last_of(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file, or the last of a JSON-lines file."""
    text = path.read_text(encoding="utf-8")
    last: dict[str, Any] = json.loads(text.splitlines()[-1] if path.suffix == ".jsonl" else text)
    return last


if __name__ == "__main__":
    main()
