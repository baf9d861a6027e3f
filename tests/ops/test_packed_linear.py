"""Packing of weights, and the arguments of `packed_linear`."""

import pytest
import torch
from helpers import normal

from bertfast.ops.packed_linear import pack, packed_linear, quantise

NAMES = {"fp32": "float32", "bf16": "bfloat16"}
WEIGHT, BIAS = normal(40, 50).detach().float(), normal(40).detach().float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacked_is_the_weight(dtype):
    packed = pack(WEIGHT, BIAS, dtype)
    assert torch.equal(packed.unpacked(), WEIGHT.to(dtype))
    assert (packed.columns, packed.depth) == (40, 50)


def test_quantised_values_are_half_a_step_from_the_weight():
    packed = quantise(WEIGHT, BIAS)
    difference = packed.unpacked() * packed.scales[:, None] - WEIGHT
    assert (difference.abs() <= packed.scales[:, None] * 0.501).all()
    assert packed.unpacked().abs().amax(1).eq(127).all()
    assert torch.equal(packed.sums, packed.unpacked().sum(1).int())


def test_a_row_of_zeros_is_quantised():
    weight = WEIGHT.clone()
    weight[3] = 0
    y = packed_linear(torch.ones(2, 50), quantise(weight, BIAS))
    assert y.isfinite().all()
    torch.testing.assert_close(y[:, 3], BIAS[3].expand(2))


def test_the_reference_computes_the_same():
    x = normal(7, 50).detach().float()
    for packed in (pack(WEIGHT, BIAS), pack(WEIGHT), quantise(WEIGHT, BIAS)):
        expected = packed_linear(x, packed, "gelu", implementation="reference")
        torch.testing.assert_close(packed_linear(x, packed, "gelu"), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("bias", [BIAS, None], ids=["bias", "none"])
@pytest.mark.parametrize(("tokens", "columns", "depth"), [(3, 40, 0), (30, 40, 0), (3, 0, 5), (0, 40, 5), (2, 0, 0)])
def test_sizes_of_zero_give_sums_of_nothing(tokens, columns, depth, bias, kind):
    weight, bias = torch.ones(columns, depth), None if bias is None else bias[:columns]
    packed = quantise(weight, bias) if kind == "int8" else pack(weight, bias, getattr(torch, NAMES[kind]))
    x = torch.ones(tokens, depth)
    y = packed_linear(x, packed, "gelu")
    assert y.shape == (tokens, columns)
    torch.testing.assert_close(y, packed_linear(x, packed, "gelu", implementation="reference"))
    if depth == 0:
        sums = torch.zeros(columns) if bias is None else bias
        torch.testing.assert_close(y, torch.nn.functional.gelu(sums).expand(tokens, -1))


def test_bad_arguments():
    packed, x = pack(WEIGHT, BIAS), torch.ones(2, 50)
    with pytest.raises(ValueError, match=r"x must be floating point of shape \[tokens, 50\], got .* \[2, 49\]"):
        packed_linear(x[:, :49], packed)
    with pytest.raises(ValueError, match="activation must be none, gelu or gelu_tanh, got 'relu'"):
        packed_linear(x, packed, "relu")
    with pytest.raises(ValueError, match=r"x requires a gradient.*torch.no_grad"):
        packed_linear(x.requires_grad_(), packed)
    with pytest.raises(TypeError, match=r"dtype must be float32 or bfloat16, got torch.int8: int8 is made by quantise"):
        pack(WEIGHT, None, torch.int8)
    for make in (pack, quantise):
        with pytest.raises(ValueError, match=r"a packed weight \[40, 50\] takes a bias \[40\], got \[7\]"):
            make(WEIGHT, BIAS[:7])
    with pytest.raises(ValueError, match="the weight has values that are not finite"):
        quantise(WEIGHT / 0)


@pytest.mark.parametrize("permitted", [True, False])
def test_amx_is_used_only_where_the_operating_system_permits_it(permitted, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: permitted)
    assert len(pack(WEIGHT, BIAS, torch.bfloat16).dense) == (40 if permitted else 0)


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [BIAS, None], ids=["bias", "none"])
def test_with_amx_many_tokens_are_multiplied_by_onednn(bias, activation, monkeypatch):
    x = normal(60, 50).detach().float()
    expected = packed_linear(x, pack(WEIGHT, bias, torch.bfloat16), activation)
    monkeypatch.setattr("bertfast.ops.packed_linear.cpu_has_amx", lambda: True)
    packed = pack(WEIGHT, bias, torch.bfloat16)
    assert packed.uses_onednn(60)
    assert not packed.uses_onednn(32)
    assert not pack(WEIGHT, bias).uses_onednn(60)
    actual = packed_linear(x, packed, activation)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.01, atol=0.02)
    assert torch.equal(packed_linear(x, packed.rows(0, 32), activation), actual[:, :32])
