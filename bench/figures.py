"""Draw the seconds of a pre-training step, as shown in the README, from result files.

    python -m bench.figures RESULT.json … [--output docs/images/pretraining_step.png]

RESULT are files of `bench.end_to_end.pretraining_step`, each of which becomes a panel.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.bounds import step_bound
from bench.result_files import ROOT
from bertfast.architectures import family_by_type
from bertfast.runtime.plotting import COLORS
from bertfast.runtime.settings import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

STEP_COLORS = COLORS | {"transformers, compiled": "tab:red", "lower bound": "tab:gray"}
STEP_BARS = {
    "transformers": "transformers-sdpa_median_s",
    "transformers, compiled": "transformers-compile_median_s",
    "bertfast": "bertfast_median_s",
}
OPERATOR_NAMES = {  # of implementations, as result files of operators name them, and as tables and plots do
    "F.linear_cross_entropy": "PyTorch's fused loss",
    "bertfast-p0": "bertfast without dropout",
    "bertfast-full": "bertfast without a window",
    "definition": "reference",
    "linear+bias_gelu": "GEMM and bias_gelu",
    "sdpa": "SDPA, padded",
    "sdpa-flash": "SDPA, padded, FlashAttention",
    "sdpa-loop": "SDPA, a call per sequence",
    "torch": "PyTorch",
}
INPUTS = "Inputs"  # text of a PNG file: the fingerprints of the results that it shows
STEP_CASE = re.compile(
    r"(?:gpu-)?(?:(?P<architecture>[a-z]+)-)?(?P<preset>[a-z]+)-(?P<length>\d+)(?:-wikipedia|-uniform|-full-\d+)?"
    r"(?:-(?P<precision>fp32|bf16))?"
)


@dataclass(frozen=True)
class StepCase:
    """A case of `bench.end_to_end.pretraining_step`.

    Attributes:
        model: Architecture, if it is not BERT, and size.
        batch: Number of samples and their length.
        precision: Precision of the GEMMs.
    """

    model: str
    batch: str
    precision: str


def step_case(result: dict[str, Any]) -> StepCase:
    """Return the case of a result file of a pre-training step, from its name.

    Raises:
        ValueError: The name is not understood.
    """
    case = STEP_CASE.fullmatch(result["case"])
    if case is None:
        raise ValueError(f"the name of the case is not understood: {result['case']}")
    named = family_by_type(case["architecture"] or "bert")
    if named is None:
        raise ValueError(f"the name of the case has an unknown architecture: {result['case']}")
    model = case["preset"] if named.model_type == "bert" else f"{spelling(named.prefix)}-{case['preset']}"
    length, lengths = int(case["length"]), result["lengths"]
    batch = f"{len(lengths)} x {'' if min(lengths) == length else '≤ '}{length:,} tokens"
    return StepCase(model, batch, case["precision"] or "bf16")


def spelling(prefix: str) -> str:
    """Return the name of a family as its authors spell it, from the prefix of transformers' classes."""
    return re.sub("Bert$", "BERT", prefix)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="JSON file of a pre-training step")
    default = ROOT / "docs" / "images" / "pretraining_step.png"
    parser.add_argument("--output", type=Path, default=default, help="PNG file (default: that of the README)")
    arguments = parser.parse_args()
    results = []
    for path in arguments.results:
        results.append(json.loads(path.read_text(encoding="utf-8")))
        if "+changes" in results[-1]["origin"]["commit"]:
            parser.error(f"{path} was measured with uncommitted changes: measure it again from a commit")
    plot_steps(results, arguments.output)
    print(f"written to {arguments.output}")


