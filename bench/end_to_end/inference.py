"""Time inference of a model on real texts and on single sentences, in all runtimes of `bench.end_to_end.runtimes`.

    python -m bench.end_to_end.inference [MODEL …] [--repeats N] [--threads N] [--single] [--data FOLDER] [--results …]

The workloads are sentences of SST-2 and paragraphs of SQuAD, in batches in file order and sorted by length, and single
sentences of LENGTHS tokens. All runtimes get the same padded token ids, random weights and number of threads, and
return hidden states. Before anything is timed, these are compared with transformers' in fp32: a runtime in fp32 or bf16
must agree within TOLERANCE, one in int8 must reach MIN_COSINE. FOLDER of --data contains glue/SST-2/dev.tsv.gz,
squad/dev-v1.1.json.gz and vocab/bert-base-uncased-vocab.txt; without it, lengths are drawn at random. With --threads,
the name of the result file ends in the number of threads; with --single, only single sentences are timed.

The lower bound of a workload is the time of its model FLOPs, without padding, at the GEMM throughput measured here in
that precision, or that of reading the weights once per batch at the bandwidth of a copy, if it is longer. `make
bench-inference` installs the runtimes into a folder of their own.
"""

from __future__ import annotations

import gzip
import json
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import bertfast
from bench.arguments import DATA, add_names, at_least_one, result_parser
from bench.bounds import Rates
from bench.ceilings import copy_bandwidth, inference_gemm_throughput, int8_gemm_throughput, layer_gemms
from bench.compare_cases import MINILM
from bench.end_to_end.runtimes import (
    HOW_TO_INSTALL,
    RUNTIMES,
    Inputs,
    Precision,
    Predict,
    Weights,
    missing_runtimes,
    padded,
)
from bench.harness import DEVICE, Sample, reason_of, seconds_of, side_by_side
from bench.result_files import RESULTS, require_clean_tree, write_result
from bertfast.architectures.presets import Preset
from bertfast.data.tokenizer import load_tokenizer
from bertfast.runtime.malloc import keep_freed_memory
from bertfast.runtime.precision import has_bf16_gemm
from bertfast.tasks.tables import read_table

# Presets and what differs from them; "trial": to try the program.
MODELS: dict[str, tuple[Preset, dict[str, Any]]] = {
    "base": ("base", {}),
    "small": ("small", {}),
    "minilm": ("small", MINILM),
    "trial": ("tiny", {}),
}
MAX_LENGTH = 384  # tokens of a text, as usual for fine-tuning on SQuAD
LENGTHS = (8, 32, 128, 384)  # tokens of single sentences
SINGLE_CALLS = 5  # of which a sample of a single sentence is the mean
BATCHES = {"sst2": (64, 32), "squad": (32, 32)}  # texts and batch size
TRIAL_TEXTS = 8  # per workload of "trial"
# Largest error of hidden states relative to the largest absolute value, and smallest cosine with them.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "bf16": 0.1}
MIN_COSINE = 0.9
INSTALLED_RUNTIMES = ("onnxruntime", "openvino", "nncf")  # as `import` names them; the others are parts of PyTorch
BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "int8": 1}  # of a weight


@dataclass(frozen=True)
class Workload:
    """Batches of texts.

    Attributes:
        batches: Inputs of each batch, padded to its longest text.
        calls: Calls per sample.
    """

    batches: list[Inputs]
    calls: int = 1

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [length for batch in self.batches for length in batch["attention_mask"].sum(1).tolist()]

    @property
    def padded_tokens(self) -> int:
        return sum(batch["input_ids"].numel() for batch in self.batches)

    def run(self, predict: Predict) -> None:
        """Run all batches, `calls` times."""
        for _ in range(self.calls):
            for batch in self.batches:
                predict(batch)


def config_of(name: str) -> bertfast.BertConfig:
    """Return the sizes of one of MODELS."""
    preset, changes = MODELS[name]
    return bertfast.preset_config(preset, **{"vocab_size": 30522} | changes)


