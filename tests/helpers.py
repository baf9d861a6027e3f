"""The accuracy rule of all numerical tests, and helpers for such tests."""

import os
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bertfast.cli.self_test import error_and_allowed
from bertfast.ops.dropout import Dropout
from bertfast.ops.sequences import Sequences

Function = Callable[..., Tensor]


def assert_as_accurate_as_torch(
    actual: Tensor,
    expected: Tensor,
    truth: Tensor,
    *,
    name: str = "the result",
    dtype: torch.dtype | None = None,
    neighbour: Tensor | None = None,
    factor: float = 2,
) -> None:
    """Assert that the Frobenius error of `actual` is at most twice that of `expected`, plus a few ulps.

    Args:
        actual: The result to check.
        expected: PyTorch's own result in `dtype`.
        truth: The float64 result; ulps are those of its largest value.
        name: Name of the result, for the message.
        dtype: The dtype whose ulps are taken; default: that of `actual`.
        neighbour: For a truth that cancels to zero, such as the gradient of a key's bias, one of the tensors that it is
            the difference of: its norm scales the ulps.
        factor: Allowed multiple of the error of `expected`; larger for one of many small tensors that are also checked
            together.
    """
    assert actual.shape == truth.shape, f"{name}: shape {list(actual.shape)}, should be {list(truth.shape)}"
    truth = truth.detach().double()
    if truth.numel() == 0:
        return
    error, allowed = error_and_allowed(actual, expected, truth, dtype or actual.dtype, neighbour, factor)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}; norm {truth.norm():.3g}"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the Frobenius norm of the difference, divided by that of `expected`."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""The device on which kernels are tested."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS: Literal["triton", "cpu", "cuda"] = os.environ.get("BERTFAST_TESTED") or (
    "triton" if DEVICE.type == "cuda" or INTERPRETED else "cpu"
)
"""The implementation that is tested: on a GPU Triton, else the native library for CPUs. `TRITON_INTERPRET=1` runs
Triton on a CPU, `BERTFAST_TESTED=cuda` CUDA C++, on a CPU with a library that emulates it."""

WITHOUT_CUDA_KERNEL = ("embeddings", "gated_activation", "pre_norm", "rotary") if KERNELS == "cuda" else ()
"""Operators without kernels, if CUDA C++ is tested."""

HIGHEST_PRECISION = torch.float16 if KERNELS == "cuda" else torch.float32
"""The most precise dtype that the attention of this implementation supports."""

of_triton = pytest.mark.skipif(KERNELS != "triton", reason="only Triton supports it")
with_half = pytest.mark.skipif(KERNELS == "cpu", reason="fp16 kernels are for GPUs only")


def tf32x3_factor(dtype: torch.dtype) -> float:
    """Return the allowed multiple of PyTorch's error: 2, and 4 if a GPU computes fp32 matmuls as three of TF32.

    Tensor cores truncate partial sums, while fp32 arithmetic rounds them to nearest: the errors have one sign and
    accumulate. With truncated sums the error of attention at D = 128 was computed to be 2.02 times PyTorch's.
    """
    return 4 if DEVICE.type == "cuda" and KERNELS == "triton" and dtype == torch.float32 else 2


def dropout_over(sequences: Sequences, p: float = 0.3, operation: int = 5) -> Dropout:
    """Return dropout over the tokens of `sequences`, with a fixed seed."""
    seed = torch.tensor(0x0123_4567_89AB_CDEF, device=sequences.cu_seqlens.device)
    return Dropout(p, seed, operation, sequences.token_sequence_ids, sequences.position)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, device="cpu") -> Tensor:
    """Return normally distributed numbers that require a gradient and are the same in each call."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()


def compare_with_torch(
    actual: Function,
    expected: Function,
    inputs: list[Tensor],
    dtypes: torch.dtype | list[torch.dtype],
    gemm_dtype: torch.dtype | None = None,
    factor: float = 2,
) -> None:
    """Check the outputs and all gradients of `actual` by the accuracy rule.

    Args:
        actual: The function to check, of the inputs to one or more tensors. Outputs that are not floating-point must be
            equal to the truth. Gradients are those of a sum with random weights.
        expected: The same in PyTorch; in float64 it gives the truth.
        inputs: float64.
        dtypes: Dtype of all inputs, or of each.
        gemm_dtype: Autocast's dtype if the functions use it.
        factor: See `assert_as_accurate_as_torch`.
    """
    dtypes = [dtypes] * len(inputs) if isinstance(dtypes, torch.dtype) else dtypes
    # The truth is computed from the rounded inputs.
    rounded = [x.detach().to(dtype) for x, dtype in zip(inputs, dtypes, strict=True)]
    results = []
    for function, truth in ((actual, False), (expected, False), (expected, True)):
        leaves = [x.to(torch.float64 if truth else x.dtype).requires_grad_() for x in rounded]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        differentiable = [x for x in outputs if x.is_floating_point()]
        weights = [normal(*x.shape, seed=1).detach().to(x.device, dtypes[0]).to(x.dtype) for x in differentiable]
        results.append([*outputs, *torch.autograd.grad(differentiable, leaves, weights)])
    lowest = max([*dtypes, gemm_dtype or dtypes[0]], key=lambda dtype: torch.finfo(dtype).eps)
    for index, (x, torch_x, truth) in enumerate(zip(*results, strict=True)):
        gradient = index - len(results[0]) + len(inputs)
        name = f"output {index}" if gradient < 0 else f"the gradient of input {gradient}"
        assert x.dtype == torch_x.dtype, f"{name}: {x.dtype}, should be {torch_x.dtype}"
        if x.is_floating_point():
            assert_as_accurate_as_torch(x, torch_x, truth, name=name, dtype=lowest, factor=factor)
        else:
            assert torch.equal(x, truth), f"{name}: {x}, should be {truth}"


def under_autocast(function: Function, dtype: torch.dtype) -> Function:
    """Return `function` under autocast, except for float64 inputs, which give the truth."""

    def run(*inputs):
        with torch.autocast(inputs[0].device.type, dtype, enabled=inputs[0].dtype != torch.float64):
            return function(*inputs)

    return run


class LargestTensor(TorchDispatchMode):
    """Record the number of elements of the largest tensor for which an operation allocates memory."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        known, created = (
            [(x.untyped_storage().data_ptr(), x.numel()) for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
            for tree in (arguments, result)
        )
        memory = {address for address, _ in known}
        self.elements = max([self.elements, *(size for address, size in created if address not in memory)])
        return result
