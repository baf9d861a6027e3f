"""Compile every Triton kernel, in every configuration of its tables, for chips that are not here.

Launchers run on CPU tensors with a driver that compiles for the chip and launches nothing, so what is compiled is what
would run: the same tile shapes, specialised alike. Of each kernel the table has registers, spills, shared memory and
matrix instructions; one that spills, takes more shared memory than the chip has, or lacks matrix instructions where it
multiplies, is an error.

    python bench/compiled_kernels.py [--chips 80 90 100 120] [--output FILE.json]
    python bench/compiled_kernels.py --table FILE.json … > bench/results/compiled_kernels.md
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from bertfast.kernels import device
from bertfast.kernels import results as returned

sys.path.insert(0, str(Path(__file__).parent))
from harness import origin

CHIPS = {80: 163, 90: 227, 100: 227, 120: 99}  # sm: KiB of shared memory that a program may take
FLOAT, BRAIN = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration for one chip."""

    triton: str
    chip: int
    kernel: str
    case: str
    shape: str
    warps: int
    registers: int
    spills: int
    shared_memory: int
    instructions: int
    matrix_unit: str  # the instruction, "" if there is none
    matrix_instructions: int

    def faults(self) -> list[str]:
        """What is wrong with it, in words."""
        found = []
        if self.spills:
            found.append(f"{self.spills} instructions spill registers")
        multiplies = self.kernel.startswith(("attention", "linear_gelu"))
        # A warpgroup of Hopper multiplies 64 rows at a time; smaller tiles take the older instruction.
        wide = self.chip == 90 and self.case.startswith("bf16") and int(self.shape.split(" ")[0]) >= 64
        if multiplies and (not self.matrix_unit or (wide and self.matrix_unit != "HGMMA")):
            found.append(f"its products run on {self.matrix_unit or 'no matrix unit'}")
        if self.shared_memory > CHIPS[self.chip] << 10:
            found.append(f"{self.shared_memory} bytes of shared memory are more than the chip's {CHIPS[self.chip]} KiB")
        return found


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, what launches it) of every operation and configuration."""
    yield from attention_cases()
    yield from add_layer_norm_cases()
    yield from bias_gelu_cases()
    yield from gelu_layer_norm_cases()
    yield from embed_cases()
    yield from linear_cross_entropy_cases()


def attention_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    from bertfast.kernels import attention, attention_backward  # noqa: F401

    masks = {"": (False, None), "causal": (True, None), "window": (False, 64)}
    for head_dimension, dtype, longest, dropped, mask in product(
        (32, 64, 128), (BRAIN, FLOAT), (32, 64, 128, 512), (False, True), masks
    ):
        if mask and (dropped or longest < 512 or head_dimension != 64):
            continue
        qkv = torch.zeros(16, 3, 2, head_dimension, dtype=dtype)
        o, lse = returned.attention_forward(qkv)
        layout = (torch.tensor([0, 16], dtype=torch.int32), torch.zeros(1, dtype=torch.int64), longest, 0.125)
        dropout = (torch.zeros((), dtype=torch.int64), 256, 26) if dropped else (None, 0, 0)

        def launch(qkv=qkv, o=o, lse=lse, layout=layout, mask=masks[mask], dropout=dropout) -> None:
            torch.ops.bertfast.triton_attention_forward(qkv, *layout, *mask, *dropout)
            torch.ops.bertfast.triton_attention_backward(o, qkv, o, lse, *layout, *mask, *dropout)

        words = (_name(dtype), f"D = {head_dimension}", f"to {longest}", mask, "dropout" if dropped else "")
        yield ", ".join(word for word in words if word), launch


def add_layer_norm_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    from bertfast.kernels import add_layer_norm  # noqa: F401, registers the operations

    for hidden, (x_dtype, dtype), dropped in product(
        (128, 384, 768, 1024, 2048, 4096), ((BRAIN, BRAIN), (BRAIN, FLOAT), (FLOAT, FLOAT)), (False, True)
    ):
        x, residual = torch.zeros(16, hidden, dtype=x_dtype), torch.zeros(16, hidden, dtype=dtype)
        vector, statistics = torch.zeros(hidden), torch.zeros(16)
        dropout = _hidden_dropout(16) if dropped else (None, None, None, 0, 0)

        def launch(x=x, residual=residual, vector=vector, statistics=statistics, dropout=dropout) -> None:
            torch.ops.bertfast.triton_add_layer_norm_forward(x, residual, vector, vector, vector, 1e-12, *dropout)
            torch.ops.bertfast.triton_add_layer_norm_backward(
                residual, x, residual, vector, vector, statistics, statistics, *dropout
            )

        # What a layer runs under autocast: the output with its copy, and the gradients of both.
        def launch_pair(x=x, residual=residual, vector=vector, statistics=statistics, dropout=dropout) -> None:
            copy = None if x.dtype == residual.dtype else x.dtype  # without a stream in fp32 it is the output itself
            torch.ops.bertfast.triton_add_layer_norm_forward(x, residual, vector, vector, vector, 1e-12, *dropout, copy)
            torch.ops.bertfast.triton_add_layer_norm_backward(
                residual, x, residual, vector, vector, statistics, statistics, *dropout, x
            )

        dtypes = _name(dtype) if x_dtype == dtype else f"{_name(x_dtype)} and {_name(dtype)}"
        case = f"{dtypes}, H = {hidden}{', dropout' if dropped else ''}"
        yield case, launch
        if x_dtype == BRAIN:
            yield f"{case}, with a copy", launch_pair


def bias_gelu_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    from bertfast.kernels import bias_gelu, linear_gelu  # noqa: F401

    for columns, dtype, approximate in product((512, 3072, 4096), (BRAIN, FLOAT), ("none", "tanh")):
        x, bias = torch.zeros(16, columns, dtype=dtype), torch.zeros(columns)
        weight = torch.zeros(columns, columns // 4, dtype=dtype)

        def launch(x=x, bias=bias, weight=weight, approximate=approximate) -> None:
            torch.ops.bertfast.triton_bias_gelu_forward(x, bias, approximate)
            torch.ops.bertfast.triton_bias_gelu_backward(x, x, bias, approximate)
            torch.ops.bertfast.triton_linear_gelu_forward(x[:, : weight.shape[1]], weight, bias, approximate)

        yield f"{_name(dtype)}, {columns} columns{', tanh' if approximate == 'tanh' else ''}", launch


def gelu_layer_norm_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    from bertfast.kernels import gelu_layer_norm  # noqa: F401

    for hidden, dtype in product((128, 384, 768, 1024, 2048, 4096), (BRAIN, FLOAT)):
        x, vector, statistics = torch.zeros(16, hidden, dtype=dtype), torch.zeros(hidden), torch.zeros(16)

        def launch(x=x, vector=vector, statistics=statistics) -> None:
            torch.ops.bertfast.triton_gelu_layer_norm_forward(x, vector, vector, vector, 1e-12)
            torch.ops.bertfast.triton_gelu_layer_norm_backward(x, x, vector, vector, statistics, statistics)

        yield f"{_name(dtype)}, H = {hidden}", launch


def embed_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    from bertfast.kernels import embed  # noqa: F401

    for hidden, dtype, dropped in product((128, 384, 768, 1024, 2048, 4096), (BRAIN, FLOAT), (False, True)):
        table, vector = torch.zeros(64, hidden, dtype=dtype), torch.zeros(hidden)
        ids, statistics = torch.zeros(64, dtype=torch.int64), torch.zeros(64)
        dropout = _hidden_dropout(64) if dropped else (None, None, None, 0, 0)

        def launch(table=table, vector=vector, ids=ids, statistics=statistics, dropout=dropout) -> None:
            inputs = (table, table, table[:2], ids, ids, ids, vector)
            torch.ops.bertfast.triton_embed_forward(*inputs, vector, 1e-12, *dropout)
            torch.ops.bertfast.triton_embed_backward(table, *inputs, statistics, statistics, 0, *dropout)

        yield f"{_name(dtype)}, H = {hidden}{', dropout' if dropped else ''}", launch


def linear_cross_entropy_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    from bertfast.kernels import linear_cross_entropy  # noqa: F401

    for vocabulary, dtype in product((1000, 30522, 250_000), (BRAIN, FLOAT)):
        hidden, weight = torch.zeros(16, 8, dtype=dtype), torch.zeros(vocabulary, 8, dtype=dtype)
        rows = torch.zeros(16, dtype=torch.int64)

        def launch(hidden=hidden, weight=weight, rows=rows, dtype=dtype) -> None:
            bias, wanted = weight[:, 0].contiguous(), [True, True, True]
            torch.ops.bertfast.triton_linear_cross_entropy_forward(hidden, rows, weight, bias, rows, wanted, dtype)

        yield f"{_name(dtype)}, V = {vocabulary:,}", launch


def _hidden_dropout(tokens: int) -> tuple:
    identity = torch.zeros(tokens, dtype=torch.int64)
    return torch.zeros((), dtype=torch.int64), identity, identity, 256, 26


def _name(dtype: torch.dtype) -> str:
    return {FLOAT: "fp32", BRAIN: "bf16", torch.float16: "fp16"}[dtype]


class _Absent:
    """A driver for a chip that is not here: enough for the compiler."""

    def __init__(self, chip: int):
        self.chip = chip

    def get_current_device(self) -> int:
        return self.chip  # a cache of its own for each

    def get_current_stream(self, _device) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.chip, 32)


def compile_part(chip: int, part: int, parts: int) -> list[Compiled]:
    """Every `parts`-th case from `part` on, compiled for a chip."""
    driver.set_active(_Absent(chip))
    device.capability = lambda _device: divmod(chip, 10)
    run = JITFunction.run
    results, seen = [], set()

    def compile_only(self, *arguments, grid, warmup, **options):
        compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            results.append(_report(compiled, chip, case, options))
        return compiled

    JITFunction.run = compile_only
    try:
        for number, (name, launch) in enumerate(cases()):
            if number % parts == part:
                case = name
                launch()
    finally:
        JITFunction.run = run
    return results


def _report(compiled, chip: int, case: str, options: dict) -> Compiled:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code)
    counts = Counter(instructions)
    matrix = Counter({name: count for name, count in counts.items() if "MMA" in name}).most_common(1)
    unit, products = matrix[0] if matrix else ("", 0)
    blocks = [
        str(options[name])
        for name in ("BLOCK", "BLOCK_M", "BLOCK_N", "ROWS", "CHUNK", "COLUMNS", "DEPTH", "LANES", "WIDTH")
        if name in options
    ]
    return Compiled(
        triton=triton.__version__,
        chip=chip,
        kernel=compiled.name.removesuffix("_kernel"),
        case=case,
        shape=" x ".join(blocks),
        warps=compiled.metadata.num_warps,
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spills=counts["LDL"] + counts["STL"],
        shared_memory=compiled.metadata.shared,
        instructions=len(instructions),
        matrix_unit=unit,
        matrix_instructions=products,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=int, nargs="+", default=list(CHIPS), choices=CHIPS)
    parser.add_argument("--output", type=Path, help="write what was compiled, as JSON")
    parser.add_argument("--table", type=Path, nargs="+", help="print a table of such files instead")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([Compiled(**row) for path in arguments.table for row in json.loads(path.read_text())]))
        return
    parts = os.cpu_count() or 1
    jobs = [(chip, part, parts) for chip in arguments.chips for part in range(parts)]
    with ProcessPoolExecutor(parts) as pool:
        results = [row for rows in pool.map(compile_part, *zip(*jobs, strict=True)) for row in rows]
    if arguments.output:
        arguments.output.write_text(json.dumps([asdict(row) for row in results], indent=1))
    wrong = [(row, fault) for row in results for fault in row.faults()]
    for row, fault in wrong:
        print(f"sm_{row.chip}, {row.kernel}, {row.case} ({row.shape}, {row.warps} warps): {fault}")
    print(f"Triton {triton.__version__}: {len(results)} kernels compiled, {len(wrong)} faults")
    sys.exit(bool(wrong))


def table(rows: list[Compiled]) -> str:
    """Markdown: a row a kernel and configuration, a column a chip and version of Triton."""
    columns = sorted({(row.chip, row.triton) for row in rows})
    found: dict[tuple[str, str], dict[tuple[int, str], Compiled]] = {}
    for row in rows:
        found.setdefault((row.kernel, row.case), {})[row.chip, row.triton] = row
    faults = sum(len(row.faults()) for row in rows)
    lines = [
        "# Every Triton kernel, compiled ahead of time",
        "",
        f"By `make test-all` at commit {origin()['commit']}, on a machine without a GPU. An entry: "
        "registers / KiB of shared memory / instructions / "
        "matrix instructions (tile, warps); empty where the code is another case's too. Kernels that spill a register, "
        "take more shared memory than their chip has, or lack the matrix instructions they should have: "
        f"{faults} of {len(rows)}.",
        "",
        "| kernel | case | " + " | ".join(f"sm_{chip}, {version}" for chip, version in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for (kernel, case), entries in sorted(found.items()):
        cells = [_cell(entries.get(column)) for column in columns]
        lines.append(f"| {kernel} | {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Compiled | None) -> str:
    if row is None:  # the same code as another case's
        return ""
    numbers = f"{row.registers} / {row.shared_memory / 1024:.0f} / {row.instructions}"
    products = f" / {row.matrix_instructions} {row.matrix_unit}" if row.matrix_unit else ""
    return f"{numbers}{products} ({row.shape}, {row.warps} warps)"


if __name__ == "__main__":
    main()
