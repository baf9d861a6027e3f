"""Result files of all programs as rows of one kind: a workload, a system, its time, and the lower bound."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.bounds import Rates, step_bound
from bench.end_to_end.inference import BYTES, config_of
from bench.end_to_end.runtimes import Precision, precision_of
from bench.figures import spelling, step_case
from bertfast.architectures import family

SYSTEMS = {  # as result files name them, and as the page does
    "transformers-sdpa": "transformers",
    "transformers-compile": "transformers, compiled",
    "transformers-eager": "transformers, eager attention",
    "transformers-fp32": "transformers",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "liger": "Liger",
}
TEXTS = {"sst2": "sentences of SST-2", "squad": "paragraphs of SQuAD"}
SIGNIFICANCE = 0.05  # largest p-value of a difference
TASKS = {"sst-2": "SST-2", "sts-b": "STS-B", "squad": "SQuAD 1.1", "wnut": "WNUT-17"}


@dataclass(frozen=True)
class Row:
    """A measured time.

    Attributes:
        workload: What was computed.
        precision: "fp32", "bf16" or "int8".
        system: What computed it; bertfast's own start with "bertfast".
        seconds: Median.
        spread: 20th and 80th percentile in seconds.
        lower_bound: Seconds that any system needs at least, if known.
        threads: Threads of all systems.
        samples: Seconds of each round; systems of a workload and file took turns in each of them.
        file: Path of the result file below bench/results.
        gemm_gflops: GEMM throughput in GFLOP/s that the lower bound was computed with, if known.
        reads_weights: Whether the lower bound is the time of reading the weights, because that of the FLOPs is shorter.
    """

    workload: str
    precision: str
    system: str
    seconds: float
    spread: tuple[float, float]
    lower_bound: float | None
    threads: int
    samples: tuple[float, ...]
    file: str
    gemm_gflops: float | None = None
    reads_weights: bool = False

    @property
    def is_bertfast(self) -> bool:
        return self.system.startswith("bertfast")


@dataclass(frozen=True)
class Result:
    """A result file: its path below the folder of results, its content and its origin."""

    file: str
    values: dict[str, Any]

    @property
    def name(self) -> str:
        return Path(self.file).stem

    @property
    def origin(self) -> dict[str, Any]:
        origin: dict[str, Any] = self.values["origin"]
        return origin

    def row(
        self,
        workload: str,
        precision: str,
        system: str,
        samples: Sequence[float],
        lower_bound: float | None = None,
        gemm_gflops: float | None = None,
        reads_weights: bool = False,
    ) -> Row:
        """Return a row whose median and spread are those of `samples` in seconds."""
        spread = spread_of(samples)
        name = SYSTEMS.get(system, system)
        threads, rounds, median = self.origin["threads"], tuple(samples), statistics.median(samples)
        bound = gemm_gflops, reads_weights
        return Row(workload, precision, name, median, spread, lower_bound, threads, rounds, self.file, *bound)


def spread_of(samples: Sequence[float]) -> tuple[float, float]:
    """Return the 20th and the 80th percentile of samples."""
    p20, *_, p80 = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else [*samples] * 2
    return p20, p80


def is_clearly_faster(spread: tuple[float, float], other: tuple[float, float]) -> bool:
    """Return whether a time is shorter than another by more than the spread, from their 20th to 80th percentiles."""
    return spread[1] < other[0]


def ratios_by_round(row: Row, reference: Row) -> list[float]:
    """Return the seconds of another row divided by those of a row in each round, or of the medians without rounds."""
    if row.file != reference.file or len(row.samples) != len(reference.samples):
        return [reference.seconds / row.seconds]
    return [b / a for a, b in zip(row.samples, reference.samples, strict=True)]


def is_ahead(row: Row, reference: Row) -> bool:
    """Return whether a row is faster than another.

    It is, by a one-sided sign test, if it was faster in so many rounds that equal systems would reach that number in at
    most SIGNIFICANCE of all cases; with fewer rounds than such a test requires, if it was faster in all of them. Rows
    that did not take turns are compared by their spread.
    """
    ratios = ratios_by_round(row, reference)
    if len(ratios) == 1:
        return is_clearly_faster(row.spread, reference.spread)
    wins, rounds = sum(ratio > 1 for ratio in ratios), len(ratios)
    p_value = sum(math.comb(rounds, count) for count in range(wins, rounds + 1)) / 2**rounds
    return wins == rounds or p_value <= SIGNIFICANCE


def read_results(folder: Path) -> list[Result]:
    """Return all result files below a folder that were measured here, that is, that have an origin."""
    results = []
    for path in sorted(folder.rglob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        if "origin" in values:
            results.append(Result(path.relative_to(folder).as_posix(), values))
    return results


def rows_of(result: Result) -> list[Row]:
    """Return the rows of a result file; none if it has no times to compare."""
    for prefix, found in KINDS.items():
        if result.name.startswith(prefix):
            return list(found(result))
    return []


def step_rows(result: Result) -> Iterator[Row]:
    case, values = step_case(result.values), result.values
    workload = f"pre-training step, {case.model}, {case.batch}"
    for system, seconds in values["seconds"].items():
        if system != "transformers-fp32":  # of a case in bf16; the page shows that of the case in fp32
            yield result.row(workload, case.precision, system, seconds, step_bound(values), values["gemm_gflops"])


def inference_rows(result: Result) -> Iterator[Row]:
    if "implementations" in result.values:  # the format of before 29 November 2026: one batch of 32 texts per file
        texts, precision = result.values["case"].split("-")
        bound = result.values["model_gflop"] / result.values["gemm_gflops"]
        for system, entry in result.values["implementations"].items():
            workload = f"inference, base, a batch of 32 {TEXTS[texts]}"
            yield result.row(workload, precision, system, entry["seconds"], bound, result.values["gemm_gflops"])
        return
    rates = result.values["ceilings"]
    for key, workload in result.values["workloads"].items():
        texts, _, order = key.partition(", ")
        number, size = len(workload["lengths"]), workload["batch"]
        title = f"{number} {TEXTS[texts]} in batches of {size}, {order}" if order else key
        for system, entry in workload["runtimes"].items():
            precision = result.values["precisions"][system]
            bound = workload["lower_bound_s"].get(precision)
            rate = rates[precision] / 1e9 if precision in rates else None
            name = f"inference, {result.values['model']}, {title}"
            reads = bound is not None and math.isclose(bound, reading_s(result, workload, precision), rel_tol=1e-6)
            yield result.row(
                name, precision, system.removesuffix(f", {precision}"), entry["seconds"], bound, rate, reads
            )


def reading_s(result: Result, workload: dict[str, Any], precision: Precision) -> float:
    """Return the seconds of reading the weights once per batch of a workload of `bench.end_to_end.inference`."""
    rates = Rates(result.values["ceilings"][precision], result.values["ceilings"]["bytes"])
    batches = math.ceil(len(workload["lengths"]) / workload["batch"])
    return rates.reading(config_of(result.values["model"]), batches, BYTES[precision])


def patched_rows(result: Result) -> Iterator[Row]:
    for name, entry in result.values.items():
        if isinstance(entry, dict) and "plain_s" in entry:
            for system, key in (("bertfast.patch", "patched_s"), ("transformers", "plain_s")):
                yield result.row(f"patched MiniLM, {name}", "fp32", system, entry[key], *bound_in(entry))


def family_rows(result: Result) -> Iterator[Row]:
    prefix = spelling(family(result.values["family"]).prefix)
    for precision, cases in result.values["precisions"].items():
        for name, entry in cases.items():
            for system, key in (("bertfast.patch", "patched_s"), ("transformers", "plain_s")):
                workload = f"patched {prefix}, base, {name}"
                yield result.row(workload, precision, system, entry[key], *bound_in(entry))


def finetuning_rows(result: Result) -> Iterator[Row]:
    case = result.values["case"]
    kind = "windows" if case["task"] == "squad" else "sentences"
    task = TASKS.get(result.name.removeprefix("finetuning-speed-"), case["task"])
    workload = f"fine-tuning step, MiniLM, {task}, {case['batch']} {kind} of ≤ {case['length']} tokens"
    for system in ("bertfast", "transformers"):
        yield result.row(workload, "fp32", system, result.values[f"{system}_s"], *bound_in(result.values))


def sentence_training_rows(result: Result) -> Iterator[Row]:
    """Yield the times of a training step of embeddings and of a reranker, by bertfast and sentence-transformers."""
    for task, title in {"embedding": "embeddings (CoSENT)", "reranking": "a reranker"}.items():
        workload = f"fine-tuning step, MiniLM, {title}, {result.values['batch']} pairs of STS-B"
        for precision, entry in result.values[task].items():
            for system, key in (("bertfast", "bertfast_s"), ("sentence-transformers", "sentence_transformers_s")):
                yield result.row(workload, precision, system, entry[key], *bound_in(entry))


def embed_rows(result: Result) -> Iterator[Row]:
    speed = result.values["speed"]
    bounds = speed.get("bounds", {"fp32": speed})  # older files have one, that of fp32
    for system, samples in speed.items():
        if isinstance(samples, list):
            precision = precision_of(system)
            name = system.removesuffix(f", {precision}").replace("bertfast", "bertfast embed")
            workload = f"embeddings, MiniLM, {speed['sentences']:,} sentences"
            yield result.row(workload, precision, name, samples, *bound_in(bounds.get(precision, {})))


def int8_rows(result: Result) -> Iterator[Row]:
    """Yield the times of a fine-tuned model in each precision."""
    for name, task in result.values["tasks"].items():
        for order, timed in task["workloads"].items():
            texts = "pairs" if name == "sts-b" else "sentences"
            number = f"{len(timed['lengths'])} {texts} of {TASKS[name]} in batches of {timed['batch']}, {order}"
            for precision, entry in timed["precisions"].items():
                bound = timed["lower_bound_s"].get(precision)
                rate = task["ceilings"].get(precision)
                yield result.row(
                    f"fine-tuned MiniLM, {number}", precision, "bertfast", entry["seconds"], bound, rate and rate / 1e9
                )


def serving_rows(result: Result) -> Iterator[Row]:
    values, burst = result.values, result.values["burst"]
    found = {f"{burst['sentences']} sentences, {burst['at_once']} at a time": burst["seconds"]}
    for rate, engines in values["loads"].items():
        for key in ("p50", "p99"):
            samples_of = {name: [load[f"{key}_s"] for load in rounds] for name, rounds in engines.items()}
            found[f"{rate} requests/s, {key} of the latency"] = samples_of
    for title, runtimes in found.items():
        for system, samples in runtimes.items():
            precision = values["precisions"][system]
            name = system.removesuffix(f", {precision}")
            yield result.row(f"serving, {values['model']}, {title}", precision, name, samples)


def bound_in(entry: dict[str, Any]) -> tuple[float | None, float | None]:
    """Return the lower bound in seconds and the GEMM throughput of an entry; older ones have neither."""
    return entry.get("lower_bound_s"), entry.get("gemm_gflops")


KINDS: dict[str, Callable[[Result], Iterator[Row]]] = {
    "pretraining_step-": step_rows,
    "finetuning-speed-": finetuning_rows,
    "inference-": inference_rows,
    "patched": patched_rows,
    "families-": family_rows,
    "embed": embed_rows,
    "int8_accuracy": int8_rows,
    "serving": serving_rows,
    "sentence_training": sentence_training_rows,
}


def missing_reasons(result: Result) -> dict[str, str]:
    """Return why alternatives have no time in a result file, by their names."""
    found: dict[str, str] = {**(result.values.get("not_run") or result.values.get("speed", {}).get("not_run") or {})}
    points = [point for point in result.values.get("points", []) if "reason" in point]
    found |= {point["implementation"]: point["reason"] for point in points}
    precision = ", bf16" * str(result.values.get("case", "")).endswith("-bf16")
    return {SYSTEMS.get(name, name) + precision: reason for name, reason in found.items()}
