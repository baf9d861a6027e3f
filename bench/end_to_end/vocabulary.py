"""Measure how time and memory of the masked-LM loss grow with the vocabulary, compared with other implementations.

    python -m bench.end_to_end.vocabulary [--rows N] [--width H] [--max-vocab V] [--results FOLDER]

The loss of N masked tokens of width H, with its gradients, in fp32. The implementations are those of
`bench/ops/linear_cross_entropy.py`; their results must agree with PyTorch's plain loss. Each point runs in its own
process; its memory is the peak of the process minus what the process held before the first call. The lower bound of the
time is that of the GEMMs of logits and gradients, and of the memory the gradients, which a call returns.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import pytest
import torch

from bench.arguments import result_parser
from bench.bounds import with_backward
from bench.cases import Factory, Function, make
from bench.ceilings import gemm_throughput
from bench.harness import ON_GPU
from bench.ops.linear_cross_entropy import LossCase, chunked, cut_cross_entropy, fused, plain, with_liger
from bench.points import in_a_process, peak_memory, restart_peak, timed
from bench.result_files import require_clean_tree, write_result

FACTORIES: dict[str, Factory] = {
    "bertfast": fused,
    "torch": plain,
    "torch.compile": lambda case: torch.compile(plain(case)),
    "F.linear_cross_entropy": chunked,
    "liger": with_liger,
    "cut_cross_entropy": cut_cross_entropy,
}
TOLERANCE = 1e-4  # of loss and gradients, relative to their norms
MIN_VOCAB = 8192


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("--rows", type=int, default=1024, help="masked tokens")
    parser.add_argument("--width", type=int, default=768, help="width of the hidden states")
    parser.add_argument("--max-vocab", type=int, default=131_072, help="largest size of the vocabulary")
    parser.add_argument("--point", nargs=2, metavar=("NAME", "VOCAB"), help="measure only this point and print it")
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(point(arguments)))
        return
    if ON_GPU:
        parser.error("this program measures a CPU")
    require_clean_tree(arguments.results)
    points = []
    print("| vocabulary | implementation | s | MB |\n|---|---|---|---|")
    for vocab_size in (MIN_VOCAB << i for i in range((arguments.max_vocab // MIN_VOCAB).bit_length())):
        for name in FACTORIES:
            options = ["--rows", str(arguments.rows), "--width", str(arguments.width), "--point", name, str(vocab_size)]
            found = in_a_process("end_to_end.vocabulary", options)
            points.append({"implementation": name, "vocab_size": vocab_size, **found})
            cells = found.get("reason") or f"{found['seconds']:.3f} | {found['peak_bytes'] / 1e6:.0f}"
            print(f"| {vocab_size} | {name} | {cells} |", flush=True)
    result = {"rows": arguments.rows, "width": arguments.width, "points": points}
    print(f"\nwritten to {write_result('vocabulary', result, arguments.results)}")


def point(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds and peak bytes of a call with gradients, or the reason why it cannot run."""
    name, vocab_size = arguments.point[0], int(arguments.point[1])
    case = LossCase(
        tokens=arguments.rows, rows=arguments.rows, width=arguments.width, vocab_size=vocab_size, dtype=torch.float32
    )
    inputs = [x.requires_grad_() for x in case.inputs(torch.Generator().manual_seed(0))]
    try:
        loss: Function = make(FACTORIES[name], case).function
        before = restart_peak()
        measured = timed(lambda: loss_and_gradients(loss, inputs))
        peak = peak_memory() - before
    except pytest.skip.Exception as skipped:
        return {"reason": str(skipped)}
    pairs = zip(loss_and_gradients(loss, inputs), loss_and_gradients(plain(case), inputs), strict=True)
    error = max(float((a - b).norm() / b.norm()) for a, b in pairs if a is not None and b is not None)
    if not error <= TOLERANCE:
        return {"reason": f"not timed because its results are wrong: the relative error is {error:.2g}"}
    return {**measured, "peak_bytes": peak, "relative_error": error, **lower_bounds(case, inputs)}


def lower_bounds(case: LossCase, inputs: list[torch.Tensor]) -> dict[str, float]:
    """Return the seconds of the three GEMMs, the bytes of the gradients that a call returns, and the rate."""
    shape = case.rows, case.width, case.vocab_size
    throughput = gemm_throughput(with_backward([shape]), case.dtype)
    return {
        "bound_s": 6 * math.prod(shape) / throughput,
        "bound_bytes": sum(x.nbytes for x in inputs),
        "gemm_gflops": throughput / 1e9,
    }


def loss_and_gradients(loss: Function, inputs: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """Return the loss and the gradients of hidden states, weight and bias; None for a bias that it does not have."""
    value = loss(*inputs)
    assert isinstance(value, torch.Tensor), "a loss is one output"
    return [value.detach(), *torch.autograd.grad(value, inputs, allow_unused=True)]


if __name__ == "__main__":
    main()
