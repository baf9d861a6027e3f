"""Time the encoders of all families with and without `patch`, on batches of texts in file order.

    python -m bench.end_to_end.families [FAMILY …] [--rounds N] [--data FOLDER] [--results FOLDER]

Models have the base size of their family and random weights. Both run alternately, without gradients, after their
outputs at tokens have been compared. The lower bound is that of `bench.bounds`, at the throughput of the encoder's own
GEMMs, measured in the same run; windows count the keys inside them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import bertfast
from bench.arguments import DATA, add_names, at_least_one, result_parser
from bench.bounds import Rates
from bench.end_to_end.inference import random_ids, token_ids
from bench.end_to_end.runtimes import padded
from bench.harness import DEVICE, seconds_of, side_by_side
from bench.result_files import require_clean_tree, write_result
from bertfast.architectures import FAMILIES, family
from bertfast.runtime.precision import has_bf16_gemm

BATCH = 32
# Where transformers' defaults are not those of the family's base size.
SIZES = {
    "electra": {"embedding_size": 768, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "eurobert": {"num_key_value_heads": 12},  # the published model of 210 M parameters has 12 layers of BERT's width
}
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}  # of the outputs at tokens, relative to their norm


def main() -> None:
    parser = result_parser(__doc__)
    add_names(parser, "families", "family", FAMILIES, default=list(FAMILIES))
    parser.add_argument("--rounds", type=at_least_one, default=5, help="rounds of each case")
    parser.add_argument("--data", type=type(DATA), default=DATA, help="folder of the data")
    arguments = parser.parse_args()
    require_clean_tree(arguments.results)
    texts = {
        "32 sentences of SST-2": token_ids("sst2", BATCH, arguments.data),
        "32 paragraphs of SQuAD": token_ids("squad", BATCH, arguments.data),
    }
    even = {
        "8 texts of 256 to 1,024 tokens": [random_ids(length) for length in range(256, 1025, 109)][:8],
        "4 texts of 1,024 tokens": [random_ids(1024) for _ in range(4)],
    }
    precisions = ["fp32", "bf16"] if has_bf16_gemm(DEVICE) else ["fp32"]
    for name in arguments.families:
        cases = texts | even if name == "modernbert" else texts
        found = {
            precision: {case: measure(name, precision, ids, arguments.rounds) for case, ids in cases.items()}
            for precision in precisions
        }
        print(
            f"written to {write_result(f'families-{name}', {'family': name, 'precisions': found}, arguments.results)}"
        )


@torch.no_grad()
def measure(name: str, precision: str, ids: list[list[int]], rounds: int) -> dict[str, Any]:
    """Time a family's encoder with and without `patch` on one padded batch."""
    plain = base_model(name).to(torch.float32 if precision == "fp32" else torch.bfloat16)
    patched = copy.deepcopy(plain)
    bertfast.patch(patched)
    inputs = {key: x for key, x in padded(ids).items() if key != "token_type_ids"}
    found, expected = (at_tokens(model, inputs) for model in (patched, plain))
    error = float((found - expected).norm() / expected.norm())
    if not error <= TOLERANCE[precision]:
        raise SystemExit(f"{name}, {precision}: the outputs differ by {error}, so nothing is timed")
    calls = {"patched_s": partial(patched, **inputs), "plain_s": partial(plain, **inputs)}
    timed = side_by_side(calls, rounds)
    lengths = [len(each) for each in ids]
    config: Any = plain.config
    weight = next(plain.parameters())
    rates = Rates.measured(config, sum(lengths), weight.dtype)
    bound = rates.inference(config, [lengths], weight.itemsize)
    seconds = {key: seconds_of(samples) for key, samples in timed.items()}
    best = {key: sorted(values)[len(values) // 2] for key, values in seconds.items()}
    ratio = best["plain_s"] / best["patched_s"]
    print(f"{name}, {precision}, {lengths[:3]}…: {best['patched_s']:.3f} s, {ratio:.2f} x", flush=True)
    return {**seconds, "lengths": lengths, "lower_bound_s": bound, **rates.entries(), "relative_error": error}


def base_model(name: str) -> nn.Module:
    """Return a family's encoder of base size with random weights, in evaluation mode."""
    architecture = family(name)
    config = getattr(transformers, f"{architecture.prefix}Config")(attn_implementation="sdpa", **SIZES.get(name, {}))
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{architecture.prefix}Model")(config)
    return model.eval()


def at_tokens(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return a model's hidden states at the tokens of a padded batch, [T, H] in fp32."""
    hidden: Tensor = model(**inputs).last_hidden_state
    return hidden[inputs["attention_mask"].bool()].float()


if __name__ == "__main__":
    main()
