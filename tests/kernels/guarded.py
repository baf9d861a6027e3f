"""Run one operation, forward and backward, on tensors that all end at a guard page.

    [TRITON_INTERPRET=1] python tests/kernels/guarded.py OPERATION

It crashes if a kernel accesses memory past the end of a tensor; `out_of_bounds` is a kernel that does.
`test_guard_pages.py` runs it.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import amx
from guard_page import GuardedMemory, guarded
from helpers import INTERPRETED, KERNELS, dropout_over, normal

from bertfast import ops
from bertfast.ops import native
from bertfast.ops.bias_gelu import LinearGelu
from bertfast.ops.dispatch import operator
from bertfast.ops.dropout import Dropout
from bertfast.ops.packed_linear import PackedWeight, pack, packed_linear, quantise
from bertfast.ops.sequences import Sequences

ROWS, HIDDEN = 5, 50  # neither is a multiple of a tile


def rows(columns: int = HIDDEN, count: int = ROWS, dtype: torch.dtype = torch.float32) -> Tensor:
    return guarded(normal(count, columns, dtype=dtype))


def vector(size: int = HIDDEN) -> Tensor:
    return guarded(normal(size, dtype=torch.float32))


def dropout(tokens: int = ROWS) -> Dropout:
    plain = dropout_over(Sequences.from_lengths([tokens]))
    return Dropout(plain.p, guarded(plain.seed), 5, guarded(plain.sequence_ids), guarded(plain.positions))


def attention(lengths: list[int]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        plain = Sequences.from_lengths(lengths, capacity=sum(lengths) + 2)
        cu_seqlens, sequence_ids = guarded(plain.cu_seqlens), guarded(plain.sequence_ids)
        sequences = Sequences(cu_seqlens, sequence_ids, plain.capacity, plain.max_seqlen_bound)
        qkv = guarded(normal(plain.capacity, 3, 1, 32, dtype=torch.bfloat16))
        return ops.attention(qkv, sequences, dropout=dropout(plain.capacity), implementation=KERNELS)

    return run


def add_layer_norm() -> Tensor:
    return ops.add_layer_norm(rows(), rows(), vector(), vector(), vector(), 1e-12, dropout(), implementation=KERNELS)


def add_layer_norm_pair() -> Tensor:
    return pair_sum(
        ops.add_layer_norm(
            rows(dtype=torch.bfloat16), rows(), vector(), vector(), vector(), 1e-12, dropout(),
            compute_dtype=torch.bfloat16, implementation=KERNELS,
        )
    )  # fmt: skip


def pair_sum(pair: tuple[Tensor, Tensor]) -> Tensor:
    """Return a weighted sum of an fp32 and a bf16 tensor, whose gradients end at guard pages."""
    weights = rows(), rows(dtype=torch.bfloat16)
    return Weighted.apply(pair[0], weights[0]) + Weighted.apply(pair[1], weights[1])


class Weighted(torch.autograd.Function):
    """The sum of x · weights as fp32, whose gradient is the tensor `weights` itself."""

    @staticmethod
    def forward(ctx, x, weights):
        ctx.save_for_backward(weights)
        return (x.float() * weights.float()).sum()

    @staticmethod
    def backward(ctx, d_sum):
        return ctx.saved_tensors[0], None


def bias_gelu() -> Tensor:
    return ops.bias_gelu(rows(), vector(), implementation=KERNELS)


def gated_activation() -> Tensor:
    return ops.gated_activation(rows(2 * HIDDEN), "gelu", vector(2 * HIDDEN), implementation=KERNELS)


def swiglu_without_bias() -> Tensor:
    return ops.gated_activation(rows(2 * HIDDEN), "silu", implementation=KERNELS)


def pre_norm() -> Tensor:
    return pair_sum(
        ops.pre_norm(
            rows(dtype=torch.bfloat16), rows(), vector(), vector(), vector(), 1e-12, dropout(),
            norm_dtype=torch.bfloat16, implementation=KERNELS,
        )
    )  # fmt: skip


def rms_norm_alone() -> Tensor:
    return ops.pre_norm(None, rows(), None, vector(), None, 1e-12, rms=True, implementation=KERNELS)[1]


def linear_gelu() -> Tensor:
    return LinearGelu.apply(rows(), rows(count=37), vector(37), "none")


def gelu_layer_norm() -> Tensor:
    return ops.gelu_layer_norm(rows(), vector(), vector(), vector(), 1e-12, implementation=KERNELS)


def embeddings() -> Tensor:
    ids = guarded(torch.tensor([6, 0, 6, 3, 1]))
    types = guarded(torch.tensor([0, 1, 1, 0, 1]))
    tables = rows(count=7), rows(count=8), rows(count=2)
    return ops.embeddings(ids, types, ids, *tables, vector(), vector(), 1e-12, dropout(), implementation=KERNELS)


def linear_cross_entropy() -> Tensor:
    read, labels = guarded(torch.tensor([4, 0, 2])), guarded(torch.tensor([36, -100, 0]))
    return ops.linear_cross_entropy(rows(), read, rows(count=37), vector(37), labels, implementation=KERNELS)[0]


def linear_cross_entropy_in_order() -> Tensor:
    labels = guarded(torch.tensor([36, -100, 0, 4, 8]))
    return ops.linear_cross_entropy(rows(), None, rows(count=37), vector(37), labels, implementation=KERNELS)[0]


def gather() -> Tensor:
    # Row 0 fills whole blocks of the sorted rows.
    indices = guarded(torch.tensor([4, 0, 2] + [0] * 98))
    return sum(y.sum() for y in ops.gather(indices, rows(), rows(), implementation="triton"))


def rotary() -> Tensor:
    qkv, table = (guarded(normal(*shape, dtype=torch.float32)) for shape in ((ROWS, 3, 2, 22), (ROWS, 22)))
    y = ops.rotary(qkv, table.detach(), implementation=KERNELS)
    return Weighted.apply(y, guarded(normal(*qkv.shape, dtype=torch.float32)))


def packed(make: Callable[..., PackedWeight], tokens: int = ROWS) -> Callable[[], Tensor]:
    """Return the operation on a weight that `make` packs; its result has no gradient, so that of a sum is taken."""

    def run() -> Tensor:
        plain = make(rows(count=37), vector(37))
        tensors = {name: guarded(x) for name, x in vars(plain).items() if isinstance(x, Tensor)}
        x = rows(count=tokens).detach()
        return packed_linear(x, replace(plain, **tensors), "gelu", implementation=KERNELS) + rows(37, tokens)

    return run


def quantised_with_factors(weight: Tensor, bias: Tensor) -> PackedWeight:
    return quantise(weight, bias, torch.full((HIDDEN,), 0.5))


def packed_int8_in_tiles() -> Tensor:
    with amx.tiles():
        return packed(quantised_with_factors, tokens=20)()


def out_of_bounds() -> Tensor:
    return operator(KERNELS, "bias_gelu_forward")(rows(), vector(HIDDEN - 1), "none")  # the bias is too short


CASES = {
    "attention_short": attention([5, 0, 17]),
    "attention_long": attention([3, 130]),
    "add_layer_norm": add_layer_norm,
    "add_layer_norm_pair": add_layer_norm_pair,
    "bias_gelu": bias_gelu,
    "gated_activation": gated_activation,
    "swiglu_without_bias": swiglu_without_bias,
    "pre_norm": pre_norm,
    "rms_norm_alone": rms_norm_alone,
    **({"linear_gelu": linear_gelu} if KERNELS == "triton" else {}),
    "gelu_layer_norm": gelu_layer_norm,
    "embeddings": embeddings,
    "linear_cross_entropy": linear_cross_entropy,
    "linear_cross_entropy_in_order": linear_cross_entropy_in_order,
    **({"gather": gather} if KERNELS == "triton" else {}),
    **({"rotary": rotary} if KERNELS != "cuda" else {}),
    **({"packed_linear": packed(pack), "packed_int8": packed(quantised_with_factors)} if KERNELS == "cpu" else {}),
    **({"packed_int8_in_tiles": packed_int8_in_tiles} if KERNELS == "cpu" and amx.IS_AVAILABLE else {}),
    "out_of_bounds": out_of_bounds,
}
if KERNELS == "cuda":
    for name in ("embeddings", "gated_activation", "swiglu_without_bias", "pre_norm", "rms_norm_alone"):
        del CASES[name]


if __name__ == "__main__":
    if INTERPRETED:
        import interpreter_bf16

        interpreter_bf16.repair()
    for instruction_set in native.instruction_sets() if KERNELS == "cpu" else [None]:
        if instruction_set:
            native.use_instruction_set(instruction_set)
        with GuardedMemory():
            CASES[sys.argv[1]]().sum().backward()
    print("no access out of bounds")
