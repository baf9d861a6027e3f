"""Time a pre-training step (masked LM, for BERT + next sentence, AdamW included) against transformers.

All get the same samples, transformers padded. Lengths are "uniform" between a quarter of the maximum and the maximum,
those of sentence pairs from Wikipedia, or all the maximum (`bench.end_to_end.step_cases`). BERT has dropout 0.1,
ModernBERT none; all use PyTorch's fused AdamW. The losses without dropout and the norms of their gradients must agree
before anything is timed. transformers runs with PyTorch's attention, eager and compiled; on a GPU also with its plain
attention; BERT's bf16 on a CPU also in fp32, its default. ModernBERT is not compiled, and computes logits of masked
tokens only, an option that transformers has for it. The process keeps freed memory, as bertfast's programs do, so that
no implementation pays for page faults.

    python -m bench.end_to_end.pretraining_step [CASE …] [--repeats N] [--results FOLDER]

`--count-lengths DATA` counts the lengths of Wikipedia's sentence pairs again, from DATA/corpus/wikipedia-valid.txt.xz
with the vocabulary DATA/vocab/bert-base-uncased-vocab.txt, and stores them next to this file for all other runs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.arguments import add_names, at_least_one, result_parser
from bench.bounds import COPIED, Rates, with_backward
from bench.ceilings import copy_bandwidth, gemm_throughput, layer_gemms
from bench.end_to_end.samples import LENGTHS, count_lengths
from bench.end_to_end.step_cases import ALL, CASES, GPU_CASES, Case
from bench.harness import (
    DEVICE,
    ON_GPU,
    Sample,
    compile_backward_with_forward,
    hf_config,
    median_ratio,
    reason_of,
    seconds_of,
    side_by_side,
    time_limit,
)
from bench.result_files import require_clean_tree, write_result
from bertfast.data.batches import Batch
from bertfast.encoder import pretraining_loss
from bertfast.models.families import pretraining_class
from bertfast.runtime.malloc import keep_freed_memory
from bertfast.runtime.precision import has_bf16_gemm
from bertfast.training.flops import step_flops
from bertfast.training.optimizer import build_optimizers


@dataclass(frozen=True)
class Alternative:
    """A way to run transformers' model.

    Attributes:
        attention: transformers' attention implementation.
        compiled: Whether it is compiled by torch.compile.
        fp32: Whether it runs in fp32 instead of the precision of the case.
    """

    attention: str = "sdpa"
    compiled: bool = False
    fp32: bool = False


ALTERNATIVES = ("transformers-sdpa", "transformers-compile", "transformers-eager", "transformers-fp32")
# Largest relative differences of the losses, and of the norms of the gradients.
TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (2e-2, 0.1)}


def alternatives(case: Case) -> dict[str, Alternative]:
    """Return the implementations to compare with on this device."""
    found = {"transformers-sdpa": Alternative()}
    if case.compiled:
        found["transformers-compile"] = Alternative(compiled=True)
    if ON_GPU:
        return {"transformers-eager": Alternative("eager"), **found}
    if case.dtype == torch.bfloat16 and case.architecture == "bert":
        found["transformers-fp32"] = Alternative(fp32=True)
    return found


def parse_arguments() -> argparse.Namespace:
    parser = result_parser(__doc__)
    cases = GPU_CASES if ON_GPU else CASES
    add_names(parser, "cases", "case", ALL, default=list(cases))
    parser.add_argument("--repeats", type=at_least_one, default=5, help="rounds of which the median is taken")
    add_names(parser, "--against", "alternative", ALTERNATIVES, " (default: all that apply)", nargs="+")
    parser.add_argument("--compile-seconds", type=int, default=600, help="time limit of torch.compile in seconds")
    parser.add_argument("--suffix", default="", help="appended to the names of the result files")
    parser.add_argument("--count-lengths", type=Path, metavar="DATA", help="only count Wikipedia's lengths again")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.count_lengths:
        LENGTHS.write_text(json.dumps(count_lengths(arguments.count_lengths)) + "\n", encoding="utf-8")
        return
    require_clean_tree(arguments.results)
    keep_freed_memory()
    print("| case | tokens | bertfast s | other | other s | ratio | target | GFLOP/s | GEMM efficiency |")
    print("|---|---|---|---|---|---|---|---|---|")
    different = []
    for name in arguments.cases:
        if ALL[name].dtype == torch.bfloat16 and not has_bf16_gemm(DEVICE):
            print(f"{name}: skipped, this processor has no bf16 instructions", file=sys.stderr, flush=True)
            continue
        others = alternatives(ALL[name])
        if arguments.against:
            others = {other: how for other, how in others.items() if other in arguments.against}
        if not others:
            print(f"{name}: skipped, {', '.join(arguments.against)} does not apply", file=sys.stderr, flush=True)
            continue
        try:
            result = measure(name, ALL[name], others, arguments.repeats, arguments.compile_seconds)
        except DifferentResultsError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            different.append(name)
            continue
        file = "-".join(filter(None, ["pretraining_step", name, arguments.suffix]))
        write_result(file, result, arguments.results)
        print_result(result)
    print(f"\nwritten to {arguments.results}")
    if different:
        raise SystemExit(f"not timed, because the results differ: {', '.join(different)}")


def print_result(result: dict[str, Any]) -> None:
    """Print a table row per alternative, and the reasons of those that did not run."""
    for other, ratio in result["ratios"].items():
        print(
            f"| {result['case']} | {result['tokens']} of {result['padded_tokens']} | {result['bertfast_median_s']:.4f} "
            f"| {other} | {result[f'{other}_median_s']:.4f} | {ratio:.2f} | {result['target'] or ''} | "
            f"{result['gflops']:.0f} | {result['gemm_efficiency']:.0%} |",
            flush=True,
        )
    for other, reason in result["not_run"].items():
        print(f"{result['case']}: {other} did not run: {reason}", file=sys.stderr, flush=True)


class DifferentResultsError(RuntimeError):
    """The implementations of a case do not compute the same, so none of them is timed."""


class Steps:
    """The models and optimizers of a case, on the same samples and weights.

    Args:
        case: Model and batch.
        others: The alternatives to bertfast.
        batch: The samples, padded and packed.
        dropout: Dropout probability of all models.
        weights: Weights of all models; None: random ones.
    """

    def __init__(
        self,
        case: Case,
        others: dict[str, Alternative],
        batch: tuple[dict[str, torch.Tensor], Batch],
        dropout: float,
        weights: dict[str, torch.Tensor] | None = None,
    ):
        self.case, self.others = case, others
        self.padded, self.packed = batch
        self.models = build(case, others, dropout, weights)
        self.optimizers = {name: build_optimizers(model, "adamw", 1e-4, 0.01)[0] for name, model in self.models.items()}

    def loss(self, name: str) -> torch.Tensor:
        """Return the loss of an implementation."""
        mixed = self.case.dtype == torch.bfloat16 and not (name in self.others and self.others[name].fp32)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=mixed):
            if name == "bertfast":
                return packed_loss(self.models[name], self.packed)
            loss: torch.Tensor = self.models[name](**self.padded).loss
            return loss

    def step(self, name: str) -> None:
        """Run forward and backward pass and the optimizer of an implementation."""
        self.loss(name).backward()
        self.optimizers[name].step()
        self.models[name].zero_grad(set_to_none=True)

    def compile(self, seconds: int) -> tuple[dict[str, float], dict[str, str]]:
        """Compile the alternatives to be compiled; remove those that fail or take longer than `seconds`.

        Returns:
            The seconds of each, and the reasons of those that were removed.
        """
        compile_backward_with_forward()
        compiling, not_run = {}, {}
        for name in [name for name, how in self.others.items() if how.compiled]:
            self.models[name].compile()
            compiling[name], reason = within(seconds, partial(self.step, name))
            if reason:
                not_run[name] = reason
                del self.models[name], self.optimizers[name]
        return compiling, not_run

    def optimizer_seconds(self) -> float:
        """Return the seconds of the update of bertfast's model, best of three."""
        for parameter in self.models["bertfast"].parameters():
            parameter.grad = torch.zeros_like(parameter)
        return min(side_by_side({"step": self.optimizers["bertfast"].step}, 3)["step"]).seconds


