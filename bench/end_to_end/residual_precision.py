"""Compare the loss of `bertfast pretrain` with an fp32 and with a bf16 residual stream, from the same weights.

Both run bf16 GEMMs under autocast, with the same samples, masks and dropout; only `--residual-precision` differs. For
each seed the result contains the training losses of all steps, their mean over the last SMOOTHED steps, and the final
validation loss.

    python -m bench.end_to_end.residual_precision [DATA] [--steps 300] [--seeds 1 2] [--preset tiny] [--results FOLDER]

DATA contains corpus/wikitext2-detok-{train,valid}.txt.xz.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch

from bench.arguments import DATA, at_least_one, result_parser
from bench.end_to_end.curve_parity import corpus, losses_of, mean
from bench.harness import ON_GPU
from bench.result_files import RESULTS, require_clean_tree, write_result
from bertfast.architectures.presets import Preset
from bertfast.data.prepare import PrepareSettings, prepare
from bertfast.data.samples import Sampling
from bertfast.runtime.precision import ResidualPrecision
from bertfast.training.pretraining import Pretraining, PretrainSettings

SMOOTHED = 50
TOKENS, RATE = 1024, 1e-3


def main() -> None:
    parser = result_parser(__doc__, RESULTS)
    parser.add_argument("data", type=Path, nargs="?", default=DATA, help="folder with the texts")
    parser.add_argument("--steps", type=at_least_one, default=300, help="steps of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="seeds; each is run with both streams")
    parser.add_argument("--preset", choices=get_args(Preset), default="tiny", help="size of the model")
    arguments = parser.parse_args()
    require_clean_tree(arguments.results)
    if not ON_GPU:
        torch.set_num_threads(1)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shards = prepare(PrepareSettings(str(folder / "data"), corpus(arguments.data / "corpus")))
        runs = {
            stream: {
                seed: curve(folder, shards, arguments.preset, stream, seed, arguments.steps) for seed in arguments.seeds
            }
            for stream in get_args(ResidualPrecision)
        }
    differences = {
        name: [runs["bf16"][seed][name] - runs["fp32"][seed][name] for seed in arguments.seeds]
        for name in ("end", "validation_loss")
    }
    values = {"preset": arguments.preset, "steps": arguments.steps, "tokens_per_batch": TOKENS, "smoothed": SMOOTHED}
    path = write_result(
        "residual_precision", {**values, "bf16_minus_fp32": differences, "runs": runs}, arguments.results
    )
    for name, each in differences.items():
        print(f"{name}, bf16 stream minus fp32 stream: {', '.join(f'{x:+.4f}' for x in each)}")
    print(f"written to {path}")


def curve(
    folder: Path, shards: Path, preset: Preset, stream: ResidualPrecision, seed: int, steps: int
) -> dict[str, Any]:
    """Pre-train with one stream; return its training losses, their final mean and the final validation loss."""
    settings = PretrainSettings.of(
        output_dir=str(folder / f"{stream}-{seed}"),
        data_dir=str(shards),
        sampling=Sampling(max_seq_length=128),
        preset=preset,
        tokens_per_batch=TOKENS,
        max_steps=steps,
        learning_rate=RATE,
        warmup_ratio=0.1,
        seed=seed,
        precision="bf16",
        residual_precision=stream,
        logging_steps=1,
        eval_batches=20,
        eval_steps=steps,
        save_steps=steps,
    )
    run = Pretraining(settings)
    losses = losses_of(run)
    assert run.metrics_log is not None, "the main process has a log"
    validation = [entry["validation_loss"] for entry in run.metrics_log.entries() if "validation_loss" in entry]
    return {"end": mean(losses[-SMOOTHED:]), "validation_loss": validation[-1], "losses": losses}


if __name__ == "__main__":
    main()
