"""`attention` beside what PyTorch has: variable-length and padded scaled-dot-product attention, and FlexAttention.

Their queries, keys and values are three tensors already, padded where they want it; ours are one. Attention that has
no dropout stands beside ours without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from contest import DTYPE, OURS, Case, Contender, Work, compiled, definition, dropout_over, needs_gpu, normal
from harness import DEVICE
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bertfast import ops, reference
from bertfast.sequences import Sequences


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """Sequences of the given lengths, `heads` of `dimension`."""

    label: str
    lengths: tuple[int, ...]
    heads: int = 12
    dimension: int = 64

    def __str__(self) -> str:
        return f"{self.label}-d{self.dimension}" + (f"-p{self.dropout}" if self.dropout else "")

    @cached_property
    def sequences(self) -> Sequences:
        """Which token belongs to which sequence."""
        return Sequences.from_lengths(self.lengths, device=DEVICE)

    @cached_property
    def places(self) -> Tensor:
        """int64 [T]: each token's row in the padded batch."""
        return self.sequences.token_index * self.sequences.longest + self.sequences.position

    @cached_property
    def mask(self) -> Tensor | None:
        """Bool [sequences, 1, 1, longest], where there is a key; None if there is one everywhere."""
        longest = self.sequences.longest
        lengths = torch.tensor(self.lengths, device=DEVICE)
        attended = torch.arange(longest, device=DEVICE) < lengths[:, None]
        return None if min(self.lengths) == longest else attended[:, None, None]

    def inputs(self, generator):
        return [normal(generator, sum(self.lengths), 3, self.heads, self.dimension)]

    def definition(self, qkv):
        dropout = dropout_over(self.sequences, self.dropout, "attention")
        return reference.attention(qkv, self.sequences, 1 / math.sqrt(self.dimension), False, None, dropout)

    def work(self, direction):
        products = 4 * self.dimension * self.heads * sum(length**2 for length in self.lengths)
        activation = sum(self.lengths) * self.heads * self.dimension * DTYPE.itemsize
        if direction == "forward":  # reads qkv, writes the output
            return Work(4 * activation, products)
        return Work(8 * activation, 5 * products // 2)  # reads qkv, the output and its gradient, writes d_qkv


def ours(case: AttentionCase):
    dropout = dropout_over(case.sequences, case.dropout, "attention")
    return lambda qkv: ops.attention(qkv, case.sequences, dropout=dropout, implementation=OURS)


def padded(case: AttentionCase, function: Callable[..., Tensor]) -> Contender:
    """A function of queries, keys and values, each [sequences, heads, longest, D]."""
    rows, longest = len(case.lengths) * case.sequences.longest, case.sequences.longest

    def enter(qkv: Tensor) -> Sequence[Tensor]:
        batch = qkv.new_zeros(rows, *qkv.shape[1:]).index_copy(0, case.places, qkv).unflatten(0, (-1, longest))
        return [x.contiguous().transpose(1, 2) for x in batch.unbind(2)]

    return Contender(function, enter, lambda output: output.transpose(1, 2).flatten(0, 1)[case.places])


def plain(case: AttentionCase) -> Contender:
    mask = case.mask

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query @ key.mT).float() / math.sqrt(case.dimension)
        scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
        return F.dropout(scores.softmax(-1), case.dropout).to(value.dtype) @ value

    return padded(case, function)


def sdpa(backend: SDPBackend, case: AttentionCase) -> Contender:
    mask = case.mask

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, mask, case.dropout)

    return padded(case, function)


def varlen(case: AttentionCase) -> Contender:
    needs_gpu("varlen_attn")
    _without_dropout(case, "varlen_attn")
    varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn
    starts, longest = case.sequences.cu_seqlens, case.sequences.longest
    return Contender(
        lambda query, key, value: varlen_attn(query, key, value, starts, starts, longest, longest),
        lambda qkv: [x.contiguous() for x in qkv.unbind(1)],
    )


def flex(case: AttentionCase) -> Contender:
    _without_dropout(case, "FlexAttention")
    document = case.sequences.token_index
    mask = create_block_mask(
        lambda _batch, _head, query, key: document[query] == document[key],
        B=None,
        H=None,
        Q_LEN=len(document),
        KV_LEN=len(document),
        device=DEVICE,
    )
    return Contender(
        lambda query, key, value: flex_attention(query, key, value, block_mask=mask),
        lambda qkv: [x.contiguous().transpose(0, 1)[None] for x in qkv.unbind(1)],
        lambda output: output[0].transpose(0, 1),
    )


def _without_dropout(case: AttentionCase, name: str) -> None:
    if case.dropout:
        pytest.skip(f"{name} has no dropout")


EQUAL = {length: (length,) * (32_768 // length) for length in (128, 512, 2048)}
MIXED = tuple(torch.linspace(128, 512, 102).round().int().tolist())
CASES = {
    "small": [AttentionCase(label="mixed", lengths=(40, 33, 7), heads=2, dimension=32, dropout=p) for p in (0.0, 0.1)],
    "main": [
        AttentionCase(label="512", lengths=EQUAL[512]),
        AttentionCase(label="512", lengths=EQUAL[512], dropout=0.1),
        AttentionCase(label="128", lengths=EQUAL[128]),
        AttentionCase(label="2048", lengths=EQUAL[2048]),
    ],
    "rest": [
        AttentionCase(label="mixed", lengths=MIXED),
        AttentionCase(label="mixed", lengths=MIXED, dropout=0.1),
        AttentionCase(label="128", lengths=EQUAL[128], dropout=0.1),
        AttentionCase(label="512", lengths=EQUAL[512], heads=6, dimension=128),
        AttentionCase(label="512", lengths=EQUAL[512], heads=24, dimension=32),
        AttentionCase(label="2048", lengths=EQUAL[2048], dropout=0.1),
    ],
}
PROVIDERS = {
    "bertfast": ours,
    "definition": definition,
    "varlen_attn": varlen,
    "sdpa-flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa-efficient": partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "flex": compiled(flex),
    "torch.compile": compiled(plain),
}


def test_attention(measure):
    measure()
