"""One pre-training step (forward and backward, masked LM + next sentence) beside transformers' on the same samples.

transformers gets them padded, as its users pad; lengths lie between a quarter and the whole of the maximum. Dropout is
0.1 on both sides. Before anything is timed the losses must agree without dropout. On a GPU transformers runs three
times: with its plain attention, with PyTorch's, and compiled.

    python bench/end_to_end/pretraining_step.py [CASE …] [--repeats N] [--results FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
import transformers

import bertfast
from bertfast.data.batches import Batch
from bertfast.encoder import pretraining_loss
from bertfast.sequences import Sequences

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import DEVICE, ON_GPU, RESULTS, matrix_rate, median_ratio, side_by_side, write_result

DROPOUT = 0.1
MASKED = 0.15
# case: (preset, sequences, longest, precision, ratio to reach)
CASES = {
    "base-128-fp32": ("base", 16, 128, torch.float32, 2.2),
    "small-128-fp32": ("small", 16, 128, torch.float32, 3.0),
    "base-512-fp32": ("base", 4, 512, torch.float32, 2.8),
    "base-128-bf16": ("base", 16, 128, torch.bfloat16, 2.2),
}
GPU_CASES = {
    "gpu-base-128": ("base", 256, 128, torch.bfloat16, None),
    "gpu-base-512": ("base", 64, 512, torch.bfloat16, None),
    "gpu-large-512": ("large", 16, 512, torch.bfloat16, None),
    "gpu-large-128": ("large", 128, 128, torch.bfloat16, None),
}
TRIAL = {"trial": ("tiny", 4, 32, torch.float32, None)}  # to try the program
# name: (attention of transformers, compiled)
THEIRS = {"transformers": ("sdpa", False)}
THEIRS_ON_GPU = {
    "transformers-eager": ("eager", False),
    "transformers-sdpa": ("sdpa", False),
    "transformers-compile": ("sdpa", True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = GPU_CASES if ON_GPU else CASES
    known = ", ".join(CASES | GPU_CASES | TRIAL)
    parser.add_argument("cases", nargs="*", default=list(cases), metavar="CASE", help=f"of {known}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for what was measured")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES | GPU_CASES | TRIAL):
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are {known}")
    print("| case | tokens | ours s | fastest other | its s | ratio | wanted | GFLOP/s | of the matrix rate |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in arguments.cases:
        result = measure(case, arguments.repeats)
        write_result(f"pretraining_step-{case}", result, arguments.results)
        other = result["fastest_other"]
        print(
            f"| {case} | {result['tokens']} of {result['padded_tokens']} | {result['ours_median_s']:.4f} | {other} | "
            f"{result[f'{other}_median_s']:.4f} | {result['ratio']:.2f} | {result['wanted'] or ''} | "
            f"{result['gflops']:.0f} | {result['share_of_matrix_rate']:.0%} |",
            flush=True,
        )
    print(f"\nwritten to {arguments.results}")


def measure(case: str, repeats: int) -> dict:
    """Time a case; raises if ours and theirs do not compute the same loss."""
    preset, sequences, longest, dtype, wanted = (CASES | GPU_CASES | TRIAL)[case]
    torch.manual_seed(0)
    config = bertfast.BertConfig.preset(preset)
    padded, packed = samples(sequences, longest, config.vocab_size)

    def loss(name: str) -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return our_loss(models[name], packed) if name == "ours" else models[name](**padded).loss

    def step(name: str) -> None:
        loss(name).backward()
        models[name].zero_grad(set_to_none=True)

    models = build(preset, 0.0)
    losses = {name: loss(name).item() for name in models}
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    if max(losses.values()) - min(losses.values()) > tolerance * losses["ours"]:
        raise SystemExit(f"{case}: the losses differ, nothing is timed: {losses}")

    models = build(preset, DROPOUT, models["ours"].state_dict())
    for name, (_, compiled) in theirs().items():
        if compiled:
            models[name].compile()
    seconds = side_by_side({name: lambda name=name: step(name) for name in models}, repeats)
    medians = {name: statistics.median(some) for name, some in seconds.items()}
    tokens, masked = packed.sequences.used, packed.masked
    work = model_flops(config, packed)
    rate = matrix_rate(step_products(config, tokens, masked), dtype)
    other = min(theirs(), key=medians.get)
    return {
        "case": case,
        "tokens": tokens,
        "padded_tokens": sequences * longest,
        "masked": masked,
        "loss_without_dropout": losses,
        "seconds": seconds,
        **{f"{name}_median_s": median for name, median in medians.items()},
        "fastest_other": other,
        "ratio": median_ratio(seconds[other], seconds["ours"]),
        "wanted": wanted,
        "model_gflop": work / 1e9,
        "gflops": work / medians["ours"] / 1e9,
        "matrix_rate_gflops": rate / 1e9,
        "floor_s": work / rate,
        "share_of_matrix_rate": work / medians["ours"] / rate,
    }


def theirs() -> dict[str, tuple[str, bool]]:
    """What ours stands beside, on this device."""
    return THEIRS_ON_GPU if ON_GPU else THEIRS


def build(preset: str, dropout: float, weights: dict | None = None) -> dict[str, torch.nn.Module]:
    """Our model and theirs in training mode, with the same weights: the given ones, or random ones."""
    options = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = bertfast.BertConfig.preset(preset, **options)
    values = {name: value for name, value in config.to_dict().items() if name not in config.extra}
    with DEVICE:
        models = {"ours": bertfast.BertForPreTraining(config)}
        for name, (attention, _) in theirs().items():
            their_config = transformers.BertConfig(**values, attn_implementation=attention)
            models[name] = transformers.BertForPreTraining(their_config)
    for model in models.values():
        model.train().load_state_dict(weights or models["ours"].state_dict())
    return models


def samples(sequences: int, longest: int, vocabulary: int) -> tuple[dict, Batch]:
    """The same random samples padded, as transformers takes them, and packed, on DEVICE; lengths are evenly spread."""
    lengths = torch.linspace(longest // 4, longest, sequences).round().long()
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
    layout = Sequences.from_lengths(lengths.tolist())
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


def model_flops(config, batch: Batch) -> int:
    """6 · encoder parameters · tokens + 12 · layers · H · Σ s² + 6 · (H² + H V) · masked tokens; padding is no work."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    parameters = layers * hidden * (4 * hidden + 2 * config.intermediate_size)
    squares = sum(length**2 for length in batch.sequences.lengths)
    head = hidden * (hidden + config.vocab_size)
    return 6 * parameters * batch.sequences.used + 12 * layers * hidden * squares + 6 * head * batch.masked


def step_products(config, tokens: int, masked: int) -> list[tuple[int, int, int]]:
    """The products (m, k, n) of one layer and the head, forward and backward, in the proportion a step has them."""
    hidden, wide = config.hidden_size, config.intermediate_size
    layer = [(tokens, hidden, 3 * hidden), (tokens, hidden, hidden), (tokens, hidden, wide), (tokens, wide, hidden)]
    forward = layer * config.num_hidden_layers + [(masked, hidden, config.vocab_size)]
    return [shape for m, k, n in forward for shape in ((m, k, n), (m, n, k), (n, m, k))]


if __name__ == "__main__":
    main()
