"""The text of docs/BENCHMARKS.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bench.figures import step_case
from bench.page.accuracy import accuracy_text
from bench.page.data import data_text
from bench.page.gemm_libraries import gemm_libraries_text
from bench.page.learning import is_learning, learning_text
from bench.page.memory import ahead_in, memory_table, over_time_table, sweep_of
from bench.page.operators import comparisons, operators_text
from bench.page.plots import plots_of
from bench.page.rows import Result, Row, is_ahead, missing_reasons, ratios_by_round, rows_of
from bench.page.scaling import scaling_text
from bench.page.serving import serving_text
from bench.page.text import bound_text, duration, table

SHOWN = (
    "growth",
    "vocabulary",
    "long_sequences",
    "data",
    "step_parts",
    "cpu_operators",
    "gemm_libraries",
    "scaling",
)  # besides results with rows

INTRODUCTION = """\
# Benchmarks

`make bench-figures` writes this page from the files in `bench/results/`, each of which contains its commit, processor,
number of threads and versions; programs refuse to write results of uncommitted code. `make bench` measures this
processor in about 40 minutes and continues after an interruption, `make bench-all` takes longer and adds the rest, and
`make bench-compare BASE=REF` compares two commits.

All systems of a workload get the same tokens, weights (random, except MiniLM's, which are published, or fine-tuned
from these) and number of threads. They run alternately in one process that keeps freed memory; in the tables of one
layer, of the masked-LM loss and of long sequences, each point has a process of its own, and so has each engine of a
server. Outputs are compared before anything is timed: fp32 must agree within 1e-4, bf16 within 0.1 of the largest
value, and int8 must reach a cosine of 0.9 with fp32. Times are medians of n samples, with the 20th and 80th
percentile; a sample of inference on one sentence ("1 x 8 tokens") is the mean of five calls. A ratio above 1 means
slower than bertfast. Where bertfast's int8 was not measured, that of others is compared with its fp32.

The *lower bound* of a time (`bench/bounds.py`) is the larger of two times: the FLOPs, without padding, at the measured
GEMM rate, and reading all weights once per batch; cells of the latter say "reading weights". The GEMM rate is that of
bertfast's `linear` in the same run, in inference that of its packed weights where they are faster (files older than
`inference_gemm_throughput` have only the former), of int8 that of `torch._int_mm`. In training the optimizer's part is
added, which is the smaller of its measured time and of its memory traffic at the bandwidth of a copy. The rate is
shown next to the bound, because fp32 GEMMs on family 26 vary by a quarter between runs: shares of bounds with
different rates are not comparable. There, fp32 GEMMs run in oneDNN instead of MKL (`bertfast/ops/matmul.py`). The
lower bound of a memory is what has to exist at once: gradients and outputs of a step, or the weights of a process.
Tables that compare a process with itself over time have no bound. The FLOPs are those of all tokens in all layers.
Where only masked tokens or [CLS] are read, bertfast computes fewer rows in the last layer, so that its time can come
close to the bound or fall below it: in pre-training, sequence classification and its fine-tuning. A cell is empty
where its column does not apply, was not measured, or is younger than the file.

ModernBERT's pre-training step has 8 sequences of 1,024 tokens (8,192 tokens per update, nothing to pad), or of 256 to
1,024 tokens (5,120 tokens, "≤ 1,024"), 30 % of them masked, no dropout, and fused AdamW. transformers computes logits
of masked tokens only there (`sparse_prediction`).