def measure(
    name: str, case: Case, others: dict[str, Alternative], repeats: int, compile_seconds: int
) -> dict[str, Any]:
    """Time a case against `others` and return its result.

    Raises:
        DifferentResultsError: The losses or the norms of the gradients differ.
    """
    torch.manual_seed(0)
    config, batch = case.config(), case.samples()
    steps = Steps(case, others, batch, dropout=0.0)
    losses = agreed_losses(steps)

    steps = Steps(case, others, batch, case.dropout, steps.models["bertfast"].state_dict())
    compiling, not_run = steps.compile(compile_seconds)
    timed = side_by_side({name: partial(steps.step, name) for name in steps.models}, repeats)
    packed = steps.packed
    flops = step_flops(config, packed)
    shapes = gemm_shapes(config, packed.sequences.num_tokens, packed.masked)
    rates = Rates(gemm_throughput(shapes, case.dtype), copy_bandwidth(COPIED))
    parameters = sum(parameter.numel() for parameter in steps.models["bertfast"].parameters())
    return {
        "case": name,
        "lengths": case.sample_lengths(),
        "tokens": packed.sequences.num_tokens,
        "padded_tokens": case.sequences * case.max_seqlen,
        "masked": packed.masked,
        "loss_without_dropout": losses,
        **comparison(timed),
        "compiling_s": compiling,
        "not_run": not_run,
        "optimizer_s": steps.optimizer_seconds(),
        "optimizer_lower_bound_s": rates.update(parameters),
        "copy_gb_per_s": rates.bytes / 1e9,
        "target": case.target,
        **efficiency(flops, rates.flops, statistics.median(seconds_of(timed["bertfast"]))),
    }


