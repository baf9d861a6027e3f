"""Predict time and memory of a pre-training step on 1 to 512 GPUs from stated assumptions, for docs/SCALING.md.

    python -m bench.end_to_end.scaling_model [--check]

It writes the part of docs/SCALING.md between two comments; `--check` only compares: the exit status is 1 if the page is
not what the program gives. Nothing was measured on a GPU: FLOPs, bytes and memory follow from the code, rates are
assumed. The gradients of a layer are ready when its backward pass ends, those of the token embedding at the end of the
whole one, because it is also the matrix of the head. DistributedDataParallel sends buckets of gradients, one after the
other, while the backward pass goes on; FSDP2 gathers the parameters of a layer while the layer before it runs.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.bounds import ADAMW_BYTES
from bench.page.text import table
from bench.result_files import ROOT
from bench.sass_model.constants import GEMM_FLOPS, H200
from bertfast import BertForPreTraining, preset_config
from bertfast.architectures.presets import Preset
from bertfast.training.flops import encoder_flops, head_flops
from bertfast.training.memory_estimate import MemoryEstimate, estimate_memory

PAGE = ROOT / "docs" / "SCALING.md"
BEGIN = "<!-- `python -m bench.end_to_end.scaling_model` writes from here -->"
END = "<!-- to here -->"

EFFICIENCY = 0.6  # share of GEMM_FLOPS that forward and backward pass reach
GPUS_PER_NODE = 8
LINK_SHARE = 0.8  # share of a link's bandwidth that collectives reach
NVLINK = 450e9  # bytes/s per GPU and direction: NVLink 4
NETWORKS = {"InfiniBand": 50e9, "Ethernet": 100e9 / 8 / GPUS_PER_NODE}  # bytes/s per GPU
COLLECTIVE_LATENCY, HOP_LATENCY = 20e-6, 5e-6  # seconds to start a collective, and per level of a tree over nodes
BUCKET = 25 << 20  # bytes: DistributedDataParallel's default
LENGTH, MASKED = 128, 0.15
PASS_TOKENS = 32_768  # at most, per GPU and pass
GLOBAL_TOKENS = 1 << 20  # per step, if the batch is to stay the same
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PRESETS: tuple[Preset, ...] = ("base", "large")


@dataclass(frozen=True)
class Model:
    """What a step of a model consists of.

    Attributes:
        parameters: Number of parameters.
        of_layer: Number of those of a layer.
        layers: Number of layers.
        layer_s, head_s: Seconds of the forward pass of a layer and of the head, for one token; times two backward.
    """

    parameters: int
    of_layer: int
    layers: int
    layer_s: float
    head_s: float

    @classmethod
    def of(cls, preset: Preset) -> Model:
        """Return the model of a published size."""
        config = preset_config(preset)
        with torch.device("meta"):
            model = BertForPreTraining(config)
        rate = EFFICIENCY * GEMM_FLOPS
        return cls(
            sum(parameter.numel() for parameter in model.parameters()),
            sum(parameter.numel() for parameter in model.bert.encoder.layer[0].parameters()),
            config.num_hidden_layers,
            encoder_flops(config, [LENGTH]) / LENGTH / config.num_hidden_layers / rate,
            head_flops(config, round(LENGTH * MASKED)) / LENGTH / rate,
        )

    def forward_s(self, tokens: int) -> float:
        """Return the seconds of a forward pass."""
        return tokens * (self.layers * self.layer_s + self.head_s)

    def update_s(self, ranks: int = 1) -> float:
        """Return the seconds of an AdamW update of the share of one of `ranks` GPUs."""
        return ADAMW_BYTES * self.parameters / ranks / H200.copy_bandwidth


def nodes_of(gpus: int) -> tuple[int, int]:
    """Return the GPUs of a node and the number of nodes."""
    per_node = min(gpus, GPUS_PER_NODE)
    return per_node, gpus // per_node


def gather_s(size: float, gpus: int, network: float) -> float:
    """Return the seconds in which every GPU gets all of `size` bytes, of which each has a part.

    Reducing them to parts takes as long. Each GPU of a node gets another share from the other nodes, then the GPUs of a
    node exchange their shares; the one does not overlap with the other.
    """
    if gpus == 1:
        return 0.0
    per_node, nodes = nodes_of(gpus)
    between = size / per_node * (nodes - 1) / nodes / (LINK_SHARE * network)
    within = size * (per_node - 1) / per_node / (LINK_SHARE * NVLINK)
    return between + within + COLLECTIVE_LATENCY + math.log2(nodes) * HOP_LATENCY


def all_reduce_s(size: float, gpus: int, network: float) -> float:
    """Return the seconds of the sum of `size` bytes over all GPUs, which is reduced to parts and gathered."""
    return max(2 * gather_s(size, gpus, network) - COLLECTIVE_LATENCY, 0.0)  # it is one collective


def buckets_of(model: Model, tokens: int) -> list[tuple[float, int]]:
    """Return the buckets of gradients in the order in which they are ready, as (seconds since the pass began, bytes).

    Args:
        model: The model.
        tokens: Tokens of the pass.
    """
    started = model.forward_s(tokens) + 2 * tokens * model.head_s
    ready = [(started + 2 * tokens * model.layer_s * (n + 1), 4 * model.of_layer) for n in range(model.layers)]
    ready.append((ready[-1][0], 4 * (model.parameters - model.layers * model.of_layer)))  # embeddings and head
    buckets, filled = [], 0
    for moment, size in ready:
        filled += size
        while filled >= BUCKET:
            buckets.append((moment, BUCKET))
            filled -= BUCKET
    return [*buckets, (ready[-1][0], filled)] if filled else buckets


def step_s(model: Model, tokens: int, passes: int, gpus: int, network: float) -> float:
    """Return the seconds of a step with a whole model on each GPU.

    Args:
        model: The model.
        tokens: Tokens of a GPU per pass.
        passes: Passes of a step; gradients are summed over GPUs in the last one.
        gpus: Number of GPUs.
        network: Bytes/s per GPU between nodes.
    """
    computed, communicated = 3 * model.forward_s(tokens), 0.0
    for ready, size in buckets_of(model, tokens):
        communicated = max(ready, communicated) + all_reduce_s(size, gpus, network)
    return (passes - 1) * computed + max(computed, communicated) + model.update_s()


def sharded_step_s(model: Model, tokens: int, passes: int, gpus: int, network: float) -> float:
    """Return the seconds of a step with a part of each parameter on each GPU; arguments as in `step_s`."""
    layer = gather_s(4 * model.of_layer, gpus, network)
    rest = gather_s(4 * (model.parameters - model.layers * model.of_layer), gpus, network)
    forward, backward = tokens * model.layer_s, 2 * tokens * model.layer_s
    # The embeddings are gathered first, and nothing runs meanwhile; each layer while the one before it runs.
    one_pass = rest + layer + (model.layers - 1) * max(forward, layer) + forward + 3 * tokens * model.head_s
    last = one_pass + model.layers * max(backward, 2 * layer) + rest  # gathers a layer, and reduces the one before
    earlier = one_pass + model.layers * max(backward, layer)
    return (passes - 1) * earlier + last + model.update_s(gpus)


def memory_of(preset: Preset, tokens: int, ranks: int) -> MemoryEstimate:
    """Return the estimated memory of a GPU in bf16 with AdamW; `ranks` GPUs share the parameters."""
    config = preset_config(preset)
    with torch.device("meta"):
        model = BertForPreTraining(config)
    return estimate_memory(
        model, config, optimizer="adamw", precision="bf16", tokens=tokens, checkpointed=0, ranks=ranks
    )


def share_of(gpus: int, same_batch: bool) -> tuple[int, int]:
    """Return the tokens of a GPU per pass and the passes of a step.

    Args:
        gpus: Number of GPUs.
        same_batch: Whether a step has GLOBAL_TOKENS on any number of GPUs; else each GPU has PASS_TOKENS.
    """
    if not same_batch:
        return PASS_TOKENS, 1
    tokens = GLOBAL_TOKENS // gpus
    passes = max(tokens // PASS_TOKENS, 1)
    return tokens // passes, passes


def rows_of(preset: Preset, same_batch: bool) -> list[list[str]]:
    """Return the rows of a table."""
    model, rows = Model.of(preset), []
    alone = step_s(model, *share_of(1, same_batch), 1, math.inf)
    for gpus in GPUS:
        tokens, passes = share_of(gpus, same_batch)
        ideal = alone / gpus if same_batch else alone
        times = [step_s(model, tokens, passes, gpus, network) for network in NETWORKS.values()]
        times.append(sharded_step_s(model, tokens, passes, gpus, NETWORKS["InfiniBand"]))
        memory = [memory_of(preset, tokens, ranks).total for ranks in (1, gpus)]
        rows.append(
            [
                f"{gpus}",
                f"{tokens:,} x {passes}",
                *(f"{1e3 * seconds:.1f} ({ideal / seconds:.0%})" for seconds in times),
                f"{sent_gb(model, gpus, 8):.2f} / {sent_gb(model, gpus, 8 * passes + 4):.2f}",
                " / ".join(f"{size / 1e9:.1f}" for size in memory),
            ]
        )
    return rows


def sent_gb(model: Model, gpus: int, factor: int) -> float:
    """Return the GB that a GPU sends per step: 8 N (n - 1) / n replicated, (8 passes + 4) N (n - 1) / n sharded."""
    return factor * model.parameters * (gpus - 1) / gpus / 1e9


ASSUMPTIONS = [
    ["bf16 GEMMs of an H200, TFLOP/s (`bench/LOG.md`)", f"{GEMM_FLOPS / 1e12:.0f}"],
    ["share of it that forward and backward pass reach", f"{EFFICIENCY:.0%}"],
    ["copies in device memory, TB/s, for the update (AdamW, 28 bytes per parameter)", f"{H200.copy_bandwidth / 1e12}"],
    ["GPUs of a node", f"{GPUS_PER_NODE}"],
    ["NVLink, GB/s per GPU and direction", f"{NVLINK / 1e9:.0f}"],
    ["InfiniBand, GB/s per GPU (400 Gb/s each)", f"{NETWORKS['InfiniBand'] / 1e9:.0f}"],
    ["Ethernet, GB/s per GPU (100 Gb/s per node)", f"{NETWORKS['Ethernet'] / 1e9:.2f}"],
    ["share of a link's bandwidth that collectives reach", f"{LINK_SHARE:.0%}"],
    ["latency of a collective, µs, and of each level of a tree over nodes", "20, 5"],
    ["gradients per collective, MiB", f"{BUCKET >> 20}"],
    ["sequences", f"{LENGTH} tokens each, {MASKED:.0%} masked"],
]

INTRODUCTION = """\
The tables are predictions by `bench/end_to_end/scaling_model.py`; nothing was measured on a GPU. FLOPs, bytes and
memory follow from the code (`training/flops.py`, `training/memory_estimate.py`), rates are assumed:

