"""`rotary`: rotary position embedding of queries and keys."""

import pytest
import torch
from helpers import compare_with_torch, normal
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.modernbert import modeling_modernbert as hf

from bertfast import ops

POSITIONS = torch.tensor([0, 1, 2, 3, 0, 1, 40, 0, 7])
TOKENS = len(POSITIONS)


def inv_freq(dimension=32, theta=10_000.0):
    return 1.0 / (theta ** (torch.arange(0, dimension, 2, dtype=torch.float) / dimension))


def table(dimension=32, positions=POSITIONS):
    angles = positions[:, None].float() * inv_freq(dimension)
    return torch.cat([angles.cos(), angles.sin()], 1)


def qkv(dimension=32, tokens=TOKENS, **options):
    return normal(tokens, 3, 2, dimension, **options)


def rotary(x, **options):
    return ops.rotary(x, table(x.shape[3])[: len(x)], **options)


def composed(x):
    """Rotate queries and keys by the functions of transformers, in fp32 or float64."""
    angles = POSITIONS[:, None].float() * inv_freq(x.shape[3])
    angles = torch.cat([angles, angles], 1)
    cos, sin = (each.to(torch.promote_types(x.dtype, torch.float32))[:, None] for each in (angles.cos(), angles.sin()))
    query, key, value = x.unbind(1)
    rotated = [(each * cos + hf.rotate_half(each) * sin).to(x.dtype) for each in (query, key)]
    return torch.stack([*rotated, value], 1)


@pytest.mark.parametrize("dimension", [2, 32, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_accurate_as_transformers(dimension, dtype):
    compare_with_torch(rotary, composed, [qkv(dimension)], dtype)


def test_the_layout_is_that_of_transformers():
    config = hf.ModernBertConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=41)
    layers = hf.ModernBertRotaryEmbedding(config)
    layer_type = config.layer_types[0]
    x = qkv(dtype=torch.float32).detach()
    cos, sin = layers(x, POSITIONS[None], layer_type)
    query, key, value = x.transpose(0, 2).unbind(1)  # [heads, tokens, D]
    rotated = [*hf.apply_rotary_pos_emb(query, key, cos[0], sin[0], unsqueeze_dim=0), value]
    expected = torch.stack(rotated, 1).transpose(0, 2)
    table_of_layer = torch.cat([cos[0, :, :16], sin[0, :, :16]], 1)
    torch.testing.assert_close(ops.rotary(x, table_of_layer), expected)


def test_gradients_of_first_and_second_order_are_the_derivatives():
    assert torch.autograd.gradcheck(rotary, [qkv(6)])
    assert torch.autograd.gradgradcheck(rotary, [qkv(6)])


def test_scores_depend_on_the_distance_only():
    x = qkv(64, 1).detach().expand(TOKENS, -1, -1, -1)  # the same token at all positions
    query, key, _ = rotary(x).unbind(1)
    scores = torch.einsum("qad,kad->qka", query, key)
    distance = POSITIONS[:, None] - POSITIONS
    for each in (0, 1, -2):
        same = scores[distance == each]
        assert len(same) > 1
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=1e-5, atol=1e-5)
    assert (scores[0, 1] - scores[1, 0]).abs().max() > 0.1


def test_only_the_table_is_saved():
    saved = []
    angles = table()
    with saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        ops.rotary(qkv(dtype=torch.float32), angles)
    assert set(saved) == {angles.data_ptr()}


def test_an_empty_batch_has_an_empty_gradient():
    x = qkv(tokens=0, dtype=torch.float32)
    y = rotary(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3, 2, 32)


def test_errors_name_the_wrong_argument():
    x, angles = qkv(), table()
    with pytest.raises(ValueError, match=r"rotary: qkv must have shape \[9, 3, 2, 32\], got \[9, 2, 2, 32\]"):
        ops.rotary(x[:, :2], angles)
    with pytest.raises(ValueError, match=r"rotary: table must have shape \[9, 32\], got \[8, 32\]"):
        ops.rotary(x, angles[:8])
    with pytest.raises(ValueError, match=r"rotary: table must have shape \[9, 32\], got \[9, 16\]"):
        ops.rotary(x, angles[:, :16])
    with pytest.raises(TypeError, match=r"table must be float32, got torch\.bfloat16: compute cosines and sines in"):
        ops.rotary(x, angles.bfloat16())
    with pytest.raises(ValueError, match=r"table requires a gradient, .* does not compute: pass table\.detach\(\)"):
        ops.rotary(x, angles.requires_grad_())
    with pytest.raises(ValueError, match="rotary: the head dimension must be even, got 31"):
        ops.rotary(x[..., :31], table()[:, :31])
