"""`attention` vs PyTorch: variable-length and padded scaled-dot-product attention, and FlexAttention.

PyTorch's functions get queries, keys and values as three tensors, padded where required; bertfast's operator gets one
packed tensor. Implementations without dropout run only in cases without it. On a CPU, bertfast with dropout is also
compared with bertfast without, and bertfast with a sliding window with full attention.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import import_module
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.cases import (
    BACKEND,
    PREDICTED_TOKENS,
    Case,
    Factory,
    Function,
    Implementation,
    Work,
    compiled,
    definition,
    dropout_over,
    in_both_precisions,
    in_cuda,
    require_gpu,
)
from bench.harness import DEVICE, ON_GPU
from bertfast import ops
from bertfast.ops import reference, reference_parts
from bertfast.ops.dispatch import Implementation as Backend
from bertfast.ops.sequences import Sequences


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """Sequences of the given lengths, with `heads` heads of `dimension`."""

    label: str
    lengths: tuple[int, ...]
    heads: int = 12
    dimension: int = 64
    window: int | None = None

    @property
    def size(self) -> str:
        return f"{self.label}-d{self.dimension}" + (f"-w{self.window}" if self.window is not None else "")

    @property
    def predicted_case(self) -> str | None:
        is_predicted = self.dtype == torch.bfloat16 and abs(sum(self.lengths) - PREDICTED_TOKENS) < 300
        if not is_predicted:
            return None
        shortest, longest = min(self.lengths), max(self.lengths)
        name = f"length {longest:,}" if shortest == longest else f"lengths {shortest} to {longest:,}"
        name += ", dropout" * bool(self.dropout) + (f", window {self.window}" if self.window is not None else "")
        return name + (f", {self.heads} heads of {self.dimension}" if self.dimension != 64 else "")

    @cached_property
    def sequences(self) -> Sequences:
        """The sequences of the packed tokens."""
        return Sequences.from_lengths(self.lengths, device=DEVICE)

    @cached_property
    def padded_index(self) -> Tensor:
        """Row of each token in the flattened padded batch, int64 [T]."""
        return self.sequences.sequence_index * self.sequences.max_seqlen + self.sequences.position

    @cached_property
    def mask(self) -> Tensor | None:
        """Which keys are attended to, bool [sequences or 1, 1, max_seqlen or 1, max_seqlen]; None if all are."""
        max_seqlen = self.sequences.max_seqlen
        lengths = torch.tensor(self.lengths, device=DEVICE)
        present = (torch.arange(max_seqlen, device=DEVICE) < lengths[:, None])[:, None, None]
        outside = reference_parts.not_attended(max_seqlen, False, self.window, DEVICE)
        if outside is not None:
            return present & ~outside
        return None if min(self.lengths) == max_seqlen else present

    @property
    def pairs(self) -> int:
        """Number of pairs of a query and a key that it attends to."""
        reach = [length - 1 if self.window is None else min(self.window, length - 1) for length in self.lengths]
        return sum((2 * w + 1) * length - w * (w + 1) for w, length in zip(reach, self.lengths, strict=True))

    def inputs(self, generator: torch.Generator) -> list[Tensor]:
        return [self.normal(generator, sum(self.lengths), 3, self.heads, self.dimension)]

    def definition(self, qkv: Tensor) -> Tensor:
        dropout = dropout_over(self.sequences, self.dropout, "attention")
        return reference.attention(qkv, self.sequences, 1 / math.sqrt(self.dimension), False, self.window, dropout)

    def work(self, direction: str) -> Work:
        flops = 4 * self.dimension * self.heads * self.pairs
        activation = sum(self.lengths) * self.heads * self.dimension * self.dtype.itemsize
        if direction == "forward":  # reads qkv, writes the output
            return Work(4 * activation, flops)
        return Work(8 * activation, 5 * flops // 2)  # reads qkv, the output and its gradient, writes d_qkv


def fused(case: AttentionCase, implementation: Backend | None = BACKEND) -> Function:
    dropout = dropout_over(case.sequences, case.dropout, "attention")
    return lambda qkv: ops.attention(
        qkv, case.sequences, window=case.window, dropout=dropout, implementation=implementation
    )


def fused_without_dropout(case: AttentionCase) -> Implementation:
    if not case.dropout:
        pytest.skip("the case has no dropout")
    return Implementation(fused(replace(case, dropout=0.0)), checked=False)


def fused_without_window(case: AttentionCase) -> Implementation:
    if case.window is None:
        pytest.skip("the case has no window")
    return Implementation(fused(replace(case, window=None)), checked=False)


def padded(case: AttentionCase, function: Callable[..., Tensor]) -> Implementation:
    """Make an implementation of a function of queries, keys and values, each [sequences, heads, max_seqlen, D]."""
    rows, max_seqlen = len(case.lengths) * case.sequences.max_seqlen, case.sequences.max_seqlen

    def enter(qkv: Tensor) -> Sequence[Tensor]:
        batch = qkv.new_zeros(rows, *qkv.shape[1:]).index_copy(0, case.padded_index, qkv).unflatten(0, (-1, max_seqlen))
        return [x.contiguous().transpose(1, 2) for x in batch.unbind(2)]

    return Implementation(function, enter, lambda output: output.transpose(1, 2).flatten(0, 1)[case.padded_index])


def plain(case: AttentionCase) -> Implementation:
    mask = case.mask

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query @ key.mT).float() / math.sqrt(case.dimension)
        scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
        return F.dropout(scores.softmax(-1), case.dropout).to(value.dtype) @ value

    return padded(case, function)


def sdpa(backend: SDPBackend | None, case: AttentionCase) -> Implementation:
    """Make PyTorch's attention with a given backend, or with its default (None)."""
    mask = case.mask

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
            return F.scaled_dot_product_attention(query, key, value, mask, case.dropout)

    return padded(case, function)