{assumptions}

Times are in ms, in brackets the efficiency, which is the throughput relative to that of as many single GPUs with the
same work; sharded, it can exceed 100 %, because each GPU updates its part only. Gradients are sent while the backward
pass goes on, but those of the token embedding only after it, since it is also the matrix of the head. Communication
is assumed not to slow down GEMMs, all GPUs to be equally fast, batches to be ready in time, and GEMMs of few tokens
to be as efficient as those of many, so the rows of many GPUs that share one batch are optimistic. What a process
sends is 8 N (n - 1) / n bytes per step with N parameters in fp32 and n processes, for the mean of the gradients, and
(8 p + 4) N (n - 1) / n with `--shard` and p passes: two gathers in each, and one reduce-scatter.
"""


def section() -> str:
    """Return the part of the page that this program writes."""
    parts = [INTRODUCTION.format(assumptions=table(["assumption", "value"], ASSUMPTIONS))]
    titles = {
        False: f"each GPU takes {PASS_TOKENS:,} tokens per step",
        True: f"a step has {GLOBAL_TOKENS:,} tokens on any number of GPUs",
    }
    columns = ["GPUs", "tokens of a GPU x passes", *(f"step, {name}" for name in NETWORKS), "sharded, InfiniBand"]
    columns += ["sent in GB / sharded", "memory in GB / sharded"]
    for same_batch, title in titles.items():
        for preset in PRESETS:
            parts.append(f"`{preset}`, {title}:\n\n{table(columns, rows_of(preset, same_batch))}\n")
    return "\n".join(parts)


def updated(page: str) -> str:
    """Return the page with the part that this program writes.

    Raises:
        ValueError: The page lacks the comments around it.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"docs/SCALING.md lacks {BEGIN} or, after it, {END}")
    return f"{before}{BEGIN}\n\n{section()}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare the page with what the program gives")
    check = parser.parse_args(arguments).check
    page = PAGE.read_text(encoding="utf-8")
    text = updated(page)
    if check and text != page:
        sys.exit("docs/SCALING.md is not what the program gives: run `python -m bench.end_to_end.scaling_model`")
    if not check:
        PAGE.write_text(text, encoding="utf-8")
        print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
