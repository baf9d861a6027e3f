"""Measure the overhead of the pre-training loop over the bare step: batches, schedule, metrics, progress bar.

    python -m bench.end_to_end.loop SHARDS [--preset NAME] [--steps N] [--results FOLDER]

Between two steps of a run, the same step (gradients and optimizer update) is computed once more on its own, so both are
timed on the same machine state. The bare step starts from finished batches. SHARDS is a folder written by
`bertfast prepare`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.arguments import at_least_one, result_parser
from bench.harness import DEVICE
from bench.result_files import require_clean_tree, write_result
from bertfast.data.samples import Sampling
from bertfast.runtime.malloc import keep_freed_memory
from bertfast.runtime.precision import wait_for
from bertfast.training.pretraining import Pretraining, PretrainSettings

WARMUP = 5  # untimed first steps, which allocate memory and capture a graph


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("shards", type=Path, help="folder of the token shards")
    parser.add_argument("--preset", default="mini", help="size of the model")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per batch")
    parser.add_argument("--steps", type=at_least_one, default=60, help="timed steps")
    arguments = parser.parse_args()
    require_clean_tree(arguments.results)
    keep_freed_memory()
    looped, bare = seconds_of_steps(arguments)
    ratio = statistics.median(a / b for a, b in zip(looped, bare, strict=True))
    result = {
        "preset": arguments.preset,
        "tokens": arguments.tokens,
        "loop_s": looped,
        "bare_s": bare,
        "median_loop_s": statistics.median(looped),
        "median_bare_s": statistics.median(bare),
        "median_ratio": ratio,
    }
    path = write_result(f"loop-{arguments.preset}", result, arguments.results)
    print(f"a step of the loop takes {ratio:.3f} times as long as a bare step; written to {path}")


def seconds_of_steps(arguments: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Return the seconds of the steps of the loop, and of the bare steps between them."""
    looped: list[float] = []
    bare: list[float] = []
    started = 0.0
    with TemporaryDirectory() as folder:
        settings = PretrainSettings.of(
            output_dir=folder,
            data_dir=str(arguments.shards),
            sampling=Sampling(max_seq_length=128),
            preset=arguments.preset,
            tokens_per_batch=arguments.tokens,
            max_steps=arguments.steps + WARMUP,
            eval_batches=1,
            save_steps=10**6,
        )
        run = Pretraining(settings)

        def between(step: int) -> None:
            nonlocal started
            wait_for(DEVICE)
            looped.append(time.perf_counter() - started)
            started = time.perf_counter()
            batches = run.batches_of_step
            masked = sum(batch.masked for batch in batches)
            pairs = sum(sum(length > 0 for length in batch.sequences.lengths) for batch in batches)
            run.train_step.gradients(batches, masked, pairs)
            run.train_step.update(settings.optimizer.learning_rate)
            wait_for(DEVICE)
            bare.append(time.perf_counter() - started)
            started = time.perf_counter()

        started = time.perf_counter()
        run.run(between)
    return looped[WARMUP:], bare[WARMUP:]


if __name__ == "__main__":
    main()
