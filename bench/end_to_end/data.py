"""Time the preparation of text as token shards, then the assembly of batches by one process, against transformers.

    python -m bench.end_to_end.data --tokenizer VOCABULARY TEXT [TEXT …] [--repeats N] [--results FOLDER]

TEXT are files or folders, as for `bertfast prepare`. Preparation uses all cores. Its alternative only reads and
tokenizes the same documents with transformers' fast tokenizer, whose threads use all cores too, and must find as many
tokens; it splits no sentences and writes nothing. Batches are assembled on one thread, planning included; `fill` is the
share of their slots that contain tokens. Their alternative is transformers' collator for masked LM on samples of
exactly the largest length, which have been tokenized and cut before.
"""

from __future__ import annotations

import resource
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from bench.arguments import at_least_one, result_parser
from bench.result_files import require_clean_tree, write_result
from bertfast.data.batches import Batches
from bertfast.data.corpus import find_files, read_documents
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.data.samples import Sampling
from bertfast.data.shards import Shards
from bertfast.data.special_tokens import special_tokens
from bertfast.data.tokenizer import continuation_tokens, load_tokenizer

SAMPLINGS = [
    {"max_seq_length": length, **rest}
    for length in (128, 512)
    for rest in ({}, {"objective": "mlm"}, {"whole_word": True})
]
BINS = (4096, 32768)
MAX_TOKENS = 20_000_000  # assembled into batches
DOCUMENTS_PER_CALL = 256  # of the alternative
MASKED = 0.15


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("text", nargs="+", type=Path, help="text files or folders")
    parser.add_argument("--tokenizer", required=True, type=Path, help="vocabulary file")
    parser.add_argument("--repeats", type=at_least_one, default=5, help="repeats of which the median is taken")
    arguments = parser.parse_args()
    require_clean_tree(arguments.results)
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        folder = Path(name)
        preparation, alternative, sequence = preparations(arguments, folder)
        for system, found in (("bertfast", preparation), ("transformers", alternative)):
            print(f"{system}: {found['tokens']} tokens in {found['seconds']:.2f} s")
        print("| system | length | objective | whole words | tokens per bin | M tokens/s | fill |")
        print("|---|---|---|---|---|---|---|")
        shards = folder / "0" / "train"
        batches = [repeated(arguments.repeats, measure_batches, shards, each, n) for each in SAMPLINGS for n in BINS]
        cases = [(length, n) for length in dict.fromkeys(each["max_seq_length"] for each in SAMPLINGS) for n in BINS]
        collated = [repeated(arguments.repeats, measure_collator, folder / "0", sequence, *case) for case in cases]
    values = {"preparation": preparation, "batches": batches}
    values |= {"alternatives": {"preparation": alternative, "batches": collated}}
    print(f"\nwritten to {write_result('data', values, arguments.results)}")


def preparations(arguments: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """Time both preparations alternately, after an untimed round of the alternative; return also its tokens.

    Raises:
        SystemExit: The numbers of tokens differ.
    """
    samples: list[list[float]] = [[], []]
    sequence = tokenize(arguments.text, arguments.tokenizer)
    for number in range(arguments.repeats):
        preparation = measure_preparation(arguments.text, arguments.tokenizer, str(folder / str(number)))
        samples[0].append(preparation["seconds"])
        if len(sequence) != preparation["tokens"]:
            raise SystemExit(f"transformers finds {len(sequence)} tokens and bertfast {preparation['tokens']}")
        started = time.perf_counter()
        sequence = tokenize(arguments.text, arguments.tokenizer)
        samples[1].append(time.perf_counter() - started)
    found = [{"seconds": statistics.median(each), "seconds_samples": each} for each in samples]
    return preparation | found[0], {"tokens": len(sequence), **found[1]}, sequence


def tokenize(text: list[Path], tokenizer: Path) -> list[int]:
    """Return the tokens of all documents of files, without special ones, by transformers' fast tokenizer."""
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(tokenizer))
    documents = [document for path in find_files(text) for document in read_documents(path)]
    tokens: list[int] = []
    for start in range(0, len(documents), DOCUMENTS_PER_CALL):
        paragraphs = [line for document in documents[start : start + DOCUMENTS_PER_CALL] for line in document]
        for ids in fast(paragraphs, add_special_tokens=False, return_attention_mask=False)["input_ids"]:
            tokens += ids
    return tokens


def repeated(repeats: int, measure: Any, *arguments: Any) -> dict[str, Any]:
    """Return the last result of some measurements with the median of their throughputs, print it, and keep all."""
    found: list[dict[str, Any]] = [measure(*arguments) for _ in range(repeats)]
    rates = [each["tokens_per_second"] for each in found]
    result = found[-1] | {"tokens_per_second": statistics.median(rates), "tokens_per_second_samples": rates}
    row = [result[name] for name in ("max_seq_length", "objective", "whole_word", "tokens_per_bin")]
    row += [f"{result['tokens_per_second'] / 1e6:.2f}", f"{result['fill']:.2%}"]
    system = "bertfast" if measure is measure_batches else "transformers"
    print("| " + " | ".join(map(str, [system, *row])) + " |", flush=True)
    return result


def measure_collator(folder: Path, tokens: list[int], length: int, tokens_per_bin: int) -> dict[str, Any]:
    """Return the throughput of transformers' collator on full samples, of which [CLS] and [SEP] are a part."""
    tokenizer = load_tokenizer(folder)
    special = special_tokens(tokenizer)
    named = {f"{name}_token": tokenizer.id_to_token(value) for name, value in vars(special).items()}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    collator = transformers.DataCollatorForLanguageModeling(fast, mlm_probability=MASKED)
    step, size = length - 2, tokens_per_bin // length
    samples = [
        {"input_ids": [special.cls, *tokens[start : start + step], special.sep]}
        for start in range(0, min(len(tokens), MAX_TOKENS) - step + 1, step)
    ]
    batches = [samples[start : start + size] for start in range(0, len(samples) - size + 1, size)]
    started = time.perf_counter()
    assembled = sum(collator(batch)["input_ids"].numel() for batch in batches)
    elapsed = time.perf_counter() - started
    found = {"max_seq_length": length, "objective": "mlm", "whole_word": False, "tokens_per_bin": tokens_per_bin}
    return found | {"bins": len(batches), "tokens_per_second": assembled / elapsed, "fill": 1.0}


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
