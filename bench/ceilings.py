"""Measure what bounds every kernel on this machine: GEMM throughput and memory bandwidth.

python -m bench.ceilings [--results FOLDER]
"""

from __future__ import annotations

import ctypes
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from bench.arguments import result_parser
from bench.harness import DEVICE, ON_GPU, side_by_side, stopwatch
from bench.result_files import ROOT, require_clean_tree, write_result
from bertfast.ops import native
from bertfast.ops.matmul import linear
from bertfast.ops.packed_linear import pack, packed_linear

if TYPE_CHECKING:
    from transformers import BertConfig

BLOCKS_PER_CALL = 40


def gemm_throughput(shapes: list[tuple[int, int, int]], dtype: torch.dtype, repeats: int = 3) -> float:
    """Return the FLOP/s of the GEMMs [m, k] × [k, n] of `shapes`, one after another, the best of `repeats`."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=DEVICE)

    operands = {(m, k, n): (random(m, k), random(n, k)) for m, k, n in set(shapes)}
    flops = sum(2 * m * k * n for m, k, n in shapes)

    def run() -> None:
        for shape in shapes:
            linear(*operands[shape])

    return flops / min(side_by_side({"gemm": run}, repeats)["gemm"]).seconds


def inference_gemm_throughput(shapes: list[tuple[int, int, int]], dtype: torch.dtype, repeats: int = 3) -> float:
    """Return the FLOP/s of the GEMMs of `shapes`, by the faster of PyTorch's and bertfast's packed kernels."""
    found = gemm_throughput(shapes, dtype, repeats)
    if ON_GPU or native.UNAVAILABLE_REASON is not None:
        return found
    operands = {(m, k, n): (torch.randn(m, k, dtype=dtype), pack(torch.randn(n, k), dtype=dtype)) for m, k, n in shapes}

    def run() -> None:
        for shape in shapes:
            packed_linear(*operands[shape])

    flops = sum(2 * m * k * n for m, k, n in shapes)
    return max(found, flops / min(side_by_side({"packed": run}, repeats)["packed"]).seconds)


def int8_gemm_throughput(shapes: list[tuple[int, int, int]], repeats: int = 3) -> float | None:
    """Return the operations/s of the GEMMs of `shapes` in int8 with sums in int32, None if PyTorch has none here."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=DEVICE)

    operands = {(m, k, n): (random(m, k), random(n, k).t()) for m, k, n in set(shapes)}
    operations = sum(2 * m * k * n for m, k, n in shapes)

    def run() -> None:
        for shape in shapes:
            torch._int_mm(*operands[shape])

    try:
        return operations / min(side_by_side({"gemm": run}, repeats)["gemm"]).seconds
    except RuntimeError:
        return None


def layer_gemms(config: BertConfig, tokens: int) -> list[tuple[int, int, int]]:
    """Return the shapes (m, k, n) of the GEMMs of one layer in the forward pass, of any family."""
    from bertfast.models.families import architecture_of, config_entry  # takes seconds, which `gpu_check` limits

    hidden, wide = config.hidden_size, config_entry(config, "intermediate_size")
    inner = (2 if architecture_of(config).gated else 1) * wide
    return [(tokens, hidden, 3 * hidden), (tokens, hidden, hidden), (tokens, hidden, inner), (tokens, wide, hidden)]


@cache
def block_throughput(dtype: torch.dtype, repeats: int = 300) -> float | None:
    """Return the FLOP/s of all threads if each multiplied blocks of 64³ in its cache as fast as one core does alone.

    Returns:
        None if no compiler can build `block_matmul.cpp`.
    """
    source = ROOT / "bench" / "block_matmul.cpp"
    flags = ["-shared", "-fPIC", "-std=c++20", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno"]
    with TemporaryDirectory() as folder:
        target = str(Path(folder, "block_matmul.so"))
        try:
            subprocess.run(["c++", *flags, str(source), "-o", target], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        multiply = ctypes.CDLL(target).multiply_blocks
    best = min(stopwatch(lambda: multiply(dtype == torch.bfloat16, BLOCKS_PER_CALL)) for _ in range(repeats))
    return torch.get_num_threads() * BLOCKS_PER_CALL * 2 * 64**3 / best


def copy_bandwidth(bytes_to_copy: int, repeats: int = 10) -> float:
    """Return the bytes/s of a copy within the device's memory, reads and writes both counted, the best of `repeats`."""
    source = torch.randn(bytes_to_copy // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * bytes_to_copy / min(side_by_side({"copy": lambda: target.copy_(source)}, repeats)["copy"]).seconds


def ceilings() -> dict[str, float]:
    """Measure now and return {"flops": FLOP/s of bf16 GEMMs, "bytes": bytes/s to and from memory}."""
    size, copied = (8192, 2 << 30) if ON_GPU else (256, 32 << 20)
    return {"flops": gemm_throughput([(size,) * 3] * 4, torch.bfloat16, 10), "bytes": copy_bandwidth(copied)}


def main() -> None:
    results = result_parser(__doc__).parse_args().results
    require_clean_tree(results)
    measured = ceilings()
    write_result("ceilings", {"ceilings": measured}, results)
    print(f"bf16 GEMMs {measured['flops'] / 1e12:.3g} TFLOP/s, copies {measured['bytes'] / 1e12:.3g} TB/s")


if __name__ == "__main__":
    main()