def main() -> None:
    parser = result_parser(__doc__)
    add_names(parser, "models", "model", MODELS, default=["base"])
    parser.add_argument("--repeats", type=at_least_one, default=5, help="rounds of which the median is taken")
    parser.add_argument("--threads", type=at_least_one, help="threads of all runtimes (default: PyTorch's)")
    parser.add_argument("--single", action="store_true", help="only single sentences, no batches")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data")
    arguments = parser.parse_args()
    require_clean_tree(arguments.results)
    require_runtimes(arguments.results)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    suffix = "" if arguments.threads is None else f"-{arguments.threads}-threads"
    keep_freed_memory()
    for name in arguments.models:
        result = measure(name, arguments.repeats, arguments.data, arguments.single)
        path = write_result(f"inference-{name}{suffix}", result, arguments.results)
        print(f"\nwritten to {path}")


def require_runtimes(target: Path) -> None:
    """End the program if it would write a result without some of the runtimes into bench/results/.

    Raises:
        SystemExit: With a message that names the missing packages and what to do.
    """
    if target.resolve().is_relative_to(RESULTS) and (missing := missing_runtimes(INSTALLED_RUNTIMES)):
        raise SystemExit(
            f"no results are written to bench/results/ without {', '.join(missing)}, because the page would lack them: "
            f"{HOW_TO_INSTALL}, or name another folder with --results"
        )


def measure(name: str, repeats: int, data: Path, only_single: bool = False) -> dict[str, Any]:
    """Time all workloads on a model, or those of single sentences, print a table and return the result."""
    torch.manual_seed(0)
    config = config_of(name)
    workloads = build_workloads(name, data)
    with TemporaryDirectory() as folder, torch.inference_mode():
        calibration = [batch for workload in workloads.values() for batch in workload.batches]
        weights = Weights(config, calibration[::-1], Path(folder))
        runtimes, errors, not_run = build(weights)
        ceilings = measured_ceilings(config, sum(workloads["sst2, file order"].lengths))
        print(
            "| workload | runtime | ms | 20 to 80 % | texts/s | share of the lower bound |\n|---|---|---|---|---|---|"
        )
        results = {}
        for workload_name, workload in workloads.items():
            if only_single and len(workload.lengths) > 1:
                continue
            timed = side_by_side({key: partial(workload.run, run) for key, run in runtimes.items()}, repeats)
            bounds = lower_bounds(config, workload, ceilings)
            results[workload_name] = {
                "lengths": workload.lengths,
                "padded_tokens": workload.padded_tokens,
                "batch": len(workload.batches[0]["input_ids"]),
                "lower_bound_s": bounds,
                "runtimes": {key: entry(samples, workload.calls) for key, samples in timed.items()},
            }
            print_rows(workload_name, results[workload_name])
    for key, reason in not_run.items():
        print(f"{key} did not run: {reason}", file=sys.stderr)
    return {
        "model": name,
        "weights": "random",
        "repeats": repeats,
        "ceilings": ceilings,
        "precisions": {key: runtime.precision for key, runtime in RUNTIMES.items()},
        "errors": errors,
        "not_run": not_run,
        "workloads": results,
    }


def build(weights: Weights) -> tuple[dict[str, Predict], dict[str, dict[str, float]], dict[str, str]]:
    """Return the runtimes whose outputs are right, the errors of all that ran, and why the others are not timed.

    Raises:
        SystemExit: bertfast's own outputs are wrong.
    """
    batch = weights.batches[-1]
    attended = batch["attention_mask"].bool()
    expected = weights.reference(**batch)[0][attended]
    runs: dict[str, Predict] = {}
    errors: dict[str, dict[str, float]] = {}
    not_run: dict[str, str] = {}
    for name, runtime in RUNTIMES.items():
        try:
            predict = runtime.build(weights)
            hidden = predict(batch)[attended].float()
        except Exception as error:
            not_run[name] = reason_of(error)
            continue
        errors[name] = {
            "relative": ((hidden - expected).abs().max() / expected.abs().max()).item(),
            "cosine": torch.nn.functional.cosine_similarity(hidden, expected).mean().item(),
        }
        if wrong := wrong_outputs(runtime.precision, errors[name]):
            if name.startswith("bertfast"):
                raise SystemExit(f"{name}: {wrong}, so nothing is timed")
            not_run[name] = wrong
        else:
            runs[name] = predict
    return runs, errors, not_run


def wrong_outputs(precision: Precision, error: dict[str, float]) -> str | None:
    """Return why outputs in this precision count as wrong, None if they do not; NaN is wrong."""
    if precision in TOLERANCE and not error["relative"] <= TOLERANCE[precision]:
        return f"its hidden states differ by {error['relative']:.2g} of the largest"
    if not error["cosine"] >= MIN_COSINE:
        return f"its hidden states have a cosine of {error['cosine']:.3f} with those in fp32"
    return None


