"""The kernels of `embeddings`, against the reference."""

import math

import pytest
import torch
from helpers import DEVICE, KERNELS, compare_with_torch, dropout_over, normal, with_half

from bertfast import ops
from bertfast.ops.dropout import hidden_keep
from bertfast.ops.sequences import Sequences

SEQUENCES = Sequences.from_lengths([3, 0, 1, 5], capacity=11, device=DEVICE)
FLOAT, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
VOCAB_SIZE, POSITIONS, TYPES = 7, 6, 2
WIDTHS = [
    1,  # a chunk of one
    50,  # one chunk, masked
    128,  # several rows per warp
    768,  # three chunks of 256
    1500,  # an odd width of several warps
]


def ids(tokens=11, dtype=torch.int64):
    """Return token, type and position ids: tokens repeat, and the last row of the first and last table is unused."""
    index = torch.arange(tokens, device=DEVICE, dtype=dtype)
    return index * 5 % (VOCAB_SIZE - 1), index // 4 % TYPES, index % (POSITIONS - 1)


IDS = ids()


def inputs(hidden):
    tables = [normal(rows, hidden, seed=rows, device=DEVICE) for rows in (VOCAB_SIZE, POSITIONS, TYPES)]
    return tables + [normal(hidden, seed=i, device=DEVICE) for i in (3, 4)]


def embeddings(implementation, dropout=None, padding_index=None, ids=IDS):
    """The operation as a function of its parameters."""
    return lambda *parameters: ops.embeddings(
        *ids, *parameters, 1e-12, dropout, padding_index=padding_index, implementation=implementation
    )


def compare(inputs, dtypes, **arguments):
    compare_with_torch(embeddings(KERNELS, **arguments), embeddings("reference", **arguments), inputs, dtypes)


@pytest.mark.parametrize("dtypes", [FLOAT, BF16], ids=["fp32", "bf16"])
def test_beta_is_optional(dtypes):
    functions = [
        lambda *parameters, name=name: embeddings(name, dropout_over(SEQUENCES))(*parameters, None)
        for name in (KERNELS, "reference")
    ]
    compare_with_torch(*functions, inputs(50)[:-1], dtypes)


def leaves(hidden):
    return [x.float().detach().requires_grad_() for x in inputs(hidden)]


@pytest.mark.parametrize("hidden", WIDTHS)
def test_any_width(hidden):
    compare(inputs(hidden), FLOAT, dropout=dropout_over(SEQUENCES))


@pytest.mark.parametrize(
    "dtypes",
    [FLOAT, pytest.param(HALF, marks=with_half), BF16, [BF16, FLOAT, BF16, FLOAT, FLOAT]],
    ids=["fp32", "fp16", "bf16", "mixed"],
)
@pytest.mark.parametrize("p", [0, 0.3])
def test_is_as_accurate_as_the_reference(dtypes, p):
    compare(inputs(96), dtypes, dropout=dropout_over(SEQUENCES, p) if p else None)


@pytest.mark.parametrize("tokens", [1, 4, 5, 100])  # less than a tile of rows, a tile, more than one; several rounds
def test_any_number_of_tokens(tokens):
    compare(inputs(32), FLOAT, dropout=dropout_over(Sequences.from_lengths([tokens], device=DEVICE)), ids=ids(tokens))


@pytest.mark.parametrize("types", [1, 2, 3])  # gradients of up to two types are summed without a sort
def test_any_number_of_token_types(types):
    word, position, _, gamma, beta = inputs(96)
    tables = [word, position, normal(types, 96, device=DEVICE), gamma, beta]
    token_ids, _, position_ids = ids(70)
    type_ids = torch.arange(70, device=DEVICE) // 4 % types
    compare(tables, FLOAT, ids=(token_ids, type_ids, position_ids))


def test_padding_index_may_count_from_the_end():
    parameters = leaves(96)
    embeddings(KERNELS, padding_index=5 - VOCAB_SIZE)(*parameters).square().sum().backward()
    assert (parameters[0].grad == 0).all(1).nonzero().flatten().tolist() == [
        5,
        VOCAB_SIZE - 1,
    ]  # the last is never used


