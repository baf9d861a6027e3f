"""Predict the time of the GPU kernels on an H200 from their machine code, on a machine without a GPU.

    python -m bench.sass_model.predict [KERNEL …] [--language cuda] [--cuda FILE]
    python -m bench.sass_model.predict --output bench/results/sass_model.md
    python -m bench.sass_model.predict --check

Triton's kernels are compiled. Those in CUDA C++ are read from FILE, which nvcc made: the native library, an object file
or a cubin; by default from bench/results/sass_listings.json.xz, which `--output` writes next to the page. `--check`
fails if a prediction differs from that of the page by more than 1 %, if a row is missing on either side, or if the CUDA
C++ sources are no longer those of the file. docs/KERNELS.md says what the model does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import triton

from bench.result_files import RESULTS, origin, require_clean_tree
from bench.sass_model import composed, targets
from bench.sass_model.ahead_of_time import compile_only, disassemble
from bench.sass_model.cases import HEADS, Case, Launch, launches
from bench.sass_model.constants import H200, VERSION
from bench.sass_model.cuda_cases import BLOCK, STEP, cuda_cases
from bench.sass_model.cuda_training_cases import cuda_training_cases
from bench.sass_model.kernel_time import Kernel, Prediction, Work, predict
from bench.sass_model.machine_code import Code, kept_sources_hash, nvcc_version, pack, read_cuda, sources_hash
from bench.sass_model.mixed_lengths import Batch, predict_mixed, predict_persistent
from bench.sass_model.predictions import COLUMNS, PAGE, time_of_row
from bench.sass_model.training_cases import training_launches
from bench.sass_model.workloads import workloads

KEPT = RESULTS / "sass_listings.json.xz"  # code that the page predicts, see `machine_code.py`
TOLERANCE = 0.01
_SHAPE = ("BLOCK_M", "BLOCK_N", "BLOCK", "ROWS", "CHUNK", "COLUMNS", "DEPTH", "LANES", "WIDTH")


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
    cuda: bool = False

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
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="only kernels whose name contains one of these")
    parser.add_argument("--language", choices=["triton", "cuda"], help="only kernels in this language")
    parser.add_argument("--cuda", type=Path, default=KEPT, metavar="FILE", help="file with the CUDA C++ kernels")
    parser.add_argument("--output", type=Path, help="write the table to this Markdown file instead of printing it")
    parser.add_argument("--check", action="store_true", help=f"fail if the table differs from {PAGE.name} by over 1 %%")
    arguments = parser.parse_args()
    if arguments.output:
        require_clean_tree(arguments.output)
    codes, found = _all_rows(arguments.kernels, arguments.language, arguments.cuda)
    if not found:
        parser.error(f"no kernel is called {' or '.join(arguments.kernels)}: there are {', '.join(_names())}")
    lines, nvcc = table(found), nvcc_version(arguments.cuda)
    whole = not arguments.kernels and not arguments.language
    if whole and (absent := absent_kernels(found)):
        parser.error(
            f"{arguments.cuda} has no kernel {', '.join(absent)}: pass --cuda with what nvcc built of all files"
        )
    if whole:
        times = [
            composed.Time(row.kernel, row.case, row.prediction.seconds, row.cuda, row.prediction.bound) for row in found
        ]
        lines += composed.section(times, list(workloads()), H200)
    text = "\n".join([*header(nvcc), *lines, *targets.section(lines, targets.published_errors())]) + "\n"
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
        arguments.output.with_name(KEPT.name).write_bytes(
            pack(codes, {**origin(), "nvcc": nvcc, "sources": kept_sources_hash(arguments.cuda)})
        )
    elif not arguments.check:
        print(text)
    if arguments.check:
        page = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else []
        stale = differences(lines, page, whole)
        if kept_sources_hash(arguments.cuda) != sources_hash():
            stale.append(f"csrc/cuda has changed since {KEPT.name}: pass CUDA_FILE=… with what nvcc builds of it now")
        remedy = "run `make predictions`, see docs/KERNELS.md"
        print("\n".join([*stale, remedy] if stale else [f"{PAGE.name} has the predictions of these kernels"]))
        return int(bool(stale))
    return 0


def _all_rows(kernels: list[str], language: str | None, cuda: Path) -> tuple[list[Code], list[Row]]:
    """Return the machine code of the kernels that were asked for, and their rows."""
    codes: list[Code] = []
    found: list[Row] = []
    chosen = [launch for launch in all_launches() if not kernels or any(name in launch.name for name in kernels)]
    for launch in chosen if language != "cuda" else ():
        of_launch = compiled(launch)
        codes += of_launch
        found += rows(launch, of_launch)
    if language != "triton" and (cuda != KEPT or cuda.is_file()):
        of_cuda = read_cuda(cuda)
        rows_of_cuda = list(cuda_rows([code for code in of_cuda if _is_chosen(code.kernel, kernels)]))
        used = {row.kernel for row in rows_of_cuda}
        codes += [code for code in of_cuda if code.kernel in used]
        found += rows_of_cuda
    return codes, found


def absent_kernels(found: Iterable[Row]) -> list[str]:
    """Return the CUDA C++ kernels of the cases that have no row, each once."""
    names = {row.kernel for row in found}
    expected = [case.kernel for case in (*cuda_cases(), *cuda_training_cases())]
    return [name for name in dict.fromkeys(expected) if name not in names]


def _is_chosen(kernel: str, names: list[str]) -> bool:
    """Return whether a CUDA C++ kernel has one of these names; attention's delta is a part of its backward pass."""
    return not names or any(name in kernel or ("delta" in kernel and name in "attention") for name in names)


