"""Measure time and memory of ModernBERT on one sequence of 1,024 to 8,192 tokens, compared with transformers.

    python -m bench.end_to_end.long_sequences [--lengths N …] [--preset base] [--seconds N] [--results FOLDER]

Inference with random weights, in fp32 and bf16, with and without `patch`; transformers uses SDPA. Each point runs in a
process of its own, whose peak memory is that of the whole process after the model was built. The outputs of both are
compared before their times count. A point is timed five times, or less often if that would take longer than
`--seconds`, so that all points together take less than six minutes on two cores. The lower bound of the time is that of
`bench.bounds`, of which windows count the keys inside them; that of the memory is the weights and the outputs.
FOLDER gets long_sequences.json and long_sequences.png.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

import bertfast
from bench.arguments import result_parser
from bench.bounds import Rates
from bench.end_to_end.families import TOLERANCE
from bench.end_to_end.step_cases import PRECISIONS
from bench.figures import hardware, plain_ticks, save
from bench.harness import DEVICE, ON_GPU, hf_config
from bench.points import REPEATS, in_a_process, peak_memory, restart_peak, timed
from bench.result_files import require_clean_tree, write_result
from bertfast.runtime.malloc import give_freed_memory_back, keep_freed_memory
from bertfast.runtime.plotting import COLORS, load_pyplot
from bertfast.runtime.precision import has_bf16_gemm

LENGTHS = (1024, 2048, 4096, 8192)
IMPLEMENTATIONS = ("transformers", "bertfast")  # the outputs of the first are the reference
KEYS, BOUNDS = ("seconds", "peak_bytes"), ("bound_s", "bound_bytes")  # of a point, above and below in the plot


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), metavar="N", help="tokens")
    parser.add_argument("--preset", default="base", help="size of the model")
    parser.add_argument("--seconds", type=float, default=12, help="time per point in which calls are repeated")
    parser.add_argument(
        "--point", nargs=4, metavar=("NAME", "PRECISION", "LENGTH", "FILE"), help="measure only this and print it"
    )
    arguments = parser.parse_args()
    if arguments.point:
        name, precision, length, file = arguments.point
        print(json.dumps(point(arguments, name, precision, int(length), Path(file))))
        return
    if ON_GPU:
        parser.error("this program measures a CPU")
    require_clean_tree(arguments.results)
    points = []
    print("| precision | tokens | implementation | s | MB |\n|---|---|---|---|---|")
    for precision in PRECISIONS if has_bf16_gemm(DEVICE) else ["fp32"]:
        for length in arguments.lengths:
            points += both(arguments, precision, length)
    result = {"preset": arguments.preset, "points": points}
    path = write_result("long_sequences", result, arguments.results)
    plot(path)
    print(f"\nwritten to {path}")


def both(arguments: argparse.Namespace, precision: str, length: int) -> list[dict[str, Any]]:
    """Measure both implementations at a length; a point whose outputs are wrong gets a reason instead of a time."""
    points = []
    with TemporaryDirectory() as folder:
        options = ["--preset", arguments.preset, "--seconds", str(arguments.seconds), "--point"]
        for name in IMPLEMENTATIONS:
            file = str(Path(folder, f"{name}.pt"))
            found = in_a_process("end_to_end.long_sequences", [*options, name, precision, str(length), file])
            if "reason" not in found:
                found = checked(found, Path(file), Path(folder, f"{IMPLEMENTATIONS[0]}.pt"), TOLERANCE[precision])
            points.append({"implementation": name, "precision": precision, "length": length, **found})
            cells = found.get("reason") or f"{found['seconds']:.3f} | {found['peak_bytes'] / 1e6:.0f}"
            print(f"| {precision} | {length} | {name} | {cells} |", flush=True)
    return points


def checked(found: dict[str, Any], file: Path, expected: Path, tolerance: float) -> dict[str, Any]:
    """Return a point with the error of its outputs relative to the norm of those in another file, if that exists."""
    if not expected.is_file():
        return {"reason": "not timed because there are no outputs to compare with"}
    outputs, reference = (torch.load(path, weights_only=True) for path in (file, expected))
    error = float((outputs - reference).norm() / reference.norm())
    if not error <= tolerance:
        return {"reason": f"not timed because its outputs are wrong: the relative error is {error:.2g}"}
    return found | {"relative_error": error}


@torch.no_grad()
def point(arguments: argparse.Namespace, name: str, precision: str, length: int, file: Path) -> dict[str, Any]:
    """Return the seconds of a call, the peak memory of the process and their lower bounds; write the outputs."""
    torch.manual_seed(0)
    config: Any = hf_config(bertfast.preset_config(arguments.preset, architecture="modernbert"))
    model: Any = transformers.ModernBertModel(config).eval().to(PRECISIONS[precision])
    if name == "bertfast":
        bertfast.patch(model)
    inputs = {"input_ids": torch.randint(1000, 50000, (1, length)), "attention_mask": torch.ones(1, length).long()}
    give_freed_memory_back()  # that of the fp32 weights, of which bf16 ones were made
    keep_freed_memory()
    restart_peak()
    call = partial(model, **inputs)
    started = time.perf_counter()
    outputs = call().last_hidden_state
    repeats = int(arguments.seconds / (time.perf_counter() - started))
    found = timed(call, min(max(repeats - 1, 1), REPEATS), warm=True)
    found["peak_bytes"] = peak_memory()
    torch.save(outputs.float(), file)
    weight = next(model.parameters())
    rates = Rates.measured(config, length, weight.dtype)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    bounds = {"bound_s": rates.inference(config, [[length]], weight.itemsize), "bound_bytes": weights + outputs.nbytes}
    return found | bounds | rates.entries()


def plot(path: Path) -> None:
    """Draw time and peak memory against the length, a column per precision; the PNG file is next to the result file."""
    pyplot = load_pyplot()
    if pyplot is None:
        print("no plot: matplotlib is not installed (pip install 'bertfast[plots]')")
        return
    result = json.loads(path.read_text(encoding="utf-8"))
    points = [each for each in result["points"] if "seconds" in each]
    precisions = list(dict.fromkeys(each["precision"] for each in points))
    figure, axes = pyplot.subplots(
        2, len(precisions), figsize=(4.5 * len(precisions), 6), sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    figure.suptitle(
        f"ModernBERT-{result['preset']}, inference, one sequence; {hardware(result['origin'])}", fontsize=11
    )
    for column, precision in zip(axes.T, precisions, strict=True):
        for axis, key, bound, unit in zip(column, KEYS, BOUNDS, (1, 1e6), strict=True):
            for name in IMPLEMENTATIONS:
                own = [each for each in points if each["implementation"] == name and each["precision"] == precision]
                lengths = [each["length"] for each in own]
                axis.plot(lengths, [each[key] / unit for each in own], "o-", label=name, color=COLORS[name])
            axis.plot(lengths, [each[bound] / unit for each in own], ":", label="lower bound", color="tab:gray")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            plain_ticks(axis.yaxis)
            axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
            axis.grid(alpha=0.3)
        column[0].set_title(precision)
        column[1].set_xlabel("tokens")
    axes[0, 0].set_ylabel("time (s)")
    axes[1, 0].set_ylabel("peak memory of the process (MB)")
    axes[0, 0].legend()
    save(figure, path.with_suffix(".png"), [result])


if __name__ == "__main__":
    main()
