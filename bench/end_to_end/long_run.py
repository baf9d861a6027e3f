"""Pre-train `small` on Wikipedia and books for an hour or more on a CPU, and predict masked tokens with it.

    python -m bench.end_to_end.long_run DATA --output FOLDER [--minutes N] [--results FOLDER]

DATA contains corpus/wikipedia-*.txt.xz and corpus/books-*.txt.xz. An interrupted run continues if it is started again
with the same --output.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from bench.arguments import result_parser
from bench.result_files import require_clean_tree, write_result
from bertfast import BertForMaskedLM
from bertfast.cli.flags import parse
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.inference.fill_mask import fill_mask
from bertfast.tasks.pretrained import open_model
from bertfast.training.metrics_log import MetricsLog
from bertfast.training.pretraining import PretrainSettings, pretrain

TOKENS = 8192  # per step
FLAGS = f"""--preset small --max-seq-length 128 --tokens-per-batch {TOKENS} --optimizer muon --learning-rate 0.003
    --adam-beta2 0.98 --warmup-ratio 0.05 --dropout 0 --mlm-probability 0.2 --eval-steps 50 --eval-batches 20
    --save-steps 50 --resume"""
SENTENCES = [
    "london is the capital of [MASK].",
    "he was born in the [MASK] of new york.",
    "she opened the [MASK] and went into the house.",
    "the river flows into the [MASK].",
    "the team won the [MASK] in 1998.",
    "two and two are [MASK].",
]


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("data", type=Path, help="folder with the texts")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards and the run")
    parser.add_argument("--minutes", default="60", help="duration of the steps; becomes part of the names")
    arguments = parser.parse_args()
    require_clean_tree(arguments.results)
    shards = prepare(PrepareSettings(str(arguments.output / "data"), corpus(arguments.data / "corpus")))
    folder = arguments.output / f"run-{arguments.minutes}"
    flags = [*FLAGS.split(), "--minutes", arguments.minutes]
    if not (folder / "loss.png").exists():
        where = ["--output-dir", str(folder), "--data-dir", str(shards)]
        pretrain(parse("pretrain", PretrainSettings, [*where, *flags]))
    steps, validations = logged(folder)
    result = {
        "command": ["bertfast", "pretrain", *flags],
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "steps": validations[-1]["step"],
        "tokens": validations[-1]["step"] * TOKENS,
        "seconds": validations[-1]["seconds"],
        "gemm_efficiency": [steps[0]["gemm_efficiency"], steps[-1]["gemm_efficiency"]],
        "validations": validations,
        "fill_mask": fill(folder),
    }
    name = f"long_run-{arguments.minutes}-minutes"
    path = write_result(name, result, arguments.results)
    shutil.copy(folder / "loss.png", arguments.results / f"{name}.png")
    last = validations[-1]
    print(
        f"{result['tokens'] / 1e6:.1f} M tokens in {last['seconds']:.0f} s: validation loss "
        f"{last['validation_loss']:.3f}, perplexity {last['validation_perplexity']:.1f} "
        f"(unigram baseline {last['unigram_entropy']:.3f}); written to {path}"
    )


def logged(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the entries of the steps and of the validations of a run."""
    entries = MetricsLog(folder, steps_done=sys.maxsize).entries()
    steps = [entry for entry in entries if "masked_lm_loss" in entry]
    return steps, [entry for entry in entries if "validation_loss" in entry]


def corpus(folder: Path) -> CorpusSettings:
    """Return the settings of Wikipedia and books, with their own vocabulary."""
    train = [*sorted(folder.glob("wikipedia-train-*.txt.xz")), folder / "books-train.txt.xz"]
    valid = [folder / "wikipedia-valid.txt.xz", folder / "books-valid.txt.xz"]
    return CorpusSettings(list(map(str, train)), list(map(str, valid)), vocab_size=16_384)


def fill(folder: Path) -> dict[str, list[tuple[str, float]]]:
    """Return the five most probable tokens for [MASK] in each sentence, with their probabilities."""
    model, tokenizer = open_model(BertForMaskedLM, str(folder), True)
    return {text: fill_mask(model, tokenizer, text)[0] for text in SENTENCES}


if __name__ == "__main__":
    main()
