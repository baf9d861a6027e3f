"""Measure where the time of a pre-training step goes, in bertfast and in transformers.

    python -m bench.end_to_end.step_parts [CASE] [--repeats N] [--results FOLDER]

CASE is one of `bench.end_to_end.pretraining_step`. PyTorch's profiler records steps of each implementation in turn; its
times of operators, without those that they call, are summed by GROUPS. A profiled step takes a little longer than one
that is not. On a GPU the times are those of the kernels.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.arguments import add_names, at_least_one, result_parser
from bench.end_to_end.pretraining_step import Alternative, Steps
from bench.end_to_end.step_cases import ALL
from bench.harness import ON_GPU
from bench.result_files import require_clean_tree, write_result
from bertfast.runtime.malloc import keep_freed_memory

# By group, a pattern of the names of its operators; the first that matches counts.
GROUPS = {
    "optimizer": r"adamw|_fused_adam|optimizer",
    "loss": r"cross_?entropy|nll_loss|log_softmax",
    "attention": r"attention|sdpa|flash|^aten::(bmm|baddbmm)$|softmax",  # BERT has batched matmuls nowhere else
    "GEMM": r"^aten::(addmm|mm|linear)$|mkldnn|gemm|onednn|matmul",
    "dropout, LayerNorm, GELU": r"dropout|bernoulli|layer_?norm|gelu",
    "embeddings": r"embed|index_select|gather|scatter|index_put|index_add",
    "copies and sums": r"^aten::(copy|add|sum|mul|fill|zero|clone|empty|cat|contiguous)_?$",
}
OTHERS = {"bertfast": None, "transformers": Alternative(), "transformers, eager attention": Alternative("eager")}


def main() -> None:
    parser = result_parser(__doc__)
    add_names(parser, "case", "case", ALL, nargs="?", default="base-128-fp32")
    parser.add_argument("--repeats", type=at_least_one, default=3, help="profiled steps of which the median is taken")
    arguments = parser.parse_args()
    require_clean_tree(arguments.results)
    keep_freed_memory()
    result = measure(arguments.case, arguments.repeats)
    print(f"| group | {' | '.join(result['seconds'])} |\n|---|{'---|' * len(result['seconds'])}")
    for group in [*GROUPS, "other"]:
        cells = (f"{groups.get(group, 0):.3f}" for groups in result["seconds"].values())
        print(f"| {group} | {' | '.join(cells)} |")
    print(f"\nwritten to {write_result('step_parts', result, arguments.results)}")


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Return the seconds of each group of operators per implementation, medians over the steps."""
    case = ALL[name]
    torch.manual_seed(0)
    steps = Steps(case, {key: how for key, how in OTHERS.items() if how}, case.samples(), case.dropout)
    lengths = case.sample_lengths()
    samples: dict[str, list[dict[str, float]]] = {key: [] for key in OTHERS}
    for number in range(repeats + 1):
        for key, found in samples.items():
            groups = profiled(steps, key)
            if number:  # the first step allocates memory
                found.append(groups)
    medians = {
        key: {group: statistics.median(one.get(group, 0.0) for one in found) for group in [*GROUPS, "other"]}
        for key, found in samples.items()
    }
    return {"case": name, "lengths": lengths, "padded_tokens": case.sequences * case.max_seqlen, "seconds": medians}


def profiled(steps: Steps, name: str) -> dict[str, float]:
    """Return the seconds of each group of operators in one step."""
    activities = [ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        steps.step(name)
    groups: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        elapsed = event.self_device_time_total if ON_GPU else event.self_cpu_time_total
        groups[group_of(event.key)] += elapsed / 1e6
    return dict(groups)


def group_of(operator: str) -> str:
    """Return the group of an operator by its name."""
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, operator, re.IGNORECASE)), "other")


if __name__ == "__main__":
    main()
