"""What all operations share: the choice of an implementation."""

import pytest
import torch
from helpers import normal

from bertfast import ops
from bertfast.ops.choice import check, choose

X = normal(4, 3).detach()


def test_default_is_the_first_offered():
    assert choose("x", None, ("triton", "reference")) == "triton"
    assert choose("x", "reference", ("triton", "reference")) == "reference"


def test_a_request_that_cannot_be_met_is_refused():
    with pytest.raises(ValueError, match="implementation must be one of reference, cpu, triton, cuda, got 'fast'"):
        ops.bias_gelu(X, X[0], implementation="fast")
    with pytest.raises(ValueError, match="no 'triton' implementation for these tensors; there is reference"):
        choose("x", "triton", ("reference",))


def test_reference_can_be_forced_everywhere():
    index = torch.arange(4) % 3
    results = [
        ops.bias_gelu(X, X[0], implementation="reference"),
        ops.linear_gelu(X, X, X[:, 0], implementation="reference"),
        ops.gelu_layer_norm(X, X[0], X[1], X[2], 1e-12, implementation="reference"),
        ops.add_layer_norm(X, X, None, X[1], X[2], 1e-12, implementation="reference"),
        ops.embed(index, index, index, X, X, X, X[1], X[2], 1e-12, implementation="reference"),
        ops.linear_cross_entropy(X, index, X, X[:, 0], index, implementation="reference")[0],
    ]
    assert all(result.isfinite().all() for result in results)


def test_what_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="x: rows must be a tensor, got list"):
        check("x", rows=([1, 2], "rows", "integer"))
