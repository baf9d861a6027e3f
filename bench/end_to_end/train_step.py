"""Time the step of `bertfast pretrain`: gradients, clipping and AdamW, on a GPU replayed from CUDA graphs.

    python -m bench.end_to_end.train_step [CASE …] [--repeats N] [--results FOLDER]

The cases are the steps whose times `bench.sass_model` predicts: BERT's base model with dropout, in bf16 with fp32
parameters and an fp32 or a bf16 residual stream, on 32,768 tokens in full sequences, 15 % of them masked. They are
compared with nothing but the prediction; `bench.end_to_end.pretraining_step` compares eager steps with transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import BertConfig

import bertfast
from bench.arguments import add_names, at_least_one, result_parser
from bench.end_to_end.samples import random_samples
from bench.harness import DEVICE, ON_GPU, seconds_of, side_by_side
from bench.kernel_times import kernel_times
from bench.result_files import require_clean_tree, write_result
from bertfast.architectures.presets import Preset
from bertfast.data.batches import Batch
from bertfast.models.families import pretraining_class
from bertfast.runtime.cuda_graph import WARMUP_CALLS, can_capture, cuda_graphs, side_stream
from bertfast.runtime.malloc import keep_freed_memory
from bertfast.training.distributed import Distributed
from bertfast.training.initial_model import train_in_part
from bertfast.training.optimizer import build_optimizers
from bertfast.training.step import Objective, TrainStep

RATE = 1e-4


@dataclass(frozen=True)
class StepCase:
    """A model and a batch of full sequences.

    Attributes:
        sequences: Number of sequences.
        length: Tokens of each.
        stream: Precision of the residual stream, "fp32" or "bf16".
        preset: Size of the model.
        precision: Precision of the GEMMs.
    """

    sequences: int
    length: int
    stream: str
    preset: Preset = "base"
    precision: str = "bf16"

    @property
    def predicted_case(self) -> str:
        """What bench/results/sass_model.md calls the step."""
        return f"length {self.length}, {self.stream} stream, Triton"

    def batch(self, vocab_size: int) -> Batch:
        """Return random samples."""
        return random_samples([self.length] * self.sequences, self.length, vocab_size, pairs=False)[1]


CASES = {
    f"{length}-{stream}-stream": StepCase(32_768 // length, length, stream)
    for length in (128, 512)
    for stream in ("fp32", "bf16")
}
TRIAL = {"trial": StepCase(2, 32, "fp32", "tiny", "fp32")}  # to try the program
ALL = CASES | TRIAL


def main() -> None:
    parser = result_parser(__doc__)
    add_names(parser, "cases", "case", ALL, default=list(CASES))
    parser.add_argument("--repeats", type=at_least_one, default=10, help="steps of which the median is taken")
    arguments = parser.parse_args()
    require_clean_tree(arguments.results)
    keep_freed_memory()
    for name in arguments.cases:
        with side_stream(DEVICE):  # which can be captured
            result = measure(ALL[name], arguments.repeats)
        write_result(f"train_step-{name}", {"train_step": {"case": name, **result}}, arguments.results)
        captured = "in CUDA graphs" if result["captured"] else "eager"
        print(f"{name}: {result['median_s'] * 1e3:.2f} ms, {captured}", flush=True)
    print(f"written to {arguments.results}")


def measure(case: StepCase, repeats: int) -> dict[str, Any]:
    """Time a step after its warm-up, in which it is captured.

    Raises:
        SystemExit: The gradients or the loss are not finite.
    """
    torch.manual_seed(0)
    config = bertfast.preset_config(case.preset)
    step, batch = train_step(case, config), case.batch(config.vocab_size)

    def run() -> torch.Tensor:
        step.gradients([batch], batch.masked, 1)
        return step.update(RATE)

    for _ in range(WARMUP_CALLS + 1):
        run()
    seconds = seconds_of(side_by_side({"step": run}, repeats)["step"])
    if not run().isfinite():
        raise SystemExit("the step is not timed, because its gradients or its loss are not finite")
    return {
        "predicted_case": case.predicted_case,
        "tokens": batch.sequences.num_tokens,
        "masked": batch.masked,
        "captured": step.captures,
        "seconds": seconds,
        "median_s": median(seconds),
        "kernels": kernel_times([run]) if ON_GPU else {},
    }


def train_step(case: StepCase, config: BertConfig) -> TrainStep:
    """Return the step of a new model, as `bertfast pretrain` makes it."""
    kind = pretraining_class(config)
    with DEVICE:
        model = kind(config)
    train_in_part(model.train(), pairs=False, checkpoint_layers=0)
    return TrainStep(
        Objective(model, torch.bfloat16 if case.stream == "bf16" else None),
        build_optimizers(model, "adamw", RATE, 0.01),
        Distributed(0, 1, DEVICE),
        precision=case.precision,
        seed=torch.tensor(0, device=DEVICE),
        max_grad_norm=1.0,
        capture=cuda_graphs() if can_capture(config, case.precision, DEVICE) else None,
    )


if __name__ == "__main__":
    main()