def plot_steps(results: list[dict[str, Any]], path: Path) -> None:
    """Draw a panel per result with a bar for each implementation and for the lower bound.

    The numbers in brackets are the ratios of the medians to that of bertfast.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (8, 2.3 * len(results))
    figure, axes = pyplot.subplots(len(results), figsize=size, squeeze=False, layout="constrained")
    for axis, result in zip(axes[:, 0], results, strict=True):
        _plot_step(axis, result)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path, results)


def save(figure: Figure, path: Path, results: list[dict[str, Any]]) -> None:
    """Write a plot with the fingerprints of the results that it shows, and close it."""
    from matplotlib import pyplot

    inputs = " ".join(map(fingerprint, results))
    figure.savefig(path, dpi=110, metadata={"Software": None, INPUTS: inputs})
    pyplot.close(figure)


def fingerprint(result: dict[str, Any]) -> str:
    """Return a hash of the content of a result file."""
    return sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def inputs_of(path: Path) -> list[str]:
    """Return the fingerprints of the results that a PNG file shows; none if it contains none."""
    content = path.read_bytes()
    start = 8  # after the signature: chunks of length, type, data and checksum
    while start < len(content):
        length, kind = struct.unpack(">I4s", content[start : start + 8])
        key, _, text = content[start + 8 : start + 8 + length].partition(b"\0")
        if kind == b"tEXt" and key.decode("latin-1") == INPUTS:
            return text.decode("latin-1").split()
        start += 12 + length
    return []


def plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with numbers such as 200 instead of powers, at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _plot_step(axis: Axes, result: dict[str, Any]) -> None:
    seconds = {name: result[key] for name, key in STEP_BARS.items() if key in result}
    seconds["lower bound"] = step_bound(result)
    bars = axis.barh(list(seconds), list(seconds.values()), color=[STEP_COLORS[name] for name in seconds])
    labels = [f"{value:.2f}" for value in seconds.values()]
    for index, name in enumerate(seconds):
        if STEP_BARS.get(name, "").removesuffix("_median_s") in result["ratios"]:
            labels[index] += f"   ({seconds[name] / seconds['bertfast']:.2f}x)"
    axis.bar_label(bars, labels, padding=4)
    axis.set_xlim(0, 1.3 * max(seconds.values()))  # leaves space for the labels
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("time of a pre-training step (s), lower is better\nin brackets: ratio to bertfast")
    axis.set_title(_step_title(result), fontsize="medium", loc="left")


def _step_title(result: dict[str, Any]) -> str:
    """Return the model, the batch, the precision, the device and the number of threads."""
    return f"{case_title(result)}; {hardware(result['origin'])}"


def case_title(result: dict[str, Any]) -> str:
    """Return the model, the batch and the precision of a result file of a pre-training step."""
    case = step_case(result)
    model = case.model if "-" in case.model else f"BERT-{case.model}"
    return f"{model}, {case.batch}, {case.precision}"


def hardware(origin: dict[str, Any]) -> str:
    """Return the GPU of a result, or its processor, instruction set and number of threads."""
    if "gpu" in origin:
        return str(origin["gpu"]["name"])
    processor = origin["processor"]
    instruction_set = "AVX-512" if "avx512f" in processor else "AVX2" if "avx2" in processor else "no AVX2"
    return f"{processor.split(' (')[0]}, {instruction_set}, {counted(origin['threads'], 'thread')}"


def runs_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the timed calls of operator benchmarks, each a dictionary with its median in "median_s"."""
    return [
        run["extra_info"] | {"median_s": run["stats"]["median"]}
        for result in results
        for run in result.get("benchmarks", [])
    ]


def plot_operators(results: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw the roofline efficiency of all implementations, a PNG file per operator; return the files."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed (pip install 'bertfast[plots]')")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs, written = runs_of(results), []
    devices = dict.fromkeys(hardware(result["origin"]) for result in results)
    for operation in dict.fromkeys(run["operation"] for run in runs):
        of_operation = [run for run in runs if run["operation"] == operation]
        directions = list(dict.fromkeys(run["direction"] for run in of_operation))
        cases = list(dict.fromkeys(run["case"] for run in of_operation))
        size = (6 + 1.0 * len(cases), 6)
        figure, axes = pyplot.subplots(len(directions), figsize=size, sharex=True, squeeze=False, layout="constrained")
        for axis, direction in zip(axes[:, 0], directions, strict=True):
            _plot_efficiency(axis, [run for run in of_operation if run["direction"] == direction], cases)
            axis.set_ylabel(f"{direction}: lower bound / time (%)")
        # A title of the figure would be centred over the legend.
        axes[0, 0].set_title(f"{operation}; {', '.join(devices)}", fontsize="medium", loc="left")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
        written.append(folder / f"{operation}.png")
        save(figure, written[-1], [result for result in results if result.get("benchmarks")])
    return written


def _plot_efficiency(axis: Axes, runs: list[dict[str, Any]], cases: list[str]) -> None:
    """Draw a group of bars per case, a bar per implementation."""
    implementations = list(dict.fromkeys(run["implementation"] for run in runs))
    width = 0.8 / len(implementations)
    for index, implementation in enumerate(implementations):
        own = [run for run in runs if run["implementation"] == implementation]
        x = [cases.index(run["case"]) + width * index for run in own]
        y = [100 * run["roofline_efficiency"] for run in own]
        label = OPERATOR_NAMES.get(implementation, implementation)
        axis.bar(x, y, width, align="edge", label=label, color=f"C{index}")
    axis.set_xticks([index + 0.4 for index in range(len(cases))], cases, rotation=20, ha="right")


if __name__ == "__main__":
    main()
