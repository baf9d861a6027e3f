"""Compare the model with published times of a row kernel of others: the forward pass of RMSNorm in quack.

    python -m bench.sass_model.published_rows KERNELS.json [--output bench/results/sass_model_published_rows.md]

The kernel is not part of this repository. The file has its commit, the compiler, and the machine code by width:

    {"commit": "bd9f261", "compiler": "nvidia-cutlass-dsl 4.3.4", "kernels": [{"columns": 512, "rows": 4, "warps": 4,
     "registers": 40, "shared_memory": 4112, "listing": "… cuobjdump -sass …"}, …]}

`rows` are those of a block. The published figures are those of Guo, Zadouri and Dao, "Getting memory-bound kernels to
speed-of-light" (July 2025), on an H100: bf16, 32,768 rows, bytes of input and output by the time between two events,
after L2 was overwritten. That time includes a launch and the eviction of L2, which the model leaves out. They are one
constant here, fitted to the figures of two widths; the other two are held out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.result_files import RESULTS, origin, require_clean_tree
from bench.sass_model.constants import H100, VERSION
from bench.sass_model.control_flow import Choice
from bench.sass_model.kernel_time import Kernel, Prediction, Work, predict

PAGE = RESULTS / "sass_model_published_rows.md"

ROWS, HALF, SINGLE = 32_768, 2, 4
PUBLISHED = {512: 2300, 1024: 2580, 2048: 2760, 4096: 2900}  # GB/s by width
FITTED = (1024, 4096)  # chosen before any width was compared


@dataclass(frozen=True)
class Comparison:
    """A published figure in GB/s and a prediction.

    Attributes:
        columns: Width of a row.
        prediction: Prediction for the kernel alone.
        overhead: Seconds that are added to it.
    """

    columns: int
    prediction: Prediction
    overhead: float

    @property
    def predicted(self) -> float:
        """The predicted figure, in GB/s."""
        return _bytes(self.columns) / (self.prediction.seconds + self.overhead) / 1e9

    @property
    def alone(self) -> float:
        """The predicted figure without overhead."""
        return _bytes(self.columns) / self.prediction.seconds / 1e9

    @property
    def error(self) -> float:
        """The prediction's relative error."""
        return self.predicted / PUBLISHED[self.columns] - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="KERNELS.json", help="file with machine code, see above")
    parser.add_argument("--output", type=Path, help="write the table to this Markdown file instead of printing it")
    arguments = parser.parse_args()
    require_clean_tree(arguments.output or RESULTS.parent)
    compiled = json.loads(arguments.file.read_text(encoding="utf-8"))
    text = "\n".join(page(compiled, compare(compiled))) + "\n"
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    else:
        print(text)


def compare(compiled: dict[str, Any]) -> list[Comparison]:
    """Return the comparison at each width, after the overhead was fitted to two of them."""
    found = {kernel["columns"]: _predict(kernel) for kernel in compiled["kernels"]}
    missing = [columns for columns in PUBLISHED if columns not in found]
    if missing:
        raise ValueError(f"the file has no kernel for {', '.join(map(str, missing))} columns")
    published = {columns: _bytes(columns) / (PUBLISHED[columns] * 1e9) for columns in PUBLISHED}
    overhead = statistics.mean(published[columns] - found[columns].seconds for columns in FITTED)
    return [Comparison(columns, found[columns], overhead) for columns in PUBLISHED]


def _predict(kernel: dict[str, Any]) -> Prediction:
    code = Kernel(kernel["listing"], kernel["warps"], kernel["registers"], kernel["shared_memory"])
    size = ROWS * kernel["columns"] * HALF
    weights = kernel["columns"] * SINGLE
    blocks = ROWS // kernel["rows"]
    return predict(code, Work(blocks, Choice(), 0, size + weights, size, size + blocks * weights), H100)


def _bytes(columns: int) -> float:
    return float(2 * ROWS * columns * HALF + columns * SINGLE)


def page(compiled: dict[str, Any], found: list[Comparison]) -> list[str]:
    """Return the lines of the page."""
    worst = max((one for one in found if one.columns not in FITTED), key=lambda one: abs(one.error))
    lines = [
        "# The model of an SM compared with published times of a row kernel",
        "",
        f"By `python -m bench.sass_model.published_rows` at commit {origin()['commit']}, constants of version "
        f"{VERSION}: the forward pass of RMSNorm in quack (commit {compiled['commit']}, compiled by "
        f"{compiled['compiler']}) on an H100, bf16, 32,768 rows, with the figures of their article of July 2025. One "
        f"number is fitted: {found[0].overhead * 1e6:.1f} µs for a launch and the eviction of L2, which their "
        f"measurement includes, to the figures at {' and '.join(f'{columns:,}' for columns in FITTED)} columns. "
        f"Largest error of those held out: {worst.error:+.0%}.",
        "",
        "| columns | published, GB/s | predicted | error | held out | kernel alone, GB/s | bound by |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.columns:,} | {PUBLISHED[one.columns]:,} | {one.predicted:,.0f} | {one.error:+.0%} "
        f"| {'' if one.columns in FITTED else 'yes'} | {one.alone:,.0f} | {one.prediction.bound} |"
        for one in found
    ]
    return lines


if __name__ == "__main__":
    main()