def entry(samples: list[Sample], calls: int) -> dict[str, Any]:
    """Return the seconds of a runtime per call: median, 20th and 80th percentile, and all samples."""
    seconds = [value / calls for value in seconds_of(samples)]
    p20, *_, p80 = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds * 2
    return {
        "median_s": statistics.median(seconds),
        "p20_s": p20,
        "p80_s": p80,
        "seconds": [sample.seconds / calls for sample in samples],
        "cores": [sample.cores for sample in samples],
    }


def print_rows(name: str, result: dict[str, Any]) -> None:
    """Print a table row per runtime of a workload."""
    for runtime, row in result["runtimes"].items():
        bound = result["lower_bound_s"].get(RUNTIMES[runtime].precision)
        share = f"{bound / row['median_s']:.0%}" if bound else ""
        print(
            f"| {name} | {runtime} | {row['median_s'] * 1e3:.1f} | {row['p20_s'] * 1e3:.1f} to {row['p80_s'] * 1e3:.1f}"
            f" | {len(result['lengths']) / row['median_s']:.1f} | {share} |",
            flush=True,
        )


def build_workloads(model: str, data: Path) -> dict[str, Workload]:
    """Return the workloads by name."""
    workloads = {}
    for texts, (number, size) in BATCHES.items():
        if model == "trial":
            number, size = TRIAL_TEXTS, TRIAL_TEXTS // 2
        sequences = token_ids(texts, number, data)
        orders = {"file order": sequences, "sorted": sorted(sequences, key=len)}
        if number == size:  # one batch, in which the order makes no difference
            del orders["sorted"]
        for order, found in orders.items():
            batches = [padded(found[start : start + size]) for start in range(0, number, size)]
            workloads[f"{texts}, {order}"] = Workload(batches)
    for length in LENGTHS:
        workloads[f"1 x {length} tokens"] = Workload([padded([random_ids(length)])], SINGLE_CALLS)
    return workloads


def random_ids(length: int) -> list[int]:
    ids: list[int] = torch.randint(1000, 30000, (length,)).tolist()
    return ids


def token_ids(texts: str, number: int, data: Path) -> list[list[int]]:
    """Return the ids of texts, evenly spread over the file, of at most MAX_LENGTH tokens; without data, random ids."""
    if not data.is_dir():
        print(f"there is no folder {data} (--data): random texts replace {texts}", file=sys.stderr)
        longest = 60 if texts == "sst2" else MAX_LENGTH
        return [random_ids(int(length)) for length in torch.randint(8, longest, (number,))]
    if texts == "sst2":
        lines = read_table(data / "glue" / "SST-2" / "dev.tsv.gz").texts("sentence")
    else:
        with gzip.open(data / "squad" / "dev-v1.1.json.gz", "rt", encoding="utf-8") as file:
            articles = json.load(file)["data"]
        lines = [paragraph["context"] for article in articles for paragraph in article["paragraphs"]]
    tokenizer = load_tokenizer(data / "vocab" / "bert-base-uncased-vocab.txt")
    tokenizer.enable_truncation(MAX_LENGTH)
    tokenizer.no_padding()
    return [encoding.ids for encoding in tokenizer.encode_batch(lines[:: len(lines) // number][:number])]


def measured_ceilings(config: bertfast.BertConfig, tokens: int) -> dict[str, float]:
    """Return the FLOP/s of a layer's GEMMs on this many tokens by precision, and the bytes/s of a copy as "bytes"."""
    shapes = layer_gemms(config, tokens) * 2
    found = {"fp32": inference_gemm_throughput(shapes, torch.float32), "bytes": copy_bandwidth(64 << 20)}
    if has_bf16_gemm(DEVICE):
        found["bf16"] = inference_gemm_throughput(shapes, torch.bfloat16)
    if rate := int8_gemm_throughput(shapes):
        found["int8"] = rate
    return found


def lower_bounds(config: bertfast.BertConfig, workload: Workload, ceilings: dict[str, float]) -> dict[str, float]:
    """Return the lower bound of a workload in seconds, by precision."""
    batches = [batch["attention_mask"].sum(1).tolist() for batch in workload.batches]
    return {
        precision: Rates(ceilings[precision], ceilings["bytes"]).inference(config, batches, size)
        for precision, size in BYTES.items()
        if precision in ceilings
    }


if __name__ == "__main__":
    main()
