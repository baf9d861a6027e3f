"""CUDA C++ only: inputs that its kernels do not support, or that are not aligned, and the order of threads."""

from dataclasses import replace

import pytest
import torch
from guard_page import guarded
from helpers import DEVICE, HIGHEST_PRECISION, KERNELS, normal

from bertfast import ops
from bertfast.ops.dispatch import operator
from bertfast.ops.sequences import Sequences

SEQUENCES = Sequences.from_lengths([20, 40], device=DEVICE)


def qkv(dtype=HIGHEST_PRECISION, heads=2, dimension=32):
    return normal(SEQUENCES.capacity, 3, heads, dimension, dtype=dtype, device=DEVICE).detach()


def attention_and_gradient(x, sequences, table=None, window=None):
    """Return the output of attention, and the gradient of the sum of its elements."""
    bounds = sequences.cu_seqlens, sequences.sequence_ids, table, sequences.max_seqlen_bound
    arguments = (*bounds, 0.1, False, window, None, 0, 0)
    o, lse = operator(KERNELS, "attention_forward")(x, *arguments)
    return o, operator(KERNELS, "attention_backward")(torch.ones_like(o), x, o, lse, *arguments)


def rows(columns, dtype=torch.float32):
    return normal(2, columns, dtype=dtype, device=DEVICE).detach()


def test_attention_supports_16_bit_types_only():
    with pytest.raises(ValueError, match="implementation 'cuda' is not available: its kernels support bfloat16 and"):
        ops.attention(qkv(torch.float32), SEQUENCES, implementation=KERNELS)


def test_operators_without_a_cuda_kernel_are_refused():
    ids = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    table = rows(32)
    with pytest.raises(ValueError, match="implementation 'cuda' is not available: it has no kernel for emb"):
        ops.embeddings(ids, ids, ids, table, table, table, table[0], table[0], 1e-12, implementation=KERNELS)
    with pytest.raises(ValueError, match="implementation 'cuda' is not available: it has no kernel for gated"):
        ops.gated_activation(table, "gelu", implementation=KERNELS)
    with pytest.raises(ValueError, match="implementation 'cuda' is not available: it has no kernel for pre_norm"):
        ops.pre_norm(table, table, None, table[0], None, 1e-12, implementation=KERNELS)


def test_an_error_names_the_operation_and_its_shape():
    vector = rows(5000)[0]
    with pytest.raises(
        RuntimeError, match=r"cuda_add_layer_norm_forward of a tensor \[2, 5000\]: rows have at most 4096 columns"
    ):
        ops.add_layer_norm(rows(5000), rows(5000), vector, vector, vector, 1e-12, implementation=KERNELS)


def test_incompatible_dtypes_are_refused():
    x, residual, vector = rows(32), rows(32, torch.bfloat16), rows(32)[0]
    with pytest.raises(RuntimeError, match="must have the dtype of x, or float32"):
        ops.add_layer_norm(x, residual, vector, vector, vector, 1e-12, implementation=KERNELS)


@pytest.mark.parametrize("offset", [1, 4])  # elements between a multiple of 16 bytes and the first element
def test_tensors_need_not_be_aligned(offset):
    def moved(x):
        buffer = x.new_empty(x.numel() + offset)
        buffer[offset:] = x.flatten()
        return buffer[offset:].view(x.shape)

    dense = qkv()
    assert torch.equal(
        ops.attention(moved(dense), SEQUENCES, implementation=KERNELS),
        ops.attention(dense, SEQUENCES, implementation=KERNELS),
    )
    x, bias = rows(64, torch.bfloat16), rows(64)[0]
    forward = operator(KERNELS, "bias_gelu_forward")
    assert torch.equal(forward(moved(x), bias, "none"), forward(x, bias, "none"))


@pytest.mark.parametrize(
    "max_seqlen_bound", [16, 1024]
)  # a work tile is a whole sequence, or a block found by bisection
def test_without_sequences_cu_seqlens_is_not_read_past_its_end(max_seqlen_bound):
    unused_slots = Sequences.from_lengths([], capacity=300, max_seqlen_bound=max_seqlen_bound, device=DEVICE)
    # cu_seqlens ends at a guard page; it is int32, which the kernels read without a copy.
    starts = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    if DEVICE.type == "cpu":
        starts = guarded(starts)
    x = normal(300, 3, 2, 32, dtype=HIGHEST_PRECISION, device=DEVICE).detach()
    o, d_x = attention_and_gradient(x, replace(unused_slots, cu_seqlens=starts))
    assert not o.any()
    assert not d_x.any()


@pytest.mark.parametrize("bound", [128, 1024])  # of whole sequences, and of blocks of them, which have their own order
def test_results_do_not_depend_on_the_order_of_the_sequences(bound):
    sequences = Sequences.from_lengths([33, 20, 64, 0, 128], capacity=300, max_seqlen_bound=bound, device=DEVICE)
    x = normal(300, 3, 2, 32, dtype=HIGHEST_PRECISION, device=DEVICE).detach()
    unordered = attention_and_gradient(x, sequences)
    for table in (sequences.sequence_table, sequences.sequence_table.flip(0)[1:].contiguous()):
        for result, expected in zip(attention_and_gradient(x, sequences, table), unordered, strict=True):
            assert torch.equal(result, expected)


@pytest.mark.slow
@pytest.mark.parametrize("head_dimension", [32, 64, 128])
def test_results_do_not_depend_on_the_order_of_threads(head_dimension, monkeypatch):
    """Each consumer skips tiles of keys, and as many tiles as there are stages follow before it needs new queries.

    So the stage of a skipped tile is filled again while a thread that is late still waits for it.
    """
    sequences = Sequences.from_lengths([1000] * 2, max_seqlen_bound=1024, device=DEVICE)
    x = normal(sequences.capacity, 3, 1, head_dimension, dtype=HIGHEST_PRECISION, device=DEVICE).detach()
    expected = attention_and_gradient(x, sequences, window=300)
    for seed in range(1, 13):
        monkeypatch.setenv("BERTFAST_EMULATION_SEED", str(seed))
        for result, first in zip(attention_and_gradient(x, sequences, window=300), expected, strict=True):
            assert torch.equal(result, first)