def agreed_losses(steps: Steps) -> dict[str, float]:
    """Return the loss of each implementation.

    Raises:
        DifferentResultsError: They or the norms of the gradients differ. An untrained model's loss alone would hardly
            depend on what attention returns.
    """
    losses, norms = {}, {}
    for name, model in steps.models.items():
        loss = steps.loss(name)
        loss.backward()
        losses[name], norms[name] = loss.item(), gradient_norms(model)
        model.zero_grad(set_to_none=True)
    of_loss, of_norm = TOLERANCES[steps.case.dtype]
    if not max(losses.values()) - min(losses.values()) <= of_loss * losses["bertfast"]:
        raise DifferentResultsError(f"the losses differ, so nothing is timed: {losses}")
    for parameter, norm in norms["bertfast"].items():
        found = {name: of_model.get(parameter, 0.0) for name, of_model in norms.items()}
        if not all(abs(other - norm) <= of_norm * norm for other in found.values()):
            raise DifferentResultsError(
                f"the norms of the gradient of {parameter} differ, so nothing is timed: {found}"
            )
    return losses


def gradient_norms(model: torch.nn.Module) -> dict[str, float]:
    """Return the norm of the gradient of each matrix of weights, over all layers, by its name without the layer."""
    squares: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and parameter.grad is not None:
            squares[re.sub(r"\.\d+\.", ".", name)].append(parameter.grad.float().square().sum())
    return {name: torch.stack(of_layers).sum().sqrt().item() for name, of_layers in squares.items()}


def comparison(timed: dict[str, list[Sample]]) -> dict[str, object]:
    """Return the samples and medians of all implementations, and the ratios of the others to bertfast."""
    medians = {name: statistics.median(seconds_of(column)) for name, column in timed.items()}
    others = [name for name in timed if name != "bertfast"]
    fastest = min(others, key=lambda name: medians[name]) if others else None
    ratios = {name: median_ratio(timed[name], timed["bertfast"]) for name in others}
    return {
        "seconds": {name: [sample.seconds for sample in column] for name, column in timed.items()},
        "cores": {name: [sample.cores for sample in column] for name, column in timed.items()},
        **{f"{name}_median_s": median for name, median in medians.items()},
        "fastest_other": fastest,
        "ratios": ratios,
        "ratio": None if fastest is None else ratios[fastest],
    }


def efficiency(flops: int, throughput: float, seconds: float) -> dict[str, float]:
    """Return the model's FLOPs and the measured GEMM throughput, and what follows for a step of `seconds`."""
    return {
        "model_gflop": flops / 1e9,
        "gflops": flops / seconds / 1e9,
        "gemm_gflops": throughput / 1e9,
        "lower_bound_s": flops / throughput,
        "gemm_efficiency": flops / seconds / throughput,
    }


def within(seconds: int, function: Callable[[], object]) -> tuple[float, str | None]:
    """Return how many seconds a call took, and why it failed (None: it succeeded within `seconds`)."""
    started, reason = time.perf_counter(), None
    try:
        with time_limit(seconds):
            function()
    except Exception as error:
        reason = reason_of(error)
    return time.perf_counter() - started, reason


def build(
    case: Case, others: dict[str, Alternative], dropout: float, weights: dict[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """Return bertfast's model and transformers' models in training mode with the same weights, by default random."""
    config = case.config(dropout)
    kind = pretraining_class(config)
    models: dict[str, Any]
    with DEVICE:
        models = {"bertfast": kind(config)}
        for name, how in others.items():
            plain: Any = hf_config(config, how.attention)
            if hasattr(plain, "sparse_prediction"):  # of ModernBERT: no logits of other tokens
                plain.sparse_prediction = True
            models[name] = getattr(transformers, kind.__name__)(plain)
    for model in models.values():
        model.train().load_state_dict(weights or models["bertfast"].state_dict())
    return models


def packed_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Return the mean masked-LM loss, for pairs plus the mean next-sentence loss, as transformers adds them."""
    loss = pretraining_loss(model, batch, torch.randint(2**62, (), device=DEVICE))
    masked_lm = loss.masked_lm / loss.masked
    return masked_lm if batch.next_sentence_labels is None else masked_lm + loss.next_sentence / loss.pairs


def gemm_shapes(config: transformers.BertConfig, tokens: int, masked: int) -> list[tuple[int, int, int]]:
    """Return the shapes (m, k, n) of all GEMMs of a step: layers and masked-LM head, forward and backward."""
    head = (masked, config.hidden_size, config.vocab_size)
    return with_backward([*layer_gemms(config, tokens) * config.num_hidden_layers, head])


if __name__ == "__main__":
    main()
