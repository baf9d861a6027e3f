"""Predict the time of the Triton kernels on an H200 from their machine code, on a machine without a GPU.

    python -m bench.sass_model.predict [KERNEL …] [--output bench/results/sass_model.md] [--check]

`--check` compares the table with bench/results/sass_model.md and fails if a prediction differs by more than 1 %, so
that the page is renewed with the kernels and constants. docs/KERNELS.md says what the model does.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from bench.harness import RESULTS, origin, require_clean_tree
from bench.sass_model.ahead_of_time import compile_only, disassemble
from bench.sass_model.cases import HEADS, Case, Launch, launches
from bench.sass_model.constants import H200, VERSION
from bench.sass_model.kernel_time import Kernel, Prediction, Work, predict
from bench.sass_model.mixed_lengths import Batch, predict_mixed

PAGE = RESULTS / "sass_model.md"
TOLERANCE = 0.01
_SHAPE = ("BLOCK_M", "BLOCK_N", "BLOCK", "ROWS", "CHUNK")
_COLUMNS = "kernel | case | block | registers | per SM | cycles | µs | TFLOP/s | GB/s | of the limit | bound by"


@dataclass(frozen=True)
class Row:
    """A line of the table: a kernel in a case, and what it does in how many seconds."""

    kernel: str
    case: str
    shape: str
    registers: int | None
    work: Work
    prediction: Prediction
    pass_flop: float | None

    def cells(self) -> list[str]:
        """Return the cells of the line."""
        predicted, work = self.prediction, self.work
        registers = "" if self.registers is None else str(self.registers)
        moved = (work.reads + work.writes) / predicted.seconds / 1e9
        return [
            self.kernel,
            self.case,
            self.shape,
            registers,
            str(predicted.resident),
            f"{predicted.block_cycles:,.0f}",
            f"{predicted.seconds * 1e6:.1f}",
            f"{work.flop / predicted.seconds / 1e12:.0f}" if work.flop else "",
            f"{moved:,.0f}",
            f"{predicted.limit / predicted.seconds:.0%}",
            predicted.bound,
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="only launches whose name contains one of these")
    parser.add_argument("--output", type=Path, help="write the table to this Markdown file instead of printing it")
    parser.add_argument("--check", action="store_true", help=f"fail if the table differs from {PAGE.name} by over 1 %%")
    arguments = parser.parse_args()
    if arguments.output:
        require_clean_tree(arguments.output)
    chosen = [
        launch for launch in launches() if not arguments.kernels or any(k in launch.name for k in arguments.kernels)
    ]
    if not chosen:
        names = ", ".join(dict.fromkeys(launch.name.partition(",")[0] for launch in launches()))
        parser.error(f"no launch is called {' or '.join(arguments.kernels)}: there are {names}")
    lines = table([row for launch in chosen for row in rows(launch)])
    text = "\n".join([*header(), *lines]) + "\n"
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    elif not arguments.check:
        print(text)
    if arguments.check:
        stale = differences(lines, PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else [])
        remedy = "run `python -m bench.sass_model.predict --output bench/results/sass_model.md`"
        print("\n".join([*stale, remedy] if stale else [f"{PAGE.name} has the predictions of these kernels"]))
        return int(bool(stale))
    return 0


def rows(launch: Launch) -> Iterator[Row]:
    """Compile the kernels of a launch, and yield the row of each of its cases."""
    compiled: dict[str, tuple[Kernel, dict[str, Any]]] = {}

    def keep(kernel: Any, _log: str, options: dict[str, Any]) -> None:
        registers, listing = disassemble(kernel.asm["cubin"])
        code = Kernel(listing, kernel.metadata.num_warps, registers, kernel.metadata.shared)
        compiled[kernel.name.removesuffix("_kernel")] = code, options

    with compile_only(90, keep):
        launch.run()
    suffix = launch.name.partition(",")[2].strip()
    for case in launch.cases:
        kernel, options = compiled[case.kernel]
        work = case.work(options)
        blocks = " x ".join(str(options[name]) for name in _SHAPE if name in options)
        yield Row(
            case.kernel,
            ", ".join(filter(None, (case.size, suffix))),
            f"{blocks}, {kernel.warps} warps",
            kernel.registers,
            work,
            _prediction(case, work, kernel, options),
            case.pass_flop,
        )


def _prediction(case: Case, work: Work, kernel: Kernel, options: dict[str, Any]) -> Prediction:
    if case.work_of is None:
        return predict(kernel, work, H200)
    work_of = case.work_of
    rows, step = options["BLOCK_M"], options["BLOCK_N"]
    if case.kernel == "attention_d_kv":  # its blocks are of keys, and it iterates over queries
        rows, step = step, rows
    batch = Batch(case.lengths, HEADS, rows, step)
    return predict_mixed(kernel, lambda length: work_of(length)(options), batch, work, H200)


def table(found: list[Row]) -> list[str]:
    """Return the lines of the table; the two kernels of a backward pass also get a line with their sum."""
    lines = [f"| {_COLUMNS} |", "|---" * (_COLUMNS.count("|") + 1) + "|"]
    for index, row in enumerate(found):
        lines.append("| " + " | ".join(row.cells()) + " |")
        before = found[index - 1] if index else None
        if before and row.pass_flop and row.case == before.case and before.pass_flop == row.pass_flop:
            seconds = before.prediction.seconds + row.prediction.seconds
            flop = f"{row.pass_flop / seconds / 1e12:.0f}"
            lines.append(f"| both kernels | {row.case} | | | | | {seconds * 1e6:.1f} | {flop} | | | |")
    return lines


def header() -> list[str]:
    """Return the lines above the table."""
    made = origin()
    return [
        "# Predicted times of the Triton kernels on an H200",
        "",
        f"By `python -m bench.sass_model.predict` at commit {made['commit']}, constants of version {VERSION}, Triton "
        f"{triton.__version__}. **Nothing here was measured**: times are computed from machine code (docs/KERNELS.md). "
        "bf16, 32,768 tokens, 12 heads of 64; only attention's matmuls count as FLOP, and each input and output as "
        "bytes once. Cycles: of an SM, from the end of a block to that of the next. The limit is that of 989 TFLOP/s "
        "or of copies at 4.3 TB/s.",
        "",
    ]


def differences(new: list[str], page: list[str]) -> list[str]:
    """Return a line for each row whose predicted time the page lacks, or has differently by more than TOLERANCE."""
    old = {key: value for key, value in map(_time, page) if key}
    found = []
    for key, value in map(_time, new):
        if not key:
            continue
        if key not in old:
            found.append(f"{key}: the page has no such row")
        elif abs(old[key] - value) > TOLERANCE * value:
            found.append(f"{key}: the page has {old[key]} µs, this is {value}")
    return found


def _time(line: str) -> tuple[str, float]:
    """Return kernel and case of a row, and its time in µs; an empty name for other lines."""
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    if len(cells) != _COLUMNS.count("|") + 1 or not re.fullmatch(r"[\d.]+", cells[6]):
        return "", 0.0
    return f"{cells[0]}, {cells[1]}", float(cells[6])


if __name__ == "__main__":
    sys.exit(main())
