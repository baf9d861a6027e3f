"""Tables and plots of what was measured.

    python -m bench.report RESULTS … [--output FOLDER]

RESULTS are JSON files of `bench`, or folders of them. Writes FOLDER/summary.md and, if matplotlib is there, a plot of
each operation; prints the short table.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from itertools import groupby
from pathlib import Path

OURS = "bertfast"
RUN = ("case", "direction", "provider", "µs", "20 to 80 %", "GB/s", "TFLOP/s", "of the floor", "error")
RUN += ("extra MB", "clock")  # memory beyond inputs and gradients; see `harness.device_seconds`
SHORT = ("operation", "case", "direction", "ours µs", "of the floor", "fastest other", "its µs", "ratio")
STEP = ("case", "tokens", "ours ms", "other", "its ms", "ratio", "of the matrix rate")
PART = ("part", "s", "status", "its last line")
GOAL = ("operation", "case", "direction", "against", "wanted", "reached")
SKIPPED = ("operation", "case", "provider", "direction", "reason")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, help="default: the first of RESULTS, or its folder")
    arguments = parser.parse_args()
    if missing := [str(path) for path in arguments.results if not path.exists()]:
        parser.error(f"there is no {', '.join(missing)}")
    first = arguments.results[0]
    output = arguments.output or (first if first.is_dir() else first.parent)
    output.mkdir(parents=True, exist_ok=True)
    results = read(arguments.results)
    (output / "summary.md").write_text(summary(results), encoding="utf-8")
    plots = plot(results, output)
    print(f"{short(results)}\n\nsummary.md and {len(plots)} plots are in {output}")


def read(paths: list[Path]) -> list[dict]:
    """The results in files and folders, each a JSON object; what a killed run left empty is passed over."""
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    return [json.loads(text) for file in files if (text := file.read_text(encoding="utf-8").strip())]


def summary(results: list[dict]) -> str:
    """Everything, in Markdown."""
    sections = ["# What was measured", *_origins(results), *_parts(results), *_ceilings(results), short(results)]
    runs = _runs(results)
    for operation in dict.fromkeys(run["operation"] for run in runs):
        rows = [_operation_row(run) for run in runs if run["operation"] == operation]
        sections += [f"## {operation}", _table(RUN, rows)]
    skipped = [entry for result in results for entry in result.get("not_timed", [])]
    if skipped:
        sections += ["## Not timed", _table(SKIPPED, _merged(skipped))]
    return "\n\n".join(sections) + "\n"


def short(results: list[dict]) -> str:
    """Ours beside the fastest other: each operation, and the step."""
    sections = []
    together = defaultdict(list)
    for run in _runs(results):
        together[run["operation"], run["case"], run["direction"]].append(run)
    rows = [row for key, runs in together.items() if (row := _short_row(key, runs))]
    if rows:
        sections += ["## Operations: ours beside the fastest other", _table(SHORT, rows)]
    goals = [tuple(goal.values()) for result in results for goal in result.get("goals", [])]
    if goals:
        sections += [
            "## Goals",
            _table(GOAL, [(*where, f"{wanted:.2f}", f"{got:.2f}") for *where, wanted, got in goals]),
        ]
    steps = [row for result in results if "ours_median_s" in result for row in _step_rows(result)]
    if steps:
        sections += ["## One pre-training step", _table(STEP, steps)]
    return "\n\n".join(sections) or "Nothing was measured."


def _origins(results: list[dict]) -> list[str]:
    said = []
    for result in results:
        origin = result.get("origin", {})
        gpu, versions = origin.get("gpu"), origin.get("versions", {})
        device = f"{gpu['name']} (sm_{gpu['capability']}, driver {gpu['driver']})" if gpu else origin.get("processor")
        packages = ", ".join(f"{name} {version}" for name, version in versions.items())
        said.append(f"{device}; Python {origin.get('python')}, {packages}; commit {origin.get('commit')}")
    return list(dict.fromkeys(said))


def _parts(results: list[dict]) -> list[str]:
    rows = [
        (part["name"], f"{part['seconds']:.0f}", part["status"], part["last_line"])
        for result in results
        for part in result.get("parts", [])
    ]
    return ["## Parts", _table(PART, rows)] if rows else []


def _ceilings(results: list[dict]) -> list[str]:
    found = [result["ceilings"] for result in results if "ceilings" in result]
    if not found:
        return []
    rates = [
        " to ".join(dict.fromkeys(f"{rate(some[name] for some in found) / 1e12:.3g}" for rate in (min, max)))
        for name in ("flops", "bytes")
    ]
    text = f"bf16 products run at {rates[0]} TFLOP/s, copies at {rates[1]} TB/s, read and written, in these runs."
    return ["## Ceilings", text]


def _runs(results: list[dict]) -> list[dict]:
    return [
        run["extra_info"] | {"median_s": run["stats"]["median"]}
        for result in results
        for run in result.get("benchmarks", [])
    ]


def _operation_row(run: dict) -> tuple:
    memory = run["extra_memory_bytes"]
    return (
        run["case"],
        run["direction"],
        run["provider"],
        _microseconds(run["median_s"]),
        f"{_microseconds(run['p20_s'])} to {_microseconds(run['p80_s'])}",
        f"{run['bytes'] / run['median_s'] / 1e9:.4g}",
        f"{run['flops'] / run['median_s'] / 1e12:.3g}" if run["flops"] else "",
        f"{run['share_of_floor']:.0%}",
        f"{run['relative_error']:.1e}",
        "" if memory is None else f"{memory / 1e6:.0f}",
        run["clock"],
    )


def _short_row(key: tuple[str, str, str], runs: list[dict]) -> tuple | None:
    ours = next((run for run in runs if run["provider"] == OURS), None)
    if ours is None:
        return None
    others = [run for run in runs if not run["provider"].startswith(OURS)]  # not ours in another way
    other = min(others, key=lambda run: run["median_s"], default=None)
    beside = ("", "", "")
    if other:
        ratio = other["median_s"] / ours["median_s"]
        beside = (other["provider"], _microseconds(other["median_s"]), f"{ratio:.2f}")
    return (*key, _microseconds(ours["median_s"]), f"{ours['share_of_floor']:.0%}", *beside)


def _step_rows(result: dict) -> list[tuple]:
    ours = result["ours_median_s"]
    return [
        (
            result["case"],
            f"{result['tokens']} of {result['padded_tokens']}",
            f"{ours * 1e3:.1f}",
            name,
            f"{result[f'{name}_median_s'] * 1e3:.1f}",
            f"{result[f'{name}_median_s'] / ours:.2f}",
            f"{result['share_of_matrix_rate']:.0%}",
        )
        for name in result["seconds"]
        if name != "ours"
    ]


def _merged(skipped: list[dict]) -> list[tuple]:
    # One row for all cases and directions with the same reason.
    keys = ("operation", "provider", "reason")
    rows = []
    for key, entries in groupby(sorted(skipped, key=_by(keys)), key=_by(keys)):
        found = list(entries)
        cases, directions = (", ".join(dict.fromkeys(entry[name] for entry in found)) for name in ("case", "direction"))
        rows.append((key[0], cases, key[1], directions, key[2]))
    return rows


def _by(keys: tuple[str, ...]):
    return lambda entry: tuple(entry[key] for key in keys)


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.4g}"


def _table(columns, rows) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def plot(results: list[dict], folder: Path) -> list[Path]:
    """A plot of each operation: what share of the floor's speed everyone reaches, case by case."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not here (it comes with the extra `plots`)")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs, written = _runs(results), []
    for operation in dict.fromkeys(run["operation"] for run in runs):
        mine = [run for run in runs if run["operation"] == operation]
        directions = list(dict.fromkeys(run["direction"] for run in mine))
        cases = list(dict.fromkeys(run["case"] for run in mine))
        providers = list(dict.fromkeys(run["provider"] for run in mine))
        size = (4 + 1.6 * len(cases), 6)
        figure, axes = pyplot.subplots(len(directions), figsize=size, sharex=True, squeeze=False, layout="constrained")
        for axis, direction in zip(axes[:, 0], directions, strict=True):
            for place, provider in enumerate(providers):
                some = [run for run in mine if (run["provider"], run["direction"]) == (provider, direction)]
                places = [cases.index(run["case"]) + 0.8 * place / len(providers) for run in some]
                shares = [100 * run["share_of_floor"] for run in some]
                axis.bar(places, shares, 0.8 / len(providers), align="edge", label=provider)
            axis.set_ylabel(f"{direction}, % of the floor's speed")
            axis.set_xticks([place + 0.4 for place in range(len(cases))], cases)
        figure.suptitle(operation)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
        written.append(folder / f"{operation}.png")
        figure.savefig(written[-1], dpi=120)
        pyplot.close(figure)
    return written


if __name__ == "__main__":
    main()