def sdpa_loop(case: AttentionCase) -> Implementation:
    """Make PyTorch's attention in a loop over the sequences, without padding."""
    _only_full(case, "sdpa-loop", dropout=True)

    def function(*parts: Tensor) -> Tensor:
        outputs = [
            F.scaled_dot_product_attention(q, k, v, dropout_p=case.dropout)[0]
            for q, k, v in (part.transpose(1, 2)[:, None] for part in parts)
        ]
        return torch.cat(outputs, 1).transpose(0, 1)

    def enter(qkv: Tensor) -> Sequence[Tensor]:
        return [part.transpose(0, 1).contiguous() for part in qkv.split(case.lengths)]

    return Implementation(function, enter)


def varlen(case: AttentionCase) -> Implementation:
    require_gpu("varlen_attn", "PyTorch has no CPU kernel for it")
    _only_full(case, "varlen_attn")
    varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn
    starts, max_seqlen = case.sequences.cu_seqlens, case.sequences.max_seqlen
    return Implementation(
        lambda query, key, value: varlen_attn(query, key, value, starts, starts, max_seqlen, max_seqlen),
        lambda qkv: [x.contiguous() for x in qkv.unbind(1)],
    )


def flex(case: AttentionCase) -> Implementation:
    _only_full(case, "FlexAttention")
    document = case.sequences.sequence_index
    mask = create_block_mask(
        lambda _batch, _head, query, key: document[query] == document[key],
        B=None,
        H=None,
        Q_LEN=len(document),
        KV_LEN=len(document),
        device=DEVICE,
    )
    return Implementation(
        lambda query, key, value: flex_attention(query, key, value, block_mask=mask),
        lambda qkv: [x.contiguous().transpose(0, 1)[None] for x in qkv.unbind(1)],
        lambda output: output[0].transpose(0, 1),
    )


def _only_full(case: AttentionCase, name: str, dropout: bool = False) -> None:
    """Skip an implementation in a case with a window, or with dropout unless it has that."""
    if case.dropout and not dropout:
        pytest.skip(f"{name} has no dropout")
    if case.window is not None:
        pytest.skip(f"{name} is compared without a window only")


EQUAL = {length: (length,) * (32_768 // length) for length in (128, 300, 512, 2048)}
# Lengths distributed as in texts: lognormal with mean 128, at most 512.
RAGGED = tuple(min(round(math.exp(NormalDist(4.61, 0.7).inv_cdf((i + 0.5) / 64))), 512) for i in range(64))
ON_CPU = {"8x512": (512,) * 8, "32x128": (128,) * 32, "64-ragged": RAGGED}
MIXED = tuple(torch.linspace(128, 512, 102).round().int().tolist())
SWEEP = tuple(range(4, 513, 4))  # as in `bench.sass_model.cases`
CASES = {
    "small": in_both_precisions(
        *(AttentionCase(label="mixed", lengths=(40, 33, 7), heads=2, dimension=32, dropout=p) for p in (0.0, 0.1)),
        AttentionCase(label="mixed", lengths=(40, 33, 7), heads=2, dimension=32, window=8),
    ),
    "cpu": in_both_precisions(
        *(
            AttentionCase(label=label, lengths=lengths, dropout=p)
            for label, lengths in ON_CPU.items()
            for p in (0.0, 0.1)
        ),
        *(AttentionCase(label="2x1024", lengths=(1024,) * 2, window=window) for window in (None, 64)),
    ),
    "main": [
        AttentionCase(label="512", lengths=EQUAL[512]),
        AttentionCase(label="512", lengths=EQUAL[512], dropout=0.1),
        AttentionCase(label="128", lengths=EQUAL[128]),
        AttentionCase(label="128", lengths=EQUAL[128], dropout=0.1),
        AttentionCase(label="2048", lengths=EQUAL[2048]),
        AttentionCase(label="2048", lengths=EQUAL[2048], dropout=0.1),
    ],
    "predicted": [
        *(AttentionCase(label="300", lengths=EQUAL[300], dropout=p) for p in (0.0, 0.1)),
        *(AttentionCase(label="4-to-512", lengths=SWEEP, dropout=p) for p in (0.0, 0.1)),
        *(AttentionCase(label="512", lengths=EQUAL[512], heads=6, dimension=128, dropout=p) for p in (0.0, 0.1)),
        AttentionCase(label="512", lengths=EQUAL[512], window=64),
    ],
    "rest": [
        AttentionCase(label="mixed", lengths=MIXED),
        AttentionCase(label="mixed", lengths=MIXED, dropout=0.1),
        AttentionCase(label="512", lengths=EQUAL[512], heads=24, dimension=32),
    ],
}
IMPLEMENTATIONS: dict[str, Factory] = {
    "bertfast": fused,
    **in_cuda(fused),
    "definition": definition,
    "varlen_attn": varlen,
    "sdpa-flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa-efficient": partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "flex": compiled(flex),
    "torch.compile": compiled(plain),
}
if not ON_GPU:
    IMPLEMENTATIONS |= {"sdpa": partial(sdpa, None), "sdpa-loop": sdpa_loop}
    IMPLEMENTATIONS |= {"bertfast-p0": fused_without_dropout, "bertfast-full": fused_without_window}


def test_attention(measure: Callable[[], None]) -> None:
    measure()
