"""The data's way: how long text takes to become token shards, then how fast one core makes batches of them.

    python -m bench.end_to_end.data --tokenizer VOCABULARY TEXT [TEXT …]

TEXT are files or folders as `bertfast prepare` takes them. Batches are made by one process on one thread, planning
included; `fill` is the share of their places that hold tokens.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench.harness import write_result
from bertfast.data.batches import Batches
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.data.samples import Sampling
from bertfast.data.shards import Shards
from bertfast.data.tokenizer import continuation_tokens, load_tokenizer, special_tokens

SAMPLINGS = [
    {"max_seq_length": length, **rest}
    for length in (128, 512)
    for rest in ({}, {"objective": "mlm"}, {"whole_word": True})
]
BINS = (4096, 32768)
ENOUGH = 20_000_000  # tokens to make into batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", type=Path)
    parser.add_argument("--tokenizer", required=True, type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        preparation = measure_preparation(arguments.text, arguments.tokenizer, folder)
        print(
            f"{preparation['tokens']} tokens of {preparation['bytes']} bytes of files in "
            f"{preparation['seconds']:.1f} s, {preparation['peak_memory_mb']:.0f} MB a process at most\n"
        )
        print("| length | objective | whole words | tokens a bin | M tokens/s | fill |")
        print("|---|---|---|---|---|---|")
        batches = []
        for sampling in SAMPLINGS:
            for tokens_per_bin in BINS:
                result = measure_batches(Path(folder, "train"), sampling, tokens_per_bin)
                batches.append(result)
                row = [result[name] for name in ("max_seq_length", "objective", "whole_word", "tokens_per_bin")]
                row += [f"{result['tokens_per_second'] / 1e6:.2f}", f"{result['fill']:.2%}"]
                print("| " + " | ".join(map(str, row)) + " |", flush=True)
    path = write_result("data", {"preparation": preparation, "batches": batches})
    print(f"\nwritten to {path}")


def measure_preparation(text: list[Path], tokenizer: Path, folder: str) -> dict:
    """Seconds and peak memory of `bertfast prepare`, in as many processes as there are cores."""
    corpus = CorpusSettings([str(path) for path in text], tokenizer_name=str(tokenizer), validation_split_percentage=0)
    started = time.perf_counter()
    shards = Shards.open(prepare(PrepareSettings(folder, corpus)) / "train")
    seconds = time.perf_counter() - started
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "bytes": sum(file.stat().st_size for path in text for file in ([path] if path.is_file() else path.rglob("*"))),
        "documents": shards.documents,
        "tokens": shards.tokens,
        "seconds": seconds,
        "peak_memory_mb": peak / 1024,
    }


def measure_batches(folder: Path, options: dict, tokens_per_bin: int) -> dict:
    """Tokens a second from opening the shards to the last batch of `ENOUGH` tokens, or of one epoch if that is less."""
    tokenizer = load_tokenizer(folder.parent)
    special, continuation, sampling = special_tokens(tokenizer), continuation_tokens(tokenizer), Sampling(**options)
    started = time.perf_counter()
    batches = Batches(
        Shards.open(folder), special, continuation, sampling, tokens_per_bin=tokens_per_bin, bins_per_step=1, seed=0
    )
    planned = time.perf_counter()
    used = [batch.num_tokens for batch in batches.first_epoch(ENOUGH // tokens_per_bin)]
    ended = time.perf_counter()
    whole = batches.epochs[0].bins / len(used)  # the plan is for all of the epoch: a share of it is charged
    return {
        "max_seq_length": sampling.max_seq_length,
        "objective": sampling.objective,
        "whole_word": sampling.whole_word,
        "tokens_per_bin": tokens_per_bin,
        "bins": len(used),
        "planning_s": planned - started,
        "tokens_per_second": sum(used) / (ended - planned + (planned - started) / whole),
        "fill": sum(used) / len(used) / tokens_per_bin,
    }


if __name__ == "__main__":
    main()
