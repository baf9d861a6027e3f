"""Time the preparation of text as token shards, then the assembly of batches by one process on one thread.

    python -m bench.end_to_end.data --tokenizer VOCABULARY TEXT [TEXT …] [--results FOLDER]

TEXT are files or folders, as for `bertfast prepare`. The time of batches includes planning; `fill` is the share of
their slots that contain tokens.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.harness import require_clean_tree, result_parser, write_result
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
MAX_TOKENS = 20_000_000  # assembled into batches


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("text", nargs="+", type=Path, help="text files or folders")
    parser.add_argument("--tokenizer", required=True, type=Path, help="vocabulary file")
    arguments = parser.parse_args()
    require_clean_tree(arguments.results)
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        preparation = measure_preparation(arguments.text, arguments.tokenizer, folder)
        print(
            f"{preparation['tokens']} tokens from {preparation['bytes']} bytes of files in "
            f"{preparation['seconds']:.1f} s, at most {preparation['peak_memory_mb']:.0f} MB per process\n"
        )
        print("| length | objective | whole words | tokens per bin | M tokens/s | fill |")
        print("|---|---|---|---|---|---|")
        batches = []
        for sampling in SAMPLINGS:
            for tokens_per_bin in BINS:
                result = measure_batches(Path(folder, "train"), sampling, tokens_per_bin)
                batches.append(result)
                row = [result[name] for name in ("max_seq_length", "objective", "whole_word", "tokens_per_bin")]
                row += [f"{result['tokens_per_second'] / 1e6:.2f}", f"{result['fill']:.2%}"]
                print("| " + " | ".join(map(str, row)) + " |", flush=True)
    path = write_result("data", {"preparation": preparation, "batches": batches}, arguments.results)
    print(f"\nwritten to {path}")


def measure_preparation(text: list[Path], tokenizer: Path, folder: str) -> dict[str, float]:
    """Return seconds and peak memory of `bertfast prepare` with one process per core."""
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


def measure_batches(folder: Path, options: dict[str, Any], tokens_per_bin: int) -> dict[str, Any]:
    """Return the throughput over an epoch, or its first MAX_TOKENS, from opening the shards to the last batch."""
    tokenizer = load_tokenizer(folder.parent)
    special, continuation, sampling = special_tokens(tokenizer), continuation_tokens(tokenizer), Sampling(**options)
    started = time.perf_counter()
    batches = Batches(
        Shards.open(folder), special, continuation, sampling, tokens_per_bin=tokens_per_bin, bins_per_step=1, seed=0
    )
    planned = time.perf_counter()
    tokens = [batch.num_tokens for batch in batches.first_epoch(MAX_TOKENS // tokens_per_bin)]
    ended = time.perf_counter()
    # The plan covers the whole epoch, so only the share of the assembled batches is counted.
    share = len(tokens) / batches.epochs[0].bins
    return {
        "max_seq_length": sampling.max_seq_length,
        "objective": sampling.objective,
        "whole_word": sampling.whole_word,
        "tokens_per_bin": tokens_per_bin,
        "bins": len(tokens),
        "planning_s": planned - started,
        "tokens_per_second": sum(tokens) / (ended - planned + (planned - started) * share),
        "fill": sum(tokens) / len(tokens) / tokens_per_bin,
    }


if __name__ == "__main__":
    main()
