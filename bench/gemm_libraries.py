"""Time fp32 GEMMs of PyTorch's two libraries on a CPU, for the table of CPUs in `bertfast/ops/matmul.py`.

    python -m bench.gemm_libraries [--repeats N] [--results FOLDER]

The GEMMs are those of a layer of BERT-base and of MiniLM, forward and backward, on TOKENS tokens. MKL is what
`torch.mm` calls; oneDNN computes sums of more than 768 terms in pieces, as bertfast calls it. Both run alternately,
after their results have been compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.arguments import at_least_one, result_parser
from bench.bounds import with_backward
from bench.ceilings import layer_gemms
from bench.end_to_end.inference import config_of
from bench.harness import seconds_of, side_by_side
from bench.result_files import require_clean_tree, write_result
from bertfast.ops import matmul

MODELS = ("base", "minilm")
TOKENS = (64, 832, 2048)
TOLERANCE = 1e-5  # relative difference of the results


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("--repeats", type=at_least_one, default=5, help="rounds of which the best is taken")
    arguments = parser.parse_args()
    require_clean_tree(arguments.results)
    shapes = [(m, k, n) for name in MODELS for tokens in TOKENS for m, k, n in layer_gemms(config_of(name), tokens)]
    found = [measure(shape, arguments.repeats) for shape in dict.fromkeys(with_backward(shapes))]
    print("| GEMM | MKL, GFLOP/s | oneDNN, GFLOP/s | ratio |\n|---|---|---|---|")
    for each in found:
        shape, mkl, onednn = " x ".join(map(str, each["shape"])), each["mkl_gflops"], each["onednn_gflops"]
        print(f"| {shape} | {mkl:.0f} | {onednn:.0f} | {onednn / mkl:.2f} |")
    result = {"gemms": found, "deepest_sum_by_onednn": matmul.onednn_depth()}
    print(f"written to {write_result('gemm_libraries', result, arguments.results)}")


def measure(shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Return the GFLOP/s of the GEMM [m, k] x [k, n] with each library, the best of `repeats`."""
    m, k, n = shape
    a, b = torch.randn(m, k), torch.randn(n, k)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "mkl": partial(torch.mm, a, b.mT),
        "onednn": partial(matmul.onednn_gemm, a, b),
    }
    one, other = (call() for call in calls.values())
    difference = ((one - other).norm() / one.norm()).item()
    if not difference <= TOLERANCE:
        raise SystemExit(f"{m} x {k} x {n}: the results differ by {difference:.2g}, so nothing is timed")
    calls_per_sample = max(1, 10**9 // (m * k * n))

    def run(call: Callable[[], torch.Tensor]) -> None:
        for _ in range(calls_per_sample):
            call()

    timed = side_by_side({name: partial(run, call) for name, call in calls.items()}, repeats)
    gflop = 2e-9 * m * k * n * calls_per_sample
    return {"shape": shape, **{f"{name}_gflops": gflop / min(seconds_of(samples)) for name, samples in timed.items()}}


if __name__ == "__main__":
    main()
