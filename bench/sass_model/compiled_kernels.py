"""Compile every Triton kernel, in every configuration of its tables, for GPUs that are not present, and find faults.

For each kernel the table has registers, shared memory, instructions and tensor core instructions. It is a fault if a
kernel spills registers, uses more shared memory than the GPU has, lacks tensor core instructions for its matmuls, has
its wgmma serialised by ptxas, or touches registers of a pending wgmma; see `ahead_of_time.py` and `sass.py`.

    python -m bench.sass_model.compiled_kernels [--architectures 80 90 100 120] [--representative | --tests]
        [--output FILE.json]
    python -m bench.sass_model.compiled_kernels --table FILE.json … [--output bench/results/compiled_kernels.md]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from bench.result_files import RESULTS, origin, require_clean_tree
from bench.sass_model.ahead_of_time import SHARED_MEMORY_KIB, Compiled, compile_cases, compile_launches_of_tests
from bertfast.kernels.attention_tiles import tile_table

FLOAT, BF16 = torch.float32, torch.bfloat16
HIDDEN = (128, 384, 768, 1024, 2048, 4096)

Cases = Iterator[tuple[str, Callable[[], None]]]


def cases(representative: bool = False) -> Cases:
    """Yield (name, function that launches the kernels) for every operation and configuration.

    Args:
        representative: Only configurations that models use most or that are hardest to compile.
    """
    yield from attention_cases(representative)
    yield from add_layer_norm_cases(representative)
    yield from bias_gelu_cases(representative)
    yield from gated_activation_cases(representative)
    yield from gelu_layer_norm_cases(representative)
    yield from pre_norm_cases(representative)
    yield from embeddings_cases(representative)
    yield from linear_cross_entropy_cases(representative)
    yield from rotary_cases(representative)


def attention_cases(representative: bool) -> Cases:
    from bertfast.kernels import attention, attention_backward  # noqa: F401

    masks = {"": (False, None), "causal": (True, None), "window": (False, 64)}
    for head_dimension, dtype, bound, dropout, mask in itertools.product(
        (32, 64, 128), (BF16, FLOAT), (32, 64, 128, 512), (False, True), masks
    ):
        if (mask and bound < 512) or (representative and not _represents(head_dimension, dtype, bound, mask)):
            continue
        qkv = torch.zeros(16, 3, 2, head_dimension, dtype=dtype)
        o, lse = qkv.new_zeros(qkv[:, 0].shape), torch.zeros(qkv.shape[2], len(qkv))
        cu_seqlens = torch.tensor([0, 16], dtype=torch.int32)
        batch = (cu_seqlens, torch.zeros(1, dtype=torch.int64), tile_table(cu_seqlens, 16, bound), bound, 0.125)
        rng = (torch.zeros((), dtype=torch.int64), 256, 26) if dropout else (None, 0, 0)

        def launch(
            qkv: Tensor = qkv,
            o: Tensor = o,
            lse: Tensor = lse,
            batch: tuple[Any, ...] = batch,
            mask: tuple[Any, ...] = masks[mask],
            rng: tuple[Any, ...] = rng,
        ) -> None:
            torch.ops.bertfast.triton_attention_forward(qkv, *batch, *mask, *rng)
            torch.ops.bertfast.triton_attention_backward(o, qkv, o, lse, *batch, *mask, *rng)

        parts = (_name(dtype), f"D = {head_dimension}", f"to {bound}", mask, "dropout" if dropout else "")
        yield ", ".join(part for part in parts if part), launch


def _represents(head_dimension: int, dtype: torch.dtype, bound: int, mask: str) -> bool:
    if dtype == FLOAT:
        return head_dimension == 128 and bound == 512 and not mask
    return bound == 512 or (head_dimension == 64 and bound == 128)


def add_layer_norm_cases(representative: bool) -> Cases:
    from bertfast.kernels import add_layer_norm  # noqa: F401, registers the operations

    for hidden, (x_dtype, dtype), dropped in itertools.product(
        (768, 4096) if representative else HIDDEN,
        ((BF16, FLOAT),) if representative else ((BF16, BF16), (BF16, FLOAT), (FLOAT, FLOAT)),
        (True,) if representative else (False, True),
    ):
        x, residual = torch.zeros(16, hidden, dtype=x_dtype), torch.zeros(16, hidden, dtype=dtype)
        vector, statistics = torch.zeros(hidden), torch.zeros(16)
        dropout = _hidden_dropout(16) if dropped else (None, None, None, 0, 0)

        dtypes = _name(dtype) if x_dtype == dtype else f"{_name(x_dtype)} and {_name(dtype)}"
        case = f"{dtypes}, H = {hidden}{', dropout' if dropped else ''}"
        # Under autocast a layer also writes a copy of the output, and gets gradients of both.
        for copies in (False, True) if x_dtype == BF16 else (False,):
            copy = x_dtype if copies and x_dtype != dtype else None  # in bf16 the copy is the output itself
            copy_gradient = x if copies else None

            def launch(
                x: Tensor = x,
                residual: Tensor = residual,
                vector: Tensor = vector,
                statistics: Tensor = statistics,
                dropout: tuple[Any, ...] = dropout,
                copy: torch.dtype | None = copy,
                copy_gradient: Tensor | None = copy_gradient,
            ) -> None:
                torch.ops.bertfast.triton_add_layer_norm_forward(
                    x, residual, vector, vector, vector, 1e-12, *dropout, copy
                )
                torch.ops.bertfast.triton_add_layer_norm_backward(
                    residual, x, residual, vector, vector, statistics, statistics, *dropout, copy_gradient
                )

            yield f"{case}, with a copy" if copies else case, launch


def bias_gelu_cases(representative: bool) -> Cases:
    from bertfast.kernels import bias_gelu, linear_gelu  # noqa: F401

    for columns, dtype, approximate in itertools.product(
        (3072,) if representative else (512, 3072, 4096), (BF16, FLOAT), ("none", "tanh")
    ):
        x, bias = torch.zeros(16, columns, dtype=dtype), torch.zeros(columns)
        weight = torch.zeros(columns, columns // 4, dtype=dtype)

        def launch(x: Tensor = x, bias: Tensor = bias, weight: Tensor = weight, approximate: str = approximate) -> None:
            torch.ops.bertfast.triton_bias_gelu_forward(x, bias, approximate)
            torch.ops.bertfast.triton_bias_gelu_backward(x, x, bias, approximate)
            torch.ops.bertfast.triton_linear_gelu_forward(x[:, : weight.shape[1]], weight, bias, approximate)

        yield f"{_name(dtype)}, {columns} columns{', tanh' if approximate == 'tanh' else ''}", launch


def gated_activation_cases(representative: bool) -> Cases:
    from bertfast.kernels import gated_activation  # noqa: F401

    for columns, dtype, activation, has_bias in itertools.product(
        (1152,) if representative else (512, 1152, 3072), (BF16, FLOAT), ("gelu", "gelu_tanh", "silu"), (False, True)
    ):
        x, d_y = torch.zeros(16, 2 * columns, dtype=dtype), torch.zeros(16, columns, dtype=dtype)
        bias = torch.zeros(2 * columns) if has_bias else None

        def launch(x: Tensor = x, d_y: Tensor = d_y, bias: Tensor | None = bias, activation: str = activation) -> None:
            torch.ops.bertfast.triton_gated_activation_forward(x, bias, activation)
            torch.ops.bertfast.triton_gated_activation_backward(d_y, x, bias, activation)

        yield f"{_name(dtype)}, {columns} columns, {activation}{', bias' if has_bias else ''}", launch


def pre_norm_cases(representative: bool) -> Cases:
    from bertfast.kernels import pre_norm  # noqa: F401

    for hidden, (x_dtype, dtype), dropped, rms in itertools.product(
        (768, 4096) if representative else HIDDEN,
        ((BF16, FLOAT),) if representative else ((BF16, BF16), (BF16, FLOAT), (FLOAT, FLOAT)),
        (True,) if representative else (False, True),
        (False, True),
    ):
        x, residual = torch.zeros(16, hidden, dtype=x_dtype), torch.zeros(16, hidden, dtype=dtype)
        vector, statistics = torch.zeros(hidden), torch.zeros(16)
        dropout = _hidden_dropout(16) if dropped else (None, None, None, 0, 0)

        def launch(
            x: Tensor = x,
            residual: Tensor = residual,
            vector: Tensor = vector,
            statistics: Tensor = statistics,
            dropout: tuple[Any, ...] = dropout,
            rms: bool = rms,
        ) -> None:
            bias = None if rms else vector  # the models with RMSNorm have no biases
            torch.ops.bertfast.triton_pre_norm_forward(residual, x, bias, vector, bias, 1e-12, rms, x.dtype, *dropout)
            torch.ops.bertfast.triton_pre_norm_backward(
                residual, residual, x, vector, statistics, statistics, rms, not rms, x.dtype, *dropout
            )

        dtypes = _name(dtype) if x_dtype == dtype else f"{_name(x_dtype)} and {_name(dtype)}"
        yield f"{dtypes}, H = {hidden}{', rms' if rms else ''}{', dropout' if dropped else ''}", launch


def gelu_layer_norm_cases(representative: bool) -> Cases:
    from bertfast.kernels import gelu_layer_norm  # noqa: F401

    for hidden, dtype in itertools.product((768, 4096) if representative else HIDDEN, (BF16, FLOAT)):
        x, vector, statistics = torch.zeros(16, hidden, dtype=dtype), torch.zeros(hidden), torch.zeros(16)

        def launch(x: Tensor = x, vector: Tensor = vector, statistics: Tensor = statistics) -> None:
            torch.ops.bertfast.triton_gelu_layer_norm_forward(x, vector, vector, vector, 1e-12)
            torch.ops.bertfast.triton_gelu_layer_norm_backward(x, x, vector, vector, statistics, statistics)

        yield f"{_name(dtype)}, H = {hidden}", launch


def embeddings_cases(representative: bool) -> Cases:
    from bertfast.kernels import embeddings  # noqa: F401

    for hidden, dtype, dropped in itertools.product(
        (768, 4096) if representative else HIDDEN,
        (FLOAT,) if representative else (BF16, FLOAT),
        (True,) if representative else (False, True),
    ):
        table, vector = torch.zeros(64, hidden, dtype=dtype), torch.zeros(hidden)
        ids, statistics = torch.zeros(64, dtype=torch.int64), torch.zeros(64)
        dropout = _hidden_dropout(64) if dropped else (None, None, None, 0, 0)

        def launch(
            table: Tensor = table,
            vector: Tensor = vector,
            ids: Tensor = ids,
            statistics: Tensor = statistics,
            dropout: tuple[Any, ...] = dropout,
        ) -> None:
            inputs = (table, table, table[:2], ids, ids, ids, vector)
            torch.ops.bertfast.triton_embeddings_forward(*inputs, vector, 1e-12, *dropout)
            torch.ops.bertfast.triton_embeddings_backward(table, *inputs, statistics, statistics, 0, *dropout)

        yield f"{_name(dtype)}, H = {hidden}{', dropout' if dropped else ''}", launch


def linear_cross_entropy_cases(representative: bool) -> Cases:
    from bertfast.kernels import linear_cross_entropy  # noqa: F401

    for vocabulary, dtype in itertools.product((30522,) if representative else (1000, 30522, 250_000), (BF16, FLOAT)):
        hidden, weight = torch.zeros(16, 8, dtype=dtype), torch.zeros(vocabulary, 8, dtype=dtype)
        rows = torch.zeros(16, dtype=torch.int64)

        def launch(
            hidden: Tensor = hidden, weight: Tensor = weight, rows: Tensor = rows, dtype: torch.dtype = dtype
        ) -> None:
            bias, needs_grad = weight[:, 0].contiguous(), [True, True, True]
            torch.ops.bertfast.triton_linear_cross_entropy_forward(hidden, rows, weight, bias, rows, needs_grad, dtype)

        yield f"{_name(dtype)}, V = {vocabulary:,}", launch


def rotary_cases(representative: bool) -> Cases:
    from bertfast.kernels import rotary  # noqa: F401

    for dimension, dtype in itertools.product((64,) if representative else (32, 64, 80, 128), (BF16, FLOAT)):
        qkv, table = torch.zeros(16, 3, 12, dimension, dtype=dtype), torch.zeros(16, dimension)

        def launch(qkv: Tensor = qkv, table: Tensor = table) -> None:
            torch.ops.bertfast.triton_rotary_forward(qkv, table)
            torch.ops.bertfast.triton_rotary_backward(qkv, table)

        yield f"{_name(dtype)}, D = {dimension}", launch


def _hidden_dropout(tokens: int) -> tuple[Any, ...]:
    identity = torch.zeros(tokens, dtype=torch.int64)
    return torch.zeros((), dtype=torch.int64), identity, identity, 256, 26


def _name(dtype: torch.dtype) -> str:
    return {FLOAT: "fp32", BF16: "bf16", torch.float16: "fp16"}[dtype]


def compile_part(architecture: int, part: int, parts: int, which: str) -> list[Compiled]:
    """Compile every `parts`-th case from `part` on; `which` is "all", "representative" or "tests"."""
    if which == "tests":
        return compile_launches_of_tests(architecture, part, parts)
    return compile_cases(architecture, islice(cases(which == "representative"), part, None, parts))


def main() -> None:
    arguments = parse_arguments()
    if arguments.table:
        output = arguments.output or RESULTS / "compiled_kernels.md"
        require_clean_tree(output)
        rows = [Compiled(**row) for path in arguments.table for row in json.loads(path.read_text())]
        output.write_text(table(rows) + "\n", encoding="utf-8")
        return
    parts = os.cpu_count() or 1
    jobs = [(arch, part, parts, arguments.which) for arch in arguments.architectures for part in range(parts)]
    with ProcessPoolExecutor(parts) as pool:
        results = [row for rows in pool.map(compile_part, *zip(*jobs, strict=True)) for row in rows]
    if arguments.output:
        arguments.output.write_text(json.dumps([asdict(row) for row in results], indent=1))
    faults = [(row, fault) for row in results for fault in row.faults()]
    for row, fault in faults:
        print(f"sm_{row.architecture}, {row.kernel}, {row.case} ({row.shape}, {row.warps} warps): {fault}")
    print(f"Triton {triton.__version__}: {len(results)} kernels compiled, {len(faults)} faults")
    sys.exit(bool(faults))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--architectures",
        type=int,
        nargs="+",
        default=list(SHARED_MEMORY_KIB),
        choices=SHARED_MEMORY_KIB,
        help="GPU architectures to compile for, 90 for sm_90 (default: all)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--representative",
        action="store_const",
        dest="which",
        const="representative",
        default="all",
        help="compile only configurations that models use most or that are hardest to compile",
    )
    which.add_argument(
        "--tests",
        action="store_const",
        dest="which",
        const="tests",
        help="compile what the tests of the kernels launch",
    )
    parser.add_argument("--output", type=Path, help="file for the compiled kernels (JSON), or for the table (Markdown)")
    parser.add_argument(
        "--table", type=Path, nargs="+", metavar="FILE.json", help="write a table of such files instead"
    )
    return parser.parse_args()


def table(rows: list[Compiled]) -> str:
    """Return a Markdown table: a row per kernel and configuration, a column per architecture and version of Triton."""
    columns = sorted({(row.architecture, row.triton) for row in rows})
    found: dict[tuple[str, str], dict[tuple[int, str], Compiled]] = {}
    for row in rows:
        found.setdefault((row.kernel, row.case), {})[row.architecture, row.triton] = row
    faults = sum(len(row.faults()) for row in rows)
    lines = [
        "# Every Triton kernel, compiled ahead of time",
        "",
        f"By `make compiled-tables` at commit {origin()['commit']}, on a machine without a GPU. An entry: registers "
        "per thread / KiB of shared memory / instructions / tensor core instructions (block, warps); empty if another "
        "case has the same code. Kernels that spill registers, use more shared memory than the GPU has, lack tensor "
        f"core instructions, have wgmma serialised or touch registers of a pending wgmma: {faults} of {len(rows)}.",
        "",
        "| kernel | case | " + " | ".join(f"sm_{arch}, {version}" for arch, version in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for (kernel, case), entries in sorted(found.items()):
        cells = [_cell(entries.get(column)) for column in columns]
        lines.append(f"| {kernel} | {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Compiled | None) -> str:
    if row is None:  # another case has the same code
        return ""
    numbers = f"{row.registers} / {row.shared_memory / 1024:.0f} / {row.instructions}"
    matmuls = f" / {row.tensor_core_instructions} {row.tensor_core}" if row.tensor_core else ""
    return f"{numbers}{matmuls} ({row.shape}, {row.warps} warps)"


if __name__ == "__main__":
    main()
