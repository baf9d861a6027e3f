"""Write tables and plots of measured results.

    python -m bench.report RESULTS … [--output FOLDER]

RESULTS are JSON files of `bench`, or folders with such files. Writes FOLDER/summary.md and, if matplotlib is installed,
a plot of each operator; prints the short table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from bench import gpu_clocks
from bench.figures import plot_operators, runs_of
from bench.sass_model.predictions import PAGE, predicted_times

RUN = ["case", "direction", "implementation", "µs", "20 to 80 %", "GB/s", "TFLOP/s", "roofline efficiency", "error"]
RUN += ["extra MB", "clock"]  # memory beyond inputs and gradients; see `harness.device_seconds`
CALL = ("operation", "case", "direction", "implementation")
KERNEL = [*CALL, "kernel", "launches", "µs of one", "predicted µs", "measured / predicted"]
SHORT = ("operation", "case", "direction", "bertfast µs", "roofline efficiency", "fastest other", "other µs", "ratio")
STEP = ("case", "tokens", "bertfast ms", "other", "other ms", "ratio", "GEMM efficiency")
OWN_STEP = ("case", "tokens", "ms", "captured", "predicted ms", "measured / predicted")
PART = ("part", "s", "status", "last line")
CLOCK = ("GPU", "minimum", "median", "maximum")
GOAL = ("operation", "case", "direction", "against", "target", "reached")
SKIPPED = ("operation", "case", "implementation", "direction", "reason")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files, or folders with JSON files")
    parser.add_argument("--output", type=Path, help="folder for the tables and plots (default: that of the results)")
    arguments = parser.parse_args()
    if missing := [str(path) for path in arguments.results if not path.exists()]:
        parser.error(f"there is no {', '.join(missing)}")
    first = arguments.results[0]
    output = arguments.output or (first if first.is_dir() else first.parent)
    output.mkdir(parents=True, exist_ok=True)
    results = read(arguments.results)
    (output / "summary.md").write_text(summary(results) + clocks(arguments.results), encoding="utf-8")
    print(short(results), flush=True)  # before the plots, which take longer
    plots = plot_operators(results, output)
    print(f"\nsummary.md and {len(plots)} plots are in {output}")


def read(paths: list[Path]) -> list[dict[str, Any]]:
    """Return the JSON objects of files and folders.

    Files that are not complete, left by interrupted runs, are named and left out.
    """
    results: list[dict[str, Any]] = []
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    for file in files:
        try:
            results.append(json.loads(file.read_text(encoding="utf-8")))
        except ValueError:
            print(f"{file} is left out: it is not complete JSON", file=sys.stderr)
    return results


def summary(results: list[dict[str, Any]]) -> str:
    """Return everything that was measured, in Markdown."""
    sections = ["# What was measured", *_origins(results), *_parts(results), *_ceilings(results), short(results)]
    runs = runs_of(results)
    for operation in dict.fromkeys(run["operation"] for run in runs):
        rows = [_operation_row(run) for run in runs if run["operation"] == operation]
        sections += [f"## {operation}", _table(RUN, rows)]
    predicted = predicted_times()
    called = [call for result in results for call in result.get("kernels", [])]
    if kernels := [row for call in called for row in _kernel_rows(call, predicted)]:
        text = f"Predicted times are those of {PAGE.name} in bench/results, of one launch without the gap after it."
        sections += ["## Kernels", text, _table(KERNEL, kernels)]
    skipped = [entry for result in results for entry in result.get("not_timed", [])]
    if skipped:
        sections += ["## Not timed", _table(SKIPPED, _merged(skipped))]
    return "\n\n".join(sections) + "\n"


def clocks(paths: list[Path]) -> str:
    """Return a table of the GPU's clocks, power and temperature while these folders were written; "" if unknown."""
    files = [path / gpu_clocks.FILE for path in paths if (path / gpu_clocks.FILE).is_file()]
    rows = [
        (name, *(f"{value:g}" for value in values)) for file in files for name, *values in gpu_clocks.summarised(file)
    ]
    return f"\n## Clocks\n\n{_table(CLOCK, rows)}\n" if rows else ""


def short(results: list[dict[str, Any]]) -> str:
    """Return tables of bertfast vs the fastest alternative, for each operator and for the pre-training step."""
    sections = []
    grouped = defaultdict(list)
    for run in runs_of(results):
        grouped[run["operation"], run["case"], run["direction"]].append(run)
    rows = [row for key, runs in grouped.items() if (row := _short_row(key, runs))]
    if rows:
        sections += ["## Operators: bertfast vs the fastest alternative", _table(SHORT, rows)]
    goals = [tuple(goal.values()) for result in results for goal in result.get("goals", [])]
    if goals:
        rows = [(*where, f"{target:.2f}", f"{reached:.2f}") for *where, target, reached in goals]
        sections += ["## Goals", _table(GOAL, rows)]
    steps = [row for result in results if "bertfast_median_s" in result for row in _step_rows(result)]
    if steps:
        sections += ["## One pre-training step", _table(STEP, steps)]
    own = [result["train_step"] for result in results if "train_step" in result]
    if own:
        predicted = predicted_times()
        rows = [_train_step_row(step, predicted) for step in own]
        sections += ["## The step of bertfast pretrain", _table(OWN_STEP, rows)]
    return "\n\n".join(sections) or "Nothing was measured."


