"""One pre-training step (forward and backward, masked LM + next sentence) beside transformers' on the same samples.

transformers gets them padded, as its users pad; lengths lie between a quarter and the whole of the maximum. Dropout is
0.1 on both sides. Before anything is timed the two losses must agree without dropout.

    python bench/end_to_end/pretraining_step.py [CASE …] [--repeats N]
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
from harness import matrix_rate, median_ratio, side_by_side, write_result

DROPOUT = 0.1
MASKED = 0.15
# case: (preset, sequences, longest, precision, ratio to reach)
CASES = {
    "base-128-fp32": ("base", 16, 128, torch.float32, 2.2),
    "small-128-fp32": ("small", 16, 128, torch.float32, 3.0),
    "base-512-fp32": ("base", 4, 512, torch.float32, 2.8),
    "base-128-bf16": ("base", 16, 128, torch.bfloat16, 2.2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print("| case | tokens | ours s | transformers s | ratio | wanted | GFLOP/s | of the matrix rate |")
    print("|---|---|---|---|---|---|---|---|")
    for case in arguments.cases:
        result = measure(case, arguments.repeats)
        path = write_result(f"pretraining_step-{case}", result)
        print(
            f"| {case} | {result['tokens']} of {result['padded_tokens']} | {result['ours_median_s']:.3f} | "
            f"{result['transformers_median_s']:.3f} | {result['ratio']:.2f} | {result['wanted']} | "
            f"{result['gflops']:.0f} | {result['share_of_matrix_rate']:.0%} |",
            flush=True,
        )
    print(f"\nwritten to {path.parent}")


def measure(case: str, repeats: int) -> dict:
    """Time a case; raises if the two do not compute the same loss."""
    preset, sequences, longest, dtype, wanted = CASES[case]
    torch.manual_seed(0)
    config = bertfast.BertConfig.preset(preset)
    padded, packed = samples(sequences, longest, config.vocab_size)

    models = {}
    for dropout in (0.0, DROPOUT):
        options = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        ours = bertfast.BertForPreTraining(bertfast.BertConfig.preset(preset, **options)).train()
        values = {name: value for name, value in ours.config.to_dict().items() if name not in ours.config.extra}
        theirs = transformers.BertForPreTraining(transformers.BertConfig(**values)).train()
        if models:
            ours.load_state_dict(models["ours"].state_dict())
        theirs.load_state_dict(ours.state_dict())
        models = {"ours": ours, "transformers": theirs}
        steps = {
            "ours": lambda ours=ours: our_loss(ours, packed, dtype),
            "transformers": lambda theirs=theirs: their_loss(theirs, padded, dtype),
        }
        if dropout == 0:
            losses = {name: step().item() for name, step in steps.items()}
            tolerance = 1e-4 if dtype == torch.float32 else 2e-2
            if abs(losses["ours"] - losses["transformers"]) > tolerance * losses["transformers"]:
                raise SystemExit(f"{case}: the losses differ, nothing is timed: {losses}")

    def run(name: str) -> None:
        steps[name]().backward()
        models[name].zero_grad(set_to_none=True)

    seconds = side_by_side({name: lambda name=name: run(name) for name in steps}, repeats)
    tokens, masked = packed.sequences.used, packed.masked
    work = model_flops(config, packed)
    rate = matrix_rate(step_products(config, tokens, masked), dtype)
    ours = statistics.median(seconds["ours"])
    return {
        "case": case,
        "tokens": tokens,
        "padded_tokens": sequences * longest,
        "masked": masked,
        "loss_without_dropout": losses,
        "seconds": seconds,
        "ours_median_s": ours,
        "transformers_median_s": statistics.median(seconds["transformers"]),
        "ratio": median_ratio(seconds["transformers"], seconds["ours"]),
        "wanted": wanted,
        "model_gflop": work / 1e9,
        "gflops": work / ours / 1e9,
        "matrix_rate_gflops": rate / 1e9,
        "floor_s": work / rate,
        "share_of_matrix_rate": work / ours / rate,
    }


def samples(sequences: int, longest: int, vocabulary: int) -> tuple[dict, Batch]:
    """The same random samples padded, as transformers takes them, and packed; their lengths are evenly spread."""
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
    return padded, packed


def our_loss(model, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """Mean masked-LM loss plus mean next-sentence loss, as transformers adds them."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = pretraining_loss(model, batch, torch.randint(2**62, ()))
    return loss.masked_lm / loss.masked + loss.next_sentence / loss.pairs


def their_loss(model, padded: dict, dtype: torch.dtype) -> torch.Tensor:
    """The loss that transformers computes."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model(**padded).loss


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