No GPU was measured here ([status of the backends](../README.md#backends)). `make
gpu-check-accuracy` and `make gpu-check-speed` check and measure the kernels on a GPU machine without a network
([KERNELS.md](KERNELS.md)); `bench/LOG.md` has predictions, and `make compiled-tables` writes registers and shared
memory of each kernel for sm_80, 90, 100 and 120.
"""

AHEAD = """\
At equal precision first; other differences are in the tables below. Systems take turns in rounds, so the ratio is the
median of the ratios by round, and an alternative counts as ahead if it was faster in so many rounds that equally fast
systems would reach that number in 5 % of all cases at most (5 of 5, 7 of 8), or in all of fewer rounds. Operators, of
which files keep no rounds, and points that had a process of their own count if their 20 to 80 % ranges do not overlap.
"""


def document(results: list[Result], folder: Path) -> str:
    """Return the page; `folder` is that of the results."""
    machines = by_processor(results)
    sections = [INTRODUCTION, ahead_section(machines)]
    sections += [machine_section(name, found, folder) for name, found in machines.items()]
    single = {result.file: result for result in results}
    sections.append(instructions_section(single))
    sections += [programs_section(single), curves_section(single)]
    sections.append(published_section(folder / "published.json"))
    return "\n".join(section for section in sections if section)


def by_processor(results: list[Result]) -> dict[str, list[Result]]:
    """Return the results that have rows or memory to show, by processor; those with most rows first."""
    machines: dict[str, list[Result]] = {}
    for result in results:
        if rows_of(result) or result.name in SHOWN or over_time_table(result) or is_learning(result):
            machines.setdefault(result.origin["processor"], []).append(result)
    return dict(sorted(machines.items(), key=lambda item: -sum(len(rows_of(result)) for result in item[1])))


def reference_of(row: Row, group: Sequence[Row]) -> Row | None:
    """Return bertfast's row to compare with: of the same precision, or for int8 else in fp32; None for its own."""
    if row.is_bertfast:
        return None
    precisions = ("int8", "fp32") if row.precision == "int8" else (row.precision,)
    found = {other.precision: other for other in reversed(group) if other.is_bertfast}
    return next((found[precision] for precision in precisions if precision in found), None)


def leaders(group: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return the alternatives that are faster than bertfast, each with bertfast's row, at equal precision first."""
    pairs = [(row, reference) for row in group if (reference := reference_of(row, group))]
    ahead = [(row, reference) for row, reference in pairs if is_ahead(row, reference)]
    return sorted(ahead, key=lambda pair: (not at_equal_precision(pair), pair[0].seconds))


def at_equal_precision(pair: tuple[Row, Row]) -> bool:
    """Return whether both rows have the same precision."""
    return pair[0].precision == pair[1].precision


def groups_of(results: Iterable[Result]) -> list[list[Row]]:
    """Return the rows by workload and threads; those with an alternative ahead come first."""
    rows = [row for result in results for row in rows_of(result)]
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.workload, row.threads), []).append(row)
    return sorted(groups.values(), key=lambda group: not leaders(group))


def ahead_section(machines: dict[str, list[Result]]) -> str:
    """Return the tables of what alternatives do faster, by processor, and in less memory."""
    parts = ["## Where an alternative is ahead\n", AHEAD]
    for name, results in machines.items():
        pairs = [pair for group in groups_of(results) for pair in leaders(group)]
        equal, other = ([pair for pair in pairs if at_equal_precision(pair) == same] for same in (True, False))
        rows = [*map(ahead_cells, equal), *operators_ahead(results), *map(ahead_cells, other)]
        if rows:
            columns = ["workload", "threads", "alternative", "its time", "bertfast", "bertfast / alternative"]
            parts.append(f"{name}:\n\n{table(columns, rows)}\n")
        sweeps = [(sweep, ahead_in(sweep)) for result in results if (sweep := sweep_of(result))]
        parts += [f"- {name}, {sweep.short_title}: {'; '.join(found)}\n" for sweep, found in sweeps if found]
    if len(parts) == 2:
        parts.append("In none of the workloads below.\n")
    return "\n".join(parts)


def ahead_cells(pair: tuple[Row, Row]) -> list[str]:
    """Return the cells of an alternative that is ahead of bertfast; the ratio is the median of those by round."""
    row, reference = pair
    ratio = statistics.median(ratios_by_round(row, reference))
    times = [duration(row.seconds), f"{duration(reference.seconds)}, {reference.precision}"]
    return [row.workload, str(row.threads), f"{row.system}, {row.precision}", *times, f"{ratio:.2f} x"]


def operators_ahead(results: list[Result]) -> Iterator[list[str]]:
    """Yield the cells of the operators in which an alternative is ahead."""
    for result in results:
        for each in (each for each in comparisons(result) if each.is_behind):
            operator, case, direction, own, *_ = each.cells
            time, ratio = duration(each.alternative["median"]), 1 / each.alternative["relative_time"]
            where = [f"{operator}, {case}, {direction}", str(result.origin["threads"])]
            yield [*where, each.alternative_name, time, own, f"{ratio:.2f} x"]


def machine_section(name: str, results: list[Result], folder: Path) -> str:
    """Return the table of a processor, what did not run, memory, plots and the files with their origin."""
    columns = ["workload", "threads", "system", "precision", "time", "20 to 80 %", "n", "vs bertfast"]
    columns += ["lower bound", "bound / time"]
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
                    str(len(row.samples)),
                    f"{row.seconds / reference.seconds:.2f} x" if reference else "",
                    bound_text(row.lower_bound, row.gemm_gflops, row.reads_weights),
                    f"{row.lower_bound / row.seconds:.0%}" if row.lower_bound else "",
                ]
            )
    parts = [f"## {name}\n", *([table(columns, rows) + "\n"] if rows else [])]
    parts += filter(None, [speed_text(results)])
    if not_run := sorted({f"- {key}: {why}" for result in results for key, why in missing_reasons(result).items()}):
        parts.append("Without a time:\n\n" + "\n".join(not_run) + "\n")
    parts += filter(None, map(errors_text, results))
    parts += filter(None, map(accuracy_text, results))
    parts += filter(None, map(operators_text, results))
    parts += filter(None, map(gemm_libraries_text, results))
    parts += [memory_table(sweep) for result in results if (sweep := sweep_of(result))]
    parts += filter(None, map(over_time_table, results))
    parts += filter(None, map(serving_text, results))
    parts += filter(None, map(scaling_text, results))
    parts += [data_text(result) for result in results if result.name == "data"]
    parts += filter(None, [learning_text(results, folder)])
    parts += [f"![{title}](../bench/results/{path})\n" for title, path in plots_of(results, folder)]
    parts.append(
        "Files in `bench/results/`:\n\n" + table(["file", "date", "commit", "versions"], map(origin_row, results))
    )
    return "\n".join(parts) + "\n"


def speed_text(results: list[Result]) -> str:
    """Return what the speed of the pre-training steps of a processor is made of, "" if it has none."""
    steps = [result for result in results if result.name.startswith("pretraining_step-")]
    if not steps:
        return ""
    cases = {step_case(each.values): each.values for each in steps}
    shares = {
        f"{case.model}, {case.batch}: {values['tokens']:,} of {values['padded_tokens']:,}"
        for case, values in cases.items()
    }
    text = (
        "In pre-training, bertfast computes neither padding, which transformers does (tokens of the slots of a batch: "
        f"{'; '.join(sorted(shares))}), nor logits of unmasked tokens, which transformers does for BERT."
    )
    if "family 26" in steps[0].origin["processor"]:
        text += " In fp32, its GEMMs also run in oneDNN, those of transformers in MKL."
    return f"{text}\n"


def origin_row(result: Result) -> list[str]:
    """Return the name of a file, its date, commit and versions."""
    origin = result.origin
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    return [f"`{result.file}`", origin["date"], origin["commit"], f"Python {origin['python']}, {versions}"]


def errors_text(result: Result) -> str:
    """Return the differences of outputs that a result file has, "" if it has none."""
    errors = result.values.get("errors")
    if not isinstance(errors, dict):
        return ""
    found = [f"{name} {error['relative']:.1e} (cosine {error['cosine']:.4f})" for name, error in errors.items()]
    return f"Errors of the outputs in `bench/results/{result.file}`: {'; '.join(found)}.\n"


def instructions_section(single: dict[str, Result]) -> str:
    """Return the table of instructions per token."""
    result = single.get("instructions.json")
    if result is None:
        return ""
    counts = result.values["per_token"]
    kernels = dict.fromkeys(name.partition(", ")[0] for name in counts)
    found = {kernel: [counts.get(f"{kernel}, {way}") for way in ("forward", "backward")] for kernel in kernels}
    rows = [[kernel, *("" if each is None else f"{each:,.0f}" for each in pair)] for kernel, pair in found.items()]
    return (
        "## Instructions of the CPU kernels\n\nPer token of BERT-base, fp32, dropout 0.1, sequences of 128 tokens "
        "(`attention_window`: one sequence of 1,024 tokens with a window of 64; `packed_…`, for inference: a weight of "
        "768 by 768 in that precision, and a whole layer in fp32), "
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
        rows.append(
            [
                "fine-tuning `tiny`, pre-trained on WikiText-2 for 3 epochs, on SST-2, 2 epochs",
                *program_cells(run),
                found,
            ]
        )
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
    rows = [
        [entry["system"], entry["hardware"], entry["figure"], f"[{entry['source']}]({entry['url']})"]
        for entry in entries
    ]
    text = "Published by others, not measured here; for orientation only (`bench/results/published.json`)."
    columns = ["system", "hardware", "published figure", "source"]
    return f"## Published figures of GPUs\n\n{text}\n\n{table(columns, rows)}\n"
