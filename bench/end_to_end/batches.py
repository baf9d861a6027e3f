"""How many tokens a second one core makes into batches, planning included, and how full the bins are.

    python bench/end_to_end/batches.py SHARDS_FOLDER [--json FILE]

SHARDS_FOLDER is the `train` folder of what `bertfast prepare` wrote; the tokenizer lies beside it.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from bertfast.data.batches import Batches
from bertfast.data.samples import Sampling
from bertfast.data.shards import Shards
from bertfast.data.tokenizer import continuation_tokens, load_tokenizer, special_tokens

SETTINGS = [
    {"max_seq_length": length, **rest}
    for length in (128, 512)
    for rest in ({}, {"objective": "mlm"}, {"whole_word": True})
]


def measure(folder: Path, settings: dict, tokens_per_bin: int) -> dict:
    """Make every batch of one epoch, from opening the shards on."""
    tokenizer = load_tokenizer(folder.parent)
    special, continuation = special_tokens(tokenizer), continuation_tokens(tokenizer)
    start = time.perf_counter()
    batches = Batches(
        Shards.open(folder),
        special,
        continuation,
        Sampling(**settings),
        tokens_per_bin=tokens_per_bin,
        bins_per_step=1,
        seed=0,
    )
    planned = time.perf_counter()
    used = [batch.tokens_used for batch in batches.first_epoch()]
    end = time.perf_counter()
    return settings | {
        "tokens_per_bin": tokens_per_bin,
        "bins": len(used),
        "planning_seconds": planned - start,
        "tokens_per_second": sum(used) / (end - start),
        "fill": sum(used) / len(used) / tokens_per_bin,
    }


def main() -> None:
    """Print a line a setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for settings in SETTINGS:
        for tokens_per_bin in (4096, 32768):
            result = measure(arguments.folder, settings, tokens_per_bin)
            results.append(result)
            print(
                f"{settings!s:54} {tokens_per_bin:6} tokens a bin   {result['tokens_per_second'] / 1e6:5.2f} M tokens/s"
                f"   fill {result['fill']:.2%}   planning {result['planning_seconds']:.2f} s"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
