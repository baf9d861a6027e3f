"""`embeddings`: the normalised sum of three embeddings."""

import pytest
import torch
import torch.nn.functional as F
from helpers import compare_with_torch, dropout_over, normal

from bertfast import ops
from bertfast.ops.dropout import hidden_keep
from bertfast.ops.sequences import Sequences

SEQUENCES = Sequences.from_lengths([4, 0, 1, 2], capacity=9)
TOKENS = torch.tensor([3, 0, 5, 3, 6, 1, 0, 2, 3])
TYPES = torch.tensor([0, 0, 1, 1, 0, 0, 1, 0, 0])
POSITIONS = torch.tensor([0, 1, 2, 3, 0, 0, 1, 2, 3])


def parameters(hidden=5):
    return [normal(rows, hidden) for rows in (7, 6, 2)] + [normal(hidden, seed=i) for i in (1, 2)]


def embeddings(*parameters, tokens=TOKENS, dropout=None, padding_index=None):
    return ops.embeddings(tokens, TYPES, POSITIONS, *parameters, 1e-12, dropout, padding_index=padding_index)


def composed(word, position, token_type, gamma, beta, padding_index=None):
    total = F.embedding(TOKENS, word, padding_index) + F.embedding(TYPES, token_type) + F.embedding(POSITIONS, position)
    return F.layer_norm(total, gamma.shape, gamma, beta, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_accurate_as_torch(dtype):
    compare_with_torch(embeddings, composed, parameters(48), dtype)


@pytest.mark.parametrize("p", [0, 0.4])
def test_gradient_is_the_derivative(p):
    dropout = dropout_over(SEQUENCES, p) if p else None
    assert torch.autograd.gradcheck(lambda *x: embeddings(*x, dropout=dropout), parameters())
    assert torch.autograd.gradcheck(lambda *x: embeddings(*x, None, dropout=dropout), parameters()[:-1])


def test_without_beta_equals_a_beta_of_zeros():
    *tables, beta = (x.float().detach() for x in parameters())
    assert torch.equal(embeddings(*tables, None), embeddings(*tables, torch.zeros_like(beta)))


def test_dropout_is_the_mask_of_the_specification():
    dropout = dropout_over(SEQUENCES)
    expected = embeddings(*parameters()) * hidden_keep(dropout, 5) * dropout.scale
    torch.testing.assert_close(embeddings(*parameters(), dropout=dropout), expected)


def test_the_padding_entry_gets_no_gradient():
    word, *others = parameters()
    embeddings(word, *others, padding_index=0).square().sum().backward()
    expected = torch.autograd.grad(composed(word, *others, padding_index=0).square().sum(), word)[0]
    torch.testing.assert_close(word.grad, expected)
    assert (word.grad[0] == 0).all()
    assert (word.grad[3] != 0).any()


def test_embedded_tokens_may_replace_ids():
    word, *others = parameters()
    torch.testing.assert_close(embeddings(word[TOKENS], *others, tokens=None), embeddings(word, *others))


def test_a_token_does_not_depend_on_the_others():
    whole = embeddings(*parameters())
    some = torch.tensor([5, 2])
    alone = ops.embeddings(TOKENS[some], TYPES[some], POSITIONS[some], *parameters(), 1e-12)
    assert torch.equal(alone, whole[some])


def test_rows_are_normalised():
    *tables, gamma, beta = parameters(64)
    output = embeddings(*tables, torch.ones_like(gamma), torch.zeros_like(beta))
    torch.testing.assert_close(output.mean(1), torch.zeros(9, dtype=output.dtype))
    torch.testing.assert_close(output.var(1, unbiased=False), torch.ones(9, dtype=output.dtype))


def test_an_empty_batch_has_zero_gradients():
    none = torch.empty(0, dtype=torch.int64)
    word, *others = parameters()
    output = ops.embeddings(none, none, none, word, *others, 1e-12)
    output.sum().backward()
    assert output.shape == (0, 5)
    assert torch.equal(word.grad, torch.zeros_like(word))


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("wrong", [7, -1])
def test_an_index_outside_its_table_is_named(implementation, wrong):
    tables = [x.float() for x in parameters()]
    tokens = TOKENS.clone()
    tokens[4] = wrong
    with pytest.raises(IndexError, match=rf"^embeddings: token_ids\[4\] is {wrong}, but the vocabulary has 7 rows"):
        ops.embeddings(tokens, TYPES, POSITIONS, *tables, 1e-12, implementation=implementation)
    with pytest.raises(IndexError, match=r"^embeddings: position_ids\[3\] is 6, but the position table has 6 rows"):
        ops.embeddings(TOKENS, TYPES, POSITIONS * 2, *tables, 1e-12, implementation=implementation)
    with pytest.raises(IndexError, match=r"^embeddings: token_type_ids\[2\] is 2, but the token-type table has 2 rows"):
        ops.embeddings(TOKENS, TYPES * 2, POSITIONS, *tables, 1e-12, implementation=implementation)


def test_errors_name_the_wrong_argument():
    word, position, token_type, gamma, beta = parameters()
    rest = (word, position, token_type, gamma, beta, 1e-12)
    with pytest.raises(ValueError, match=r"embeddings: token_type_ids must have shape \[8\], got \[9\]"):
        ops.embeddings(TOKENS[:8], TYPES, POSITIONS, *rest)
    with pytest.raises(TypeError, match="token_ids must be int64 or int32, got torch"):
        ops.embeddings(TOKENS.float(), TYPES, POSITIONS, *rest)
    with pytest.raises(ValueError, match=r"word must have shape \[9, 5\], got \[7, 5\]"):
        ops.embeddings(None, TYPES, POSITIONS, *rest)
    with pytest.raises(ValueError, match=r"position must have shape \[6, 5\], got \[6, 4\]"):
        ops.embeddings(TOKENS, TYPES, POSITIONS, word, position[:, :4], token_type, gamma, beta, 1e-12)
