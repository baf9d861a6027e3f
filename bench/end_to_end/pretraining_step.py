"""One pre-training step (masked LM + next sentence, AdamW included) beside transformers' on the same samples.

transformers gets them padded, as its users pad. Lengths are "uniform" between a quarter and the whole of the maximum,
or those of sentence pairs from Wikipedia. Dropout is 0.1 and the optimizer PyTorch's fused AdamW on all sides. Before
anything is timed the losses must agree without dropout. transformers runs with PyTorch's attention, as it is and
compiled; on a GPU with its plain attention too; and where a case is in bf16, on a CPU also in its default, fp32. The
process keeps what it frees, as bertfast's programs do, so that nobody's memory costs page faults.

    python -m bench.end_to_end.pretraining_step [CASE …] [--repeats N] [--results FOLDER]

`--count-lengths DATA` counts Wikipedia's lengths anew, in DATA/corpus/wikipedia-valid.txt.xz with the vocabulary
DATA/vocab/bert-base-uncased-vocab.txt, and writes them beside this file, where all other runs find them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers

import bertfast
from bench.harness import (
    DEVICE,
    ON_GPU,
    RESULTS,
    matrix_rate,
    median_ratio,
    seconds_of,
    side_by_side,
    time_limit,
    write_result,
)
from bertfast.data.batches import Batch
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.data.samples import CorpusBoundaries, Sampling, plan_samples
from bertfast.data.shards import Shards
from bertfast.encoder import pretraining_loss
from bertfast.ops.sequences import Sequences
from bertfast.runtime.malloc import keep_freed_memory
from bertfast.runtime.precision import has_bf16_gemm
from bertfast.training.flops import step_flops
from bertfast.training.optimizer import build_optimizers

DROPOUT = 0.1
MASKED = 0.15
LENGTHS = Path(__file__).with_name("wikipedia_lengths.json")


@dataclass(frozen=True)
class Case:
    """`sequences` samples of a model in a precision; `wanted` is the ratio to reach; `compiled`: theirs may be."""

    preset: str
    sequences: int
    longest: int
    dtype: torch.dtype
    lengths: str = "uniform"
    wanted: float | None = None
    compiled: bool = True


SIZES = {"base-128": ("base", 16, 128), "base-512": ("base", 4, 512), "small-128": ("small", 16, 128)}
CASES = {
    f"{size}{'-wikipedia' * (lengths == 'wikipedia')}-{precision}": Case(*SIZES[size], dtype, lengths, 3.0)
    for size in SIZES
    for lengths in ("uniform", "wikipedia")
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
}
GPU_CASES = {
    "gpu-base-128": Case("base", 256, 128, torch.bfloat16, "wikipedia"),
    "gpu-base-512": Case("base", 64, 512, torch.bfloat16, "wikipedia"),
    "gpu-large-512": Case("large", 16, 512, torch.bfloat16, "wikipedia"),
    "gpu-large-128": Case("large", 128, 128, torch.bfloat16, "wikipedia"),
}
TRIAL = {  # to try the program
    "trial": Case("tiny", 4, 32, torch.float32, compiled=False),
    "trial-wikipedia": Case("tiny", 4, 128, torch.float32, "wikipedia", compiled=False),
}
ALL = CASES | GPU_CASES | TRIAL


@dataclass(frozen=True)
class Contender:
    """transformers' model with an attention of its own, as it is or compiled, in the case's precision or in fp32."""

    attention: str = "sdpa"
    compiled: bool = False
    default: bool = False


SIDES = ("transformers-sdpa", "transformers-compile", "transformers-eager", "transformers-fp32")


def theirs(case: Case) -> dict[str, Contender]:
    """What ours stands beside, on this device."""
    sides = {"transformers-sdpa": Contender()}
    if case.compiled:
        sides["transformers-compile"] = Contender(compiled=True)
    if ON_GPU:
        return {"transformers-eager": Contender("eager"), **sides}
    if case.dtype == torch.bfloat16:
        sides["transformers-fp32"] = Contender(default=True)
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = GPU_CASES if ON_GPU else CASES
    parser.add_argument("cases", nargs="*", default=list(cases), metavar="CASE", help=f"of {', '.join(ALL)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", nargs="+", metavar="NAME", help=f"of {', '.join(SIDES)} (default: all that fit)")
    parser.add_argument("--compile-seconds", type=int, default=600, help="at most, for torch.compile")
    parser.add_argument("--suffix", default="", help="is added to the names of the result files")
    parser.add_argument("--count-lengths", type=Path, metavar="DATA")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for what was measured")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(ALL):
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    if unknown := set(arguments.against or ()) - set(SIDES):
        parser.error(f"--against: there is no {', '.join(sorted(unknown))}; there are {', '.join(SIDES)}")
    if arguments.count_lengths:
        LENGTHS.write_text(json.dumps(count_lengths(arguments.count_lengths)) + "\n", encoding="utf-8")
        return
    keep_freed_memory()
    print("| case | tokens | ours s | other | its s | ratio | wanted | GFLOP/s | of the matrix rate |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in arguments.cases:
        if ALL[name].dtype == torch.bfloat16 and not has_bf16_gemm(DEVICE):
            print(f"{name}: left out, this processor multiplies no bf16", file=sys.stderr, flush=True)
            continue
        sides = theirs(ALL[name])
        if arguments.against:
            sides = {who: side for who, side in sides.items() if who in arguments.against}
        if not sides:
            print(f"{name}: left out, nothing of {', '.join(arguments.against)} fits", file=sys.stderr, flush=True)
            continue
        result = measure(name, ALL[name], sides, arguments.repeats, arguments.compile_seconds)
        file = "-".join(filter(None, ["pretraining_step", name, arguments.suffix]))
        write_result(file, result, arguments.results)
        for other, ratio in result["ratios"].items():
            print(
                f"| {name} | {result['tokens']} of {result['padded_tokens']} | {result['ours_median_s']:.4f} | {other} "
                f"| {result[f'{other}_median_s']:.4f} | {ratio:.2f} | {result['wanted'] or ''} | "
                f"{result['gflops']:.0f} | {result['share_of_matrix_rate']:.0%} |",
                flush=True,
            )
        for other, reason in result["not_run"].items():
            print(f"{name}: {other} did not run: {reason}", file=sys.stderr, flush=True)
    print(f"\nwritten to {arguments.results}")


def measure(name: str, case: Case, sides: dict[str, Contender], repeats: int, compile_seconds: int) -> dict:
    """Time a case against `sides`; raises if the losses differ."""
    torch.manual_seed(0)
    config = bertfast.preset_config(case.preset)
    lengths = lengths_of(case)
    padded, packed = samples(lengths, case.longest, config.vocab_size)

    def loss(who: str) -> torch.Tensor:
        mixed = case.dtype == torch.bfloat16 and not (who in sides and sides[who].default)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=mixed):
            return our_loss(models[who], packed) if who == "ours" else models[who](**padded).loss

    def step(who: str) -> None:
        loss(who).backward()
        optimizers[who].step()
        models[who].zero_grad(set_to_none=True)

    models = build(case, sides, 0.0)
    losses = {who: loss(who).item() for who in models}
    tolerance = 1e-4 if case.dtype == torch.float32 else 2e-2
    if max(losses.values()) - min(losses.values()) > tolerance * losses["ours"]:
        raise SystemExit(f"{name}: the losses differ, nothing is timed: {losses}")

    models = build(case, sides, DROPOUT, models["ours"].state_dict())
    optimizers = {who: build_optimizers(model, "adamw", 1e-4, 0.01)[0] for who, model in models.items()}
    compiling, not_run = {}, {}
    for who in [who for who, side in sides.items() if side.compiled]:
        models[who].compile()
        compiling[who], reason = within(compile_seconds, lambda who=who: step(who))
        if reason:
            not_run[who] = reason
            del models[who], optimizers[who]
    seconds = side_by_side({who: lambda who=who: step(who) for who in models}, repeats)
    medians = {who: statistics.median(seconds_of(some)) for who, some in seconds.items()}
    for parameter in models["ours"].parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = min(side_by_side({"step": optimizers["ours"].step}, 3)["step"]).seconds

    tokens, masked = packed.sequences.num_tokens, packed.masked
    work = step_flops(config, packed)
    rate = matrix_rate(step_products(config, tokens, masked), case.dtype)
    others = [who for who in models if who != "ours"]
    fastest = min(others, key=medians.get, default=None)
    ratios = {who: median_ratio(seconds[who], seconds["ours"]) for who in others}
    return {
        "case": name,
        "lengths": lengths,
        "tokens": tokens,
        "padded_tokens": case.sequences * case.longest,
        "masked": masked,
        "loss_without_dropout": losses,
        "seconds": {who: [sample.seconds for sample in some] for who, some in seconds.items()},
        "cores": {who: [sample.cores for sample in some] for who, some in seconds.items()},
        **{f"{who}_median_s": median for who, median in medians.items()},
        "compiling_s": compiling,
        "not_run": not_run,
        "optimizer_s": optimizer,
        "fastest_other": fastest,
        "ratios": ratios,
        "ratio": ratios.get(fastest),
        "wanted": case.wanted,
        "model_gflop": work / 1e9,
        "gflops": work / medians["ours"] / 1e9,
        "matrix_rate_gflops": rate / 1e9,
        "floor_s": work / rate,
        "share_of_matrix_rate": work / medians["ours"] / rate,
    }


def within(seconds: int, function: Callable[[], object]) -> tuple[float, str | None]:
    """How many seconds a call took, and if it did not succeed within `seconds`, why."""
    started, reason = time.perf_counter(), None
    try:
        with time_limit(seconds):
            function()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return time.perf_counter() - started, reason


def build(
    case: Case, sides: dict[str, Contender], dropout: float, weights: dict | None = None
) -> dict[str, torch.nn.Module]:
    """Our model and theirs in training mode, with the same weights: the given ones, or random ones."""
    options = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = bertfast.preset_config(case.preset, **options)
    values = config.to_dict()
    with DEVICE:
        models = {"ours": bertfast.BertForPreTraining(config)}
        for who, side in sides.items():
            their_config = transformers.BertConfig(**values, attn_implementation=side.attention)
            models[who] = transformers.BertForPreTraining(their_config)
    for model in models.values():
        model.train().load_state_dict(weights or models["ours"].state_dict())
    return models


def lengths_of(case: Case) -> list[int]:
    """The samples' lengths: evenly spread, or drawn as those of Wikipedia's sentence pairs are."""
    if case.lengths == "uniform":
        return torch.linspace(case.longest // 4, case.longest, case.sequences).round().int().tolist()
    counts = np.array(json.loads(LENGTHS.read_text(encoding="utf-8"))[str(case.longest)])
    return np.random.default_rng(0).choice(len(counts), case.sequences, p=counts / counts.sum()).tolist()


def count_lengths(data: Path) -> dict[int, list[int]]:
    """For each longest length how many of Wikipedia's sentence pairs are of 0, 1, 2 … tokens."""
    text, vocabulary = data / "corpus" / "wikipedia-valid.txt.xz", data / "vocab" / "bert-base-uncased-vocab.txt"
    corpus = CorpusSettings([str(text)], tokenizer_name=str(vocabulary), validation_split_percentage=0, processes=1)
    counts = {}
    with TemporaryDirectory() as folder:
        outline = CorpusBoundaries.of(Shards.open(prepare(PrepareSettings(folder, corpus)) / "train"))
        for longest in (128, 512):
            sampling = Sampling(max_seq_length=longest)
            lengths = plan_samples(outline, sampling, np.random.default_rng(0)).lengths(sampling)
            counts[longest] = np.bincount(lengths, minlength=longest + 1).tolist()
    return counts


