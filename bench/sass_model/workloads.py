"""What a pre-training step and its embeddings and loss launch, recorded from the code that runs them.

A step of BERT's base model with dropout, on 32,768 tokens in sequences of one length, 15 % of them masked, in bf16 with
fp32 parameters, AdamW and clipping, as `bertfast pretrain` captures it in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.sass_model.cases import TOKENS, matmul_flop
from bench.sass_model.trace import Call, recording
from bench.sass_model.training_cases import HIDDEN, LENGTH, POSITIONS, VOCAB
from bertfast import ops, preset_config
from bertfast.data.batches import Batch
from bertfast.models.families import pretraining_class
from bertfast.ops.sequences import Sequences
from bertfast.training.distributed import Distributed
from bertfast.training.flops import training_flops
from bertfast.training.initial_model import train_in_part
from bertfast.training.optimizer import build_optimizers
from bertfast.training.step import Objective, TrainStep

STEP = "pre-training step"
LOSS_ROWS = 5_000
MASKED_SHARE = 0.15
LAYERS = 12


@dataclass(frozen=True)
class Workload:
    """Something that a step does, or a step.

    Attributes:
        name: What the table calls it.
        case: What the table says about its size.
        calls: What it launches.
        flop: FLOP of its GEMMs and of attention, without what is computed twice, as `training/flops.py` counts them:
            of a step, as if the last layer computed all tokens; 0: it has none.
        length: Tokens of a sequence.
        stream: Precision of the residual stream, "fp32" or "bf16".
        attention: What `flop` has of attention, whose matmuls are not among the calls.
    """

    name: str
    case: str
    calls: list[Call]
    flop: float = 0.0
    length: int = LENGTH
    stream: str = "bf16"
    attention: float = 0.0

    @property
    def executed(self) -> float:
        """FLOP of the recorded GEMMs and of attention: a step's last layer computes the masked tokens only."""
        if not self.flop:
            return 0.0
        return self.attention + sum(
            2.0 * call.gemm[0] * call.gemm[1] * call.gemm[2] for call in self.calls if call.gemm
        )


def workloads() -> Iterator[Workload]:
    """Yield all workloads."""
    for stream, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        yield Workload(
            "embeddings_backward", f"{TOKENS:,} tokens, {stream}", _embeddings_backward(dtype), stream=stream
        )
    flop = 6.0 * LOSS_ROWS * HIDDEN * VOCAB
    yield Workload("linear_cross_entropy", f"{LOSS_ROWS:,} x {HIDDEN} x {VOCAB:,}", _linear_cross_entropy(), flop)
    for length in (128, 512):
        for stream in ("fp32", "bf16"):
            calls, flop = training_step(length, TOKENS, torch.bfloat16 if stream == "bf16" else None)
            attention = 3 * LAYERS * matmul_flop(length, None) * 2
            yield Workload(STEP, f"length {length}, {stream} stream", calls, flop, length, stream, attention)


def _integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64)


def _embeddings_backward(dtype: torch.dtype) -> list[Call]:
    """Return what the gradients of embeddings launch."""
    with recording() as calls:
        d_y, word = torch.empty(TOKENS, HIDDEN, dtype=dtype), torch.empty(VOCAB, HIDDEN, dtype=dtype)
        position, types = torch.empty(POSITIONS, HIDDEN, dtype=dtype), torch.empty(2, HIDDEN, dtype=dtype)
        ids, seed, statistics, gamma = _integers(TOKENS), _integers(), torch.empty(TOKENS), torch.empty(HIDDEN)
        calls.clear()
        torch.ops.bertfast.triton_embeddings_backward(
            d_y, word, position, types, ids, ids, ids, gamma, statistics, statistics, 0, seed, ids, ids, 256, 26
        )
    return calls


def _linear_cross_entropy() -> list[Call]:
    """Return what the loss of rows that all have a label launches, gradients included."""
    with recording() as calls:
        hidden = torch.empty(LOSS_ROWS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(VOCAB, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        bias, labels = torch.empty(VOCAB, requires_grad=True), _integers(LOSS_ROWS)
        calls.clear()
        loss, *_ = ops.linear_cross_entropy(hidden, None, weight, bias, labels)
        torch.autograd.backward(loss)
    return calls


def training_step(
    length: int, tokens: int, residual_dtype: torch.dtype | None, layers: int = LAYERS
) -> tuple[list[Call], int]:
    """Return what a step of the base model launches, and its FLOP.

    Args:
        length: Tokens of each sequence.
        tokens: Tokens of the step.
        residual_dtype: dtype of the residual stream; None: fp32.
        layers: Layers of the model.
    """
    config = preset_config("base", num_hidden_layers=layers)
    with torch.device("meta"):
        model = pretraining_class(config)(config)
    model.to_empty(device="cpu")  # memory that is never touched
    model.tie_weights()
    train_in_part(model.train(), pairs=False, checkpoint_layers=0)
    masked, device = round(MASKED_SHARE * tokens), torch.device("cpu")
    with recording() as calls:
        sequences = Sequences(
            torch.empty(tokens // length + 1, dtype=torch.int32), _integers(tokens // length), tokens, length
        )
        ids, rows = _integers(tokens), _integers(masked)
        batch = Batch(ids, ids, ids, sequences, rows, rows, None, masked)
        step = TrainStep(
            Objective(model, residual_dtype),
            build_optimizers(model, "adamw", 1e-4, 0.01),
            Distributed(0, 1, device),
            precision="bf16",
            seed=_integers(),
            max_grad_norm=1.0,
            capture=lambda function: (function(), lambda: None),
        )
        for _ in range(2):  # the first step also creates gradients and the optimizer's state
            calls.clear()
            step.gradients([batch], masked, 1)
            step.update(1e-4)
    return calls, training_flops(config, [length] * (tokens // length), masked)
