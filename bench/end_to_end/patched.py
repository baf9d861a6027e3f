"""Time a transformers model with and without `patch`: sentences, paragraphs, one short sentence, Trainer, patching.

    python -m bench.end_to_end.patched MODEL DATA [--rounds N] [--results FOLDER]

MODEL is a folder with a BERT and its tokenizer; DATA contains glue/SST-2/dev.tsv.gz and squad/dev-v1.1.json.gz. Both
models run alternately, without gradients except in training, after their outputs have been compared. The lower bounds
are those of `bench.bounds`; that of Trainer includes its updates by AdamW.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.arguments import at_least_one, model_parser
from bench.bounds import Rates
from bench.harness import stopwatch
from bench.result_files import require_clean_tree, write_result
from bertfast import patch
from bertfast.tasks.tables import read_table

BATCH, TOLERANCE = 32, 1e-4
MIN_ROUNDS = 5


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--rounds", type=at_least_one, default=12, help="rounds of SST-2, at least 5 of other texts")
    parser.add_argument("--steps", type=at_least_one, default=5, help="steps of Trainer per part; 5 parts are timed")
    arguments = parser.parse_args()
    require_clean_tree(arguments.results)
    write_result("patched", measure(arguments), arguments.results)


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Time all cases and return the result."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    columns = read_table(arguments.data / "glue" / "SST-2" / "dev.tsv.gz").columns
    sentences = columns["sentence"][: BATCH * 4]
    articles = json.loads(gzip.decompress((arguments.data / "squad" / "dev-v1.1.json.gz").read_bytes()))["data"]
    paragraphs = [part["context"] for article in articles for part in article["paragraphs"]][:BATCH]
    plain = transformers.BertForSequenceClassification.from_pretrained(arguments.model).eval()
    patched = copy.deepcopy(plain)
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "patching_s": stopwatch(lambda: patch(patched))}
    config: Any = plain.config
    # Batches of texts, and their rounds relative to `--rounds`.
    cases = {
        "sst-2, batches of 32": ([sentences[i : i + BATCH] for i in range(0, len(sentences), BATCH)], 1),
        "squad, batches of 32": ([paragraphs], 0.4),
        "one sentence of 8 tokens": ([["a truly good and moving film"]], 25),
    }
    for name, (texts, factor) in cases.items():
        batches = [
            tokenizer(batch, padding=True, truncation=True, max_length=384, return_tensors="pt") for batch in texts
        ]
        with torch.no_grad():
            worst = max((plain(**b).logits - patched(**b).logits).abs().max().item() for b in batches)
            if not worst < TOLERANCE:
                raise SystemExit(f"{name}: the outputs differ by {worst}, so nothing is timed")
            rounds = max(MIN_ROUNDS, int(arguments.rounds * factor))
            timed = alternately(partial(run_all, batches), plain, patched, rounds)
        lengths = [batch["attention_mask"].sum(1).tolist() for batch in batches]
        tokens = [batches[0]["input_ids"].shape[1], sum(map(sum, lengths))]
        rates = Rates.measured(config, tokens[1] // len(batches), torch.float32)
        bound = {"lower_bound_s": rates.inference(config, lengths), **rates.entries()}
        result[name] = {**timed, "tokens": tokens, **bound}
        print(name, f"{result[name]['median_ratio']:.2f} x", flush=True)
    result["trainer, sst-2"] = trainer(plain, patched, tokenizer, columns, arguments.steps)
    print("trainer", f"{result['trainer, sst-2']['median_ratio']:.2f} x", flush=True)
    return result


def run_all(batches: Sequence[Mapping[str, torch.Tensor]], model: PreTrainedModel) -> None:
    """Run a model on all batches."""
    for batch in batches:
        model(**batch)


def alternately(
    run: Callable[[PreTrainedModel], object], plain: PreTrainedModel, patched: PreTrainedModel, rounds: int
) -> dict[str, Any]:
    """Return the seconds of both models and the median of their ratios, after an untimed round."""
    seconds: dict[str, list[float]] = {"plain_s": [], "patched_s": []}
    for _ in range(rounds + 1):
        seconds["plain_s"].append(stopwatch(lambda: run(plain)))
        seconds["patched_s"].append(stopwatch(lambda: run(patched)))
    seconds = {name: samples[1:] for name, samples in seconds.items()}
    return {**seconds, "median_ratio": statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))}


def trainer(
    plain: PreTrainedModel,
    patched: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    columns: dict[str, list[str]],
    steps: int,
) -> dict[str, Any]:
    """Time parts of `steps` steps of Trainer with dynamic padding, alternately, after an untimed part."""
    texts = zip(columns["sentence"], columns["label"], strict=True)
    samples = [{**tokenizer(text), "labels": int(label)} for text, label in texts]
    collator = CountingCollator(tokenizer)
    times: dict[str, list[float]] = {"plain_s": [], "patched_s": []}
    with TemporaryDirectory() as folder:
        for part in range(MIN_ROUNDS + 1):
            for name, model in (("plain_s", plain), ("patched_s", patched)):
                settings = transformers.TrainingArguments(
                    folder, max_steps=steps, per_device_train_batch_size=BATCH, report_to=[], save_strategy="no",
                    use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=part,
                )  # fmt: skip
                loop = transformers.Trainer(model=model, args=settings, train_dataset=samples, data_collator=collator)
                started = time.perf_counter()
                loop.train()
                times[name].append(time.perf_counter() - started)
    times = {name: seconds[1:] for name, seconds in times.items()}
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    config: Any = plain.config
    tokens = int(statistics.mean(map(sum, collator.lengths)))
    rates = Rates.measured(config, tokens, torch.float32, training=True)
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    # The loader reads more batches than it trains on, so the bound is that of an average one.
    bound = steps * statistics.mean(rates.training(config, lengths, parameters) for lengths in collator.lengths)
    found = {"steps": steps, "median_ratio": statistics.median(ratios), "lower_bound_s": bound}
    return {**times, **found, **rates.entries()}


class CountingCollator(transformers.DataCollatorWithPadding):
    """Pads batches and notes the tokens of the texts of each in `lengths`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer)
        self.lengths: list[list[int]] = []

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        self.lengths.append([len(feature["input_ids"]) for feature in features])
        return super().__call__(features)


if __name__ == "__main__":
    main()