def _names() -> list[str]:
    """Return the names of all launches, each once."""
    return list(dict.fromkeys(launch.name.partition(",")[0] for launch in all_launches()))


def all_launches() -> list[Launch]:
    """Return every launch of Triton's kernels that the table has."""
    return [*launches(), *training_launches()]


def compiled(launch: Launch) -> list[Code]:
    """Compile the kernels of a launch."""
    found: dict[str, Code] = {}

    def keep(kernel: Any, _log: str, options: dict[str, Any]) -> None:
        registers, listing = disassemble(kernel.asm["cubin"])
        name, metadata = kernel.name.removesuffix("_kernel"), kernel.metadata
        integers = {option: value for option, value in options.items() if isinstance(value, int)}
        found[name] = Code(name, listing, registers, launch.name, metadata.num_warps, metadata.shared, integers)

    with compile_only(90, keep):
        launch.run()
    return list(found.values())


def rows(launch: Launch, codes: Iterable[Code]) -> Iterator[Row]:
    """Yield the row of each case of a launch."""
    by_name = {code.kernel: code for code in codes}
    for case in launch.cases:
        code = by_name[case.kernel]
        work = case.work(code.options)
        blocks = " x ".join(str(code.options[name]) for name in _SHAPE if name in code.options)
        kernel = Kernel(code.listing, code.warps, code.registers, code.shared_memory)
        yield Row(
            case.kernel,
            case_name(launch, case),
            f"{blocks}, {code.warps} warps",
            code.registers,
            work,
            _prediction(case, work, kernel, code.options),
            case.pass_flop,
        )


def case_name(launch: Launch, case: Case) -> str:
    """Return what the table says about a case: its size, and what is special in the launch."""
    return ", ".join(filter(None, (case.size, launch.name.partition(",")[2].strip())))


def cuda_rows(codes: Iterable[Code]) -> Iterator[Row]:
    """Yield the row of each case of those CUDA C++ kernels that are given."""
    by_name = {code.kernel: code for code in codes}
    for case in (*cuda_cases(), *cuda_training_cases()):
        if (code := by_name.get(case.kernel)) is None:
            continue
        kernel = Kernel(code.listing, case.warps, code.registers, case.shared_memory)
        if case.work_of is None:
            prediction = predict(kernel, case.work, H200)
        else:
            batch = Batch(case.lengths, HEADS, BLOCK, STEP)
            prediction = predict_persistent(kernel, case.work_of, batch, case.work, H200)
        yield Row(
            case.kernel, case.case, f"{case.warps} warps", code.registers, case.work, prediction, case.pass_flop, True
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
    """Return the lines of the table; the kernels of a backward pass also get a line with their sum."""
    lines = [f"| {COLUMNS} |", "|---" * (COLUMNS.count("|") + 1) + "|"]
    for (case, pass_flop, cuda), group in groupby(found, lambda row: (row.case, row.pass_flop, row.cuda)):
        members = list(group)
        lines += ["| " + " | ".join(row.cells()) + " |" for row in members]
        if pass_flop and len(members) > 1:
            seconds = sum(row.prediction.seconds for row in members)
            flop = f"{pass_flop / seconds / 1e12:.0f}"
            name = f"{'both' if len(members) == 2 else 'all'} kernels{', CUDA C++' if cuda else ''}"
            lines.append(f"| {name} | {case} | | | | | {seconds * 1e6:.1f} | {flop} | | | |")
    return lines


def header(nvcc: str) -> list[str]:
    """Return the lines above the table."""
    made = origin()
    return [
        "# Predicted times of the GPU kernels on an H200",
        "",
        f"By `python -m bench.sass_model.predict` at commit {made['commit']}, constants of version {VERSION}, Triton "
        f"{triton.__version__}, nvcc {nvcc}; kernels with template arguments are those in CUDA C++. **Nothing "
        "here was measured**: times are computed from machine code (docs/KERNELS.md). "
        "bf16, 32,768 tokens, 12 heads of 64; only matmuls count as FLOP, and each input and output as bytes once. "
        "Cycles: of an SM, from the end of a block to that of the next. The limit is that of 989 TFLOP/s or of copies "
        "at 4.3 TB/s.",
        "",
    ]


def differences(new: list[str], page: list[str], whole: bool = False) -> list[str]:
    """Return a line for each row whose predicted time the page lacks, or has differently by more than TOLERANCE.

    Args:
        new: Lines of the table.
        page: Lines of the page.
        whole: Whether `new` has all rows, so that another one of the page is out of date.
    """
    old = {key: value for key, value in map(time_of_row, page) if key}
    present = {key for key, _ in map(time_of_row, new)}
    found = [f"{key}: only the page has this row" for key in old if whole and key not in present]
    for key, value in map(time_of_row, new):
        if not key:
            continue
        if key not in old:
            found.append(f"{key}: the page has no such row")
        elif abs(old[key] - value) > TOLERANCE * value:
            found.append(f"{key}: the page has {old[key]} µs, this is {value}")
    return found


if __name__ == "__main__":
    sys.exit(main())