def test_padding_index_gets_no_gradient():
    compare(inputs(96), FLOAT, padding_index=0)
    parameters = leaves(96)
    embeddings(KERNELS, padding_index=0)(*parameters).square().sum().backward()
    assert (parameters[0].grad[0] == 0).all()
    assert (parameters[0].grad[1] != 0).any()


def test_unused_table_rows_get_no_gradient():
    parameters = leaves(96)
    embeddings(KERNELS)(*parameters).square().sum().backward()
    for table in parameters[:2]:
        assert (table.grad[-1] == 0).all()
        assert (table.grad[:-1] != 0).any(1).all()


@pytest.mark.parametrize("dtypes", [FLOAT, BF16, [BF16, FLOAT, FLOAT, FLOAT, FLOAT]], ids=["fp32", "bf16", "mixed"])
def test_word_embeddings_may_be_given_instead_of_ids(dtypes):
    _, *others = inputs(96)
    compare([normal(11, 96, device=DEVICE), *others], dtypes, ids=(None, *IDS[1:]), dropout=dropout_over(SEQUENCES))


def test_ids_may_be_int32():
    results = []
    for dtype in (torch.int32, torch.int64):
        parameters = leaves(96)
        output = embeddings(KERNELS, ids=ids(dtype=dtype))(*parameters)
        results.append([output, *torch.autograd.grad(output.square().sum(), parameters)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_ids_may_have_any_stride():
    apart = [torch.stack([x, x + 1], 1)[:, 0] for x in IDS]
    parameters = leaves(96)
    assert torch.equal(embeddings(KERNELS, ids=apart)(*parameters), embeddings(KERNELS)(*parameters))


def test_an_empty_batch_has_zero_gradients():
    parameters = leaves(96)
    output = embeddings(KERNELS, ids=ids(0))(*parameters)
    output.sum().backward()
    assert output.shape == (0, 96)
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in parameters)


def test_mask_is_bitwise_identical_to_the_reference():
    *tables, gamma, beta = leaves(768)
    dropout = dropout_over(SEQUENCES)
    output = embeddings(KERNELS, dropout=dropout)(*tables, gamma, torch.full_like(beta, 100))
    assert torch.equal(output != 0, hidden_keep(dropout, 768))


def test_mask_of_the_gradient_is_bitwise_identical_to_the_reference():
    """With an output gradient of ones, the gradient of beta counts how often each column is kept."""
    dropout = dropout_over(SEQUENCES)
    parameters = leaves(768)
    embeddings(KERNELS, dropout=dropout)(*parameters).sum().backward()
    kept = hidden_keep(dropout, 768).sum(0)
    torch.testing.assert_close(parameters[-1].grad / dropout.scale, kept.float(), rtol=1e-6, atol=0)


def test_nan_does_not_leak_between_rows():
    parameters = leaves(96)
    whole = embeddings(KERNELS)(*parameters)
    parameters[0].data[5] = math.nan  # token 1 and 7
    others = IDS[0] != 5
    assert torch.equal(embeddings(KERNELS)(*parameters)[others], whole[others])


def test_rows_may_have_any_stride():
    *tables, gamma, beta = leaves(96)
    apart = [torch.stack([x, x], 1)[:, 0].detach().requires_grad_() for x in tables]
    results = []
    for leaves_of_tables in (apart, tables):
        output = embeddings(KERNELS)(*leaves_of_tables, gamma, beta)
        d_y = torch.stack([output, output], 1)[:, 0].detach()
        results.append([output, *torch.autograd.grad(output, leaves_of_tables, d_y)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_is_bitwise_reproducible():
    results = []
    for _ in range(2):
        parameters = leaves(96)
        output = embeddings(KERNELS, dropout=dropout_over(SEQUENCES))(*parameters)
        results.append([output, *torch.autograd.grad(output.square().sum(), parameters)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
