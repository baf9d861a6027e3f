"""The text of docs/BENCHMARKS.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from bench.page.memory import ahead_in, memory_table, over_time_table, sweep_of
from bench.page.plots import plots_of
from bench.page.rows import Result, Row, missing_reasons, rows_of
from bench.page.text import duration, table
from bertfast.runtime.settings import counted

SHOWN = ("growth", "vocabulary", "data", "step_parts", "cpu_operators")  # besides results with rows

INTRODUCTION = """\
# Benchmarks

`make bench-figures` writes this page from the files in `bench/results/`, each of which contains its commit, processor,
number of threads and versions; programs refuse to write results of uncommitted code. `make bench` measures this
processor in about 40 minutes and continues after an interruption, `make bench-compare BASE=REF` compares two commits.

All systems of a workload get the same tokens, weights and number of threads, and run alternately in one process that
keeps freed memory. Outputs are compared before anything is timed: fp32 must agree within 1e-4, bf16 within 0.1 of the
largest value, and int8 must reach a cosine of 0.9 with fp32. Times are medians, with the 20th and 80th percentile.
bertfast has no int8; there it is compared in fp32. The *lower bound* is the time of the model's FLOPs, without padding,
at the GEMM throughput measured in the same run, or of reading the weights once per batch, if that is longer, plus the
traffic of AdamW at the bandwidth of a copy, where the result file contains it; the last column is the share of the
bound in the time. On family 26, fp32 GEMMs run in oneDNN instead of MKL (`bertfast/ops/matmul.py`, `bench/LOG.md`).