def samples(lengths: list[int], longest: int, vocabulary: int) -> tuple[dict, Batch]:
    """The same random samples of these lengths padded, as transformers takes them, and packed, on DEVICE."""
    sequences, layout, lengths = len(lengths), Sequences.from_lengths(lengths), torch.tensor(lengths)
    attended = torch.arange(longest) < lengths[:, None]
    ids = torch.randint(1000, vocabulary, (sequences, longest)) * attended
    types = ((torch.arange(longest) > lengths[:, None] // 2) & attended).long()
    labels = torch.where((torch.rand(sequences, longest) < MASKED) & attended, ids, -100)
    order = torch.randint(0, 2, (sequences,))
    padded = {
        "input_ids": ids,
        "attention_mask": attended.long(),
        "token_type_ids": types,
        "labels": labels,
        "next_sentence_label": order,
    }
    rows = (labels[attended] >= 0).nonzero().squeeze(1)
    packed = Batch(
        token_ids=ids[attended],
        token_type_ids=types[attended],
        position_ids=layout.position,
        sequences=layout,
        masked_rows=rows,
        labels=labels[attended][rows],
        next_sentence_labels=order,
        masked=len(rows),
    )
    return {name: x.to(DEVICE) for name, x in padded.items()}, packed.to(DEVICE)


def our_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean masked-LM loss plus mean next-sentence loss, as transformers adds them."""
    loss = pretraining_loss(model, batch, torch.randint(2**62, (), device=DEVICE))
    return loss.masked_lm / loss.masked + loss.next_sentence / loss.pairs


def step_products(config, tokens: int, masked: int) -> list[tuple[int, int, int]]:
    """The products (m, k, n) of one layer and the head, forward and backward, in the proportion a step has them."""
    hidden, wide = config.hidden_size, config.intermediate_size
    layer = [(tokens, hidden, 3 * hidden), (tokens, hidden, hidden), (tokens, hidden, wide), (tokens, wide, hidden)]
    forward = layer * config.num_hidden_layers + [(masked, hidden, config.vocab_size)]
    return [shape for m, k, n in forward for shape in ((m, k, n), (m, n, k), (n, m, k))]


if __name__ == "__main__":
    main()