def _origins(results: list[dict[str, Any]]) -> list[str]:
    lines = []
    for result in results:
        origin = result.get("origin", {})
        gpu, versions = origin.get("gpu"), origin.get("versions", {})
        device = f"{gpu['name']} (sm_{gpu['capability']}, driver {gpu['driver']})" if gpu else origin.get("processor")
        packages = ", ".join(f"{name} {version}" for name, version in versions.items())
        library = ", ".join(f"{name} {value}" for name, value in origin.get("library", {}).items())
        line = f"{device}; Python {origin.get('python')}, {packages}; commit {origin.get('commit')}"
        lines.append(line + f"; library: {library}" * bool(library))
    return list(dict.fromkeys(lines))


def _parts(results: list[dict[str, Any]]) -> list[str]:
    rows = [
        (part["name"], f"{part['seconds']:.0f}", part["status"], "; ".join([part["last_line"], *part["problems"]]))
        for result in results
        for part in result.get("parts", [])
    ]
    return ["## Parts", _table(PART, rows)] if rows else []


def _ceilings(results: list[dict[str, Any]]) -> list[str]:
    found = [result["ceilings"] for result in results if "ceilings" in result]
    if not found:
        return []
    gemm, copies = (
        " to ".join(dict.fromkeys(f"{extreme(each[name] for each in found) / 1e12:.3g}" for extreme in (min, max)))
        for name in ("flops", "bytes")
    )
    text = f"In these runs, bf16 GEMMs reach {gemm} TFLOP/s, and copies {copies} TB/s, reads and writes both counted."
    return ["## Ceilings", text]


def _operation_row(run: dict[str, Any]) -> tuple[str, ...]:
    memory = run["extra_memory_bytes"]
    return (
        run["case"],
        run["direction"],
        run["implementation"],
        _microseconds(run["median_s"]),
        f"{_microseconds(run['p20_s'])} to {_microseconds(run['p80_s'])}",
        f"{run['bytes'] / run['median_s'] / 1e9:.4g}",
        f"{run['flops'] / run['median_s'] / 1e12:.3g}" if run["flops"] else "",
        f"{run['roofline_efficiency']:.0%}",
        f"{run['relative_error']:.1e}",
        "" if memory is None else f"{memory / 1e6:.0f}",
        run["clock"],
    )


def _kernel_rows(call: dict[str, Any], predicted: dict[str, float]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each kernel of a call; `predicted` has the times in µs by "kernel, case"."""
    for name, times in call["kernels"].items():
        # The page names Triton's kernels without this suffix, and those in CUDA C++ with their template arguments.
        kernel = name if "<" in name else name.removesuffix("_kernel")
        measured, expected = 1e6 * times["median_s"], predicted.get(f"{kernel}, {call['predicted_case']}")
        yield (
            *(call[key] for key in CALL),
            name,
            f"{times['launches']:g}",
            f"{measured:.4g}",
            *(("", "") if expected is None else (f"{expected:g}", f"{measured / expected:.2f}")),
        )


def _short_row(key: tuple[str, str, str], runs: list[dict[str, Any]]) -> tuple[str, ...] | None:
    fused = next((run for run in runs if run["implementation"] == "bertfast"), None)
    if fused is None:
        return None
    others = [run for run in runs if not run["implementation"].startswith("bertfast")]
    other = min(others, key=lambda run: run["median_s"], default=None)
    comparison = ("", "", "")
    if other:
        ratio = other["median_s"] / fused["median_s"]
        comparison = (other["implementation"], _microseconds(other["median_s"]), f"{ratio:.2f}")
    return (*key, _microseconds(fused["median_s"]), f"{fused['roofline_efficiency']:.0%}", *comparison)


def _step_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    seconds = result["bertfast_median_s"]
    return [
        (
            result["case"],
            f"{result['tokens']} of {result['padded_tokens']}",
            f"{seconds * 1e3:.1f}",
            name,
            f"{result[f'{name}_median_s'] * 1e3:.1f}",
            f"{result[f'{name}_median_s'] / seconds:.2f}",
            f"{result['gemm_efficiency']:.0%}",
        )
        for name in result["seconds"]
        if name != "bertfast"
    ]


def _train_step_row(step: dict[str, Any], predicted: dict[str, float]) -> tuple[str, ...]:
    """Return a row for a result of `bench.end_to_end.train_step`; `predicted` has times in µs by "kernel, case"."""
    expected = predicted.get(f"pre-training step, {step['predicted_case']}")
    measured = 1e3 * step["median_s"]
    return (
        step["case"],
        f"{step['tokens']:,}",
        f"{measured:.2f}",
        "yes" if step["captured"] else "no",
        *(("", "") if expected is None else (f"{expected / 1e3:.2f}", f"{1e3 * measured / expected:.2f}")),
    )


def _merged(skipped: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return one row for all cases and directions of an implementation with the same reason."""
    keys = ("operation", "implementation", "reason")
    rows: list[tuple[str, ...]] = []
    for key, group in groupby(sorted(skipped, key=_by(keys)), key=_by(keys)):
        entries = list(group)
        cases, directions = (
            ", ".join(dict.fromkeys(entry[name] for entry in entries)) for name in ("case", "direction")
        )
        rows.append((key[0], cases, key[1], directions, key[2]))
    return rows


def _by(keys: tuple[str, ...]) -> Callable[[dict[str, Any]], tuple[str, ...]]:
    return lambda entry: tuple(entry[key] for key in keys)


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.4g}"


def _table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    main()