No GPU was measured here ([status of the backends](../README.md#backends)). `make
gpu-check-accuracy` and `make gpu-check-speed` check and measure the kernels on a GPU machine without a network
([KERNELS.md](KERNELS.md)); `bench/LOG.md` has predictions, and `make compiled-tables` writes registers and shared
memory of each kernel for sm_80, 90, 100 and 120.
"""


def document(results: list[Result], folder: Path) -> str:
    """Return the page; `folder` is that of the results."""
    machines = by_processor(results)
    sections = [INTRODUCTION, ahead_section(machines)]
    sections += [machine_section(name, found, folder) for name, found in machines.items()]
    single = {result.file: result for result in results}
    sections += [attention_section(single), instructions_section(single)]
    sections += [programs_section(single), curves_section(single)]
    sections.append(published_section(folder / "published.json"))
    return "\n".join(section for section in sections if section)


def by_processor(results: list[Result]) -> dict[str, list[Result]]:
    """Return the results that have rows or memory to show, by processor; those with most rows first."""
    machines: dict[str, list[Result]] = {}
    for result in results:
        if rows_of(result) or result.name in SHOWN or over_time_table(result):
            machines.setdefault(result.origin["processor"], []).append(result)
    return dict(sorted(machines.items(), key=lambda item: -sum(len(rows_of(result)) for result in item[1])))


def reference_of(row: Row, group: Sequence[Row]) -> Row | None:
    """Return bertfast's row to compare with, of the same precision, or for int8 in fp32; None for bertfast itself."""
    if row.is_bertfast:
        return None
    precision = "fp32" if row.precision == "int8" else row.precision
    return next((other for other in group if other.is_bertfast and other.precision == precision), None)


def leaders(group: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return the alternatives that are faster than bertfast, each with bertfast's row, fastest first."""
    pairs = [(row, reference) for row in group if (reference := reference_of(row, group))]
    return sorted((pair for pair in pairs if pair[0].seconds < pair[1].seconds), key=lambda pair: pair[0].seconds)


def groups_of(results: Iterable[Result]) -> list[list[Row]]:
    """Return the rows by workload and threads; those with an alternative ahead come first."""
    rows = [row for result in results for row in rows_of(result)]
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.workload, row.threads), []).append(row)
    return sorted(groups.values(), key=lambda group: not leaders(group))


def ahead_section(machines: dict[str, list[Result]]) -> str:
    """Return the list of workloads in which an alternative is ahead."""
    lines = ["## Where an alternative is ahead\n"]
    for name, results in machines.items():
        for group in groups_of(results):
            found = [
                f"{row.system} ({row.precision}) {duration(row.seconds)} vs {duration(reference.seconds)} in "
                f"bertfast ({reference.precision})"
                for row, reference in leaders(group)
            ]
            if found:
                lines.append(
                    f"- {name}, {group[0].workload}, {counted(group[0].threads, 'thread')}: {'; '.join(found)}"
                )
        for result in results:
            if (sweep := sweep_of(result)) and (found := ahead_in(sweep)):
                lines.append(f"- {name}, {sweep.short_title}: {'; '.join(found)}")
    if len(lines) == 1:
        lines.append("In none of the workloads below.")
    return "\n".join(lines) + "\n"


def machine_section(name: str, results: list[Result], folder: Path) -> str:
    """Return the table of a processor, what did not run, memory, plots and the files with their origin."""
    columns = ["workload", "threads", "system", "precision", "time", "20 to 80 %", "vs bertfast", "bound / time"]
    rows = []
    for group in groups_of(results):
        ordered = sorted(group, key=lambda row: (("fp32", "bf16", "int8").index(row.precision), row.seconds))
        for index, row in enumerate(ordered):
            reference = reference_of(row, group)
            rows.append(
                [
                    row.workload if index == 0 else "",
                    str(row.threads) if index == 0 else "",
                    f"**{row.system}**" if row.is_bertfast else row.system,
                    row.precision,
                    duration(row.seconds),
                    " to ".join(duration(value) for value in row.spread),
                    f"{row.seconds / reference.seconds:.2f} x" if reference else "",
                    f"{row.lower_bound / row.seconds:.0%}" if row.lower_bound else "",
                ]
            )
    parts = [f"## {name}\n", *([table(columns, rows) + "\n"] if rows else [])]
    if not_run := sorted({f"- {key}: {why}" for result in results for key, why in missing_reasons(result).items()}):
        parts.append("Without a time:\n\n" + "\n".join(not_run) + "\n")
    parts += [memory_table(sweep) for result in results if (sweep := sweep_of(result))]
    parts += filter(None, map(over_time_table, results))
    parts += [data_text(result) for result in results if result.name == "data"]
    parts += [f"![{title}](../bench/results/{path})\n" for title, path in plots_of(results, folder)]
    parts.append(
        "Files in `bench/results/`:\n\n" + table(["file", "date", "commit", "versions"], map(origin_row, results))
    )
    return "\n".join(parts) + "\n"


def origin_row(result: Result) -> list[str]:
    """Return the name of a file, its date, commit and versions."""
    origin = result.origin
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    return [f"`{result.file}`", origin["date"], origin["commit"], f"Python {origin['python']}, {versions}"]


def data_text(result: Result) -> str:
    """Return the figures of data preparation and of batches."""
    made, batches = result.values["preparation"], result.values["batches"]
    rates, fills = ([batch[key] for batch in batches] for key in ("tokens_per_second", "fill"))
    return (
        f"Data: {made['tokens'] / 1e6:.1f} M tokens, from {made['bytes'] / 1e6:.1f} MB of compressed files, become "
        f"shards in {made['seconds']:.0f} s, in processes of at most {made['peak_memory_mb']:.0f} MB. One process on "
        f"one core then assembles {min(rates) / 1e6:.1f} to {max(rates) / 1e6:.1f} M tokens per second into batches, "
        f"including planning; {min(fills):.1%} to {max(fills):.2%} of their slots contain tokens.\n"
    )


def attention_section(single: dict[str, Result]) -> str:
    """Return the table of the attention operator."""
    result = single.get("cpu-attention/cpu_operators.json")
    if result is None:
        return ""
    rows = []
    runs = [run["extra_info"] | run["stats"] for run in result.values["benchmarks"]]
    runs = [run for run in runs if run["operation"] == "attention" and run["case"].endswith("-d64-fp32")]
    for case, of_case in groupby(runs, key=lambda run: run["case"]):
        found = {(run["implementation"], run["direction"]): run for run in of_case}
        if ("sdpa", "backward") in found:
            ratios, shares = [], []
            for direction in ("forward", "backward"):
                fused = found["bertfast", direction]
                ratios.append(f"{found['sdpa', direction]['median'] / fused['median']:.2f} x")
                shares.append(f"{fused['roofline_efficiency']:.0%}")
            rows.append([case.removesuffix("-d64-fp32").replace("x", " x "), *ratios, ", ".join(shares)])
    header = ["batch", "forward", "backward", "roofline efficiency: forward, backward"]
    return (
        "## Attention\n\n12 heads of 64, fp32, vs PyTorch's scaled-dot-product attention on padded batches "
        f"(`bench/results/{result.file}`, {result.origin['processor']}, "
        f"{counted(result.origin['threads'], 'thread')}). The lower bound is the time of the FLOPs at the rate at "
        f"which a core multiplies 64³ blocks from its cache.\n\n{table(header, rows)}\n"
    )


def instructions_section(single: dict[str, Result]) -> str:
    """Return the table of instructions per token."""
    result = single.get("instructions.json")
    if result is None:
        return ""
    counts = result.values["per_token"]
    kernels = dict.fromkeys(name.partition(", ")[0] for name in counts)
    rows = [[kernel, *(f"{counts[f'{kernel}, {way}']:,.0f}" for way in ("forward", "backward"))] for kernel in kernels]
    return (
        "## Instructions of the CPU kernels\n\nPer token of BERT-base, fp32, dropout 0.1, sequences of 128 tokens "
        "(`attention_window`: one sequence of 1,024 tokens with a window of 64), "
        f"{result.values['instruction_set']}, {result.values['compiler']} (`bench/results/{result.file}`, commit "
        f"{result.origin['commit']}). A test fails when a count grows by more than 5 %.\n\n"
        f"{table(['kernel', 'forward', 'backward'], rows)}\n"
    )


def programs_section(single: dict[str, Result]) -> str:
    """Return the table of whole programs."""
    rows = []
    if demo := single.get("demo.json"):
        metrics = demo.values["metrics"]
        found = (
            f"validation loss {metrics['validation_loss']:.2f} (unigram baseline {metrics['unigram_entropy']:.2f}); "
            f"{metrics['accuracy']:.1%} of packages classified correctly, "
            f"{metrics['accuracy_from_random_start']:.1%} from random weights"
        )
        rows.append(["`make demo`", *program_cells(demo), found])
    if run := single.get("pretrain-wikitext2.json"):
        metrics = run.values["metrics"]
        found = (
            f"validation loss {metrics['validation_loss']:.2f}, MLM accuracy {metrics['validation_accuracy']:.1%}, "
            f"{metrics['step']:,} steps"
        )
        rows.append(["pre-training `tiny` on WikiText-2, 3 epochs", *program_cells(run), found])
    if run := single.get("finetune-sst2.json"):
        found = f"{run.values['metrics']['eval_accuracy']:.1%} on the development set"
        rows.append(["fine-tuning that model on SST-2, 2 epochs", *program_cells(run), found])
    if not rows:
        return ""
    text = "Whole processes including text preparation and validation (`bench/end_to_end/real_runs.py`)."
    return (
        f"## Whole programs\n\n{text}\n\n{table(['run', 'time', 'peak memory', 'processor', 'file', 'result'], rows)}\n"
    )


def program_cells(result: Result) -> list[str]:
    """Return time, peak memory, processor and file of a whole program."""
    values = result.values
    memory = f"{values['peak_memory_mb']:.0f} MB"
    return [f"{values['seconds']:.0f} s", memory, result.origin["processor"], f"`{result.file}`"]


def curves_section(single: dict[str, Result]) -> str:
    """Return the figures of training curves."""
    paragraphs = []
    if parity := single.get("curve_parity.json"):
        ends = {name: statistics.mean(values) for name, values in parity.values["ends_with_dropout"].items()}
        paragraphs.append(
            f"300 steps of `mini` end at the same loss as a plain loop around transformers "
            f"(`bench/results/{parity.file}`): {ends['bertfast']:.3f} vs {ends['transformers']:.3f} over three seeds "
            "with dropout; without dropout, the losses agree within "
            f"{parity.values['largest_difference_without_dropout']:.1e}."
        )
    if residual := single.get("residual_precision.json"):
        difference = max(map(abs, residual.values["bf16_minus_fp32"]["end"]))
        paragraphs.append(
            f"{residual.values['steps']} steps of `{residual.values['preset']}` with a bf16 residual stream end within "
            f"{difference:.1e} of the loss with an fp32 stream, for two seeds, on {residual.origin['processor']} "
            f"(`bench/results/{residual.file}`)."
        )
    return "## Training curves\n\n" + "\n\n".join(paragraphs) + "\n" if paragraphs else ""


def published_section(path: Path) -> str:
    """Return the table of figures that others have published for GPUs."""
    if not path.is_file():
        return ""
    entries = json.loads(path.read_text(encoding="utf-8"))["published"]
    rows = [[entry["system"], entry["hardware"], entry["figure"], entry["source"]] for entry in entries]
    text = "Published by others, not measured here; for orientation only (`bench/results/published.json`)."
    columns = ["system", "hardware", "published figure", "source"]
    return f"## Published figures of GPUs\n\n{text}\n\n{table(columns, rows)}\n"
