"""What pre-training's loop adds to the bare step: batches, the schedule, metrics, the progress bar.

Between two steps of a run the same step, its gradients and the optimizers' update, is computed once more on its own; so
both see the same machine. The bare one starts with batches that are made already.

    python -m bench.end_to_end.loop SHARDS [--preset NAME] [--steps N] [--results FOLDER]

SHARDS is what `bertfast prepare` wrote.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench.harness import ON_GPU, RESULTS, write_result
from bertfast.data.samples import Sampling
from bertfast.runtime.malloc import keep_freed_memory
from bertfast.training.pretrain import Pretraining, PretrainSettings

UNCOUNTED = 5  # steps at first, in which memory is taken and a step is recorded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for what was measured")
    arguments = parser.parse_args()
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
    print(f"the loop's step takes {ratio:.3f} of the bare one's time; written to {path}")


def seconds_of_steps(arguments: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Of the loop's steps, and of the bare ones between them."""
    looped, bare = [], []
    with TemporaryDirectory() as folder:
        settings = PretrainSettings.of(
            output_dir=folder,
            data_dir=str(arguments.shards),
            sampling=Sampling(max_seq_length=128),
            preset=arguments.preset,
            tokens_per_batch=arguments.tokens,
            max_steps=arguments.steps + UNCOUNTED,
            eval_batches=1,
            save_steps=10**6,
        )
        run = Pretraining(settings)

        def between(step: int) -> None:
            nonlocal started
            wait()
            looped.append(time.perf_counter() - started)
            started = time.perf_counter()
            batches = run.batches_of_step
            masked = sum(batch.masked for batch in batches)
            pairs = sum(sum(length > 0 for length in batch.sequences.lengths) for batch in batches)
            run.train_step.gradients(batches, masked, pairs)
            run.train_step.update(settings.optimizer.learning_rate)
            wait()
            bare.append(time.perf_counter() - started)
            started = time.perf_counter()

        started = time.perf_counter()
        run.run(between)
    return looped[UNCOUNTED:], bare[UNCOUNTED:]


def wait() -> None:
    """For the device."""
    if ON_GPU:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
