"""The rule by which every numerical test judges, and what such tests need."""

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
    ours: Tensor,
    theirs: Tensor,
    truth: Tensor,
    *,
    name: str = "the result",
    dtype: torch.dtype | None = None,
    neighbour: Tensor | None = None,
    factor: float = 2,
) -> None:
    """The Frobenius error of `ours` is at most twice that of `theirs`, plus a few ulps of the largest true value.

    `truth` is float64; `theirs` is PyTorch's own result in `dtype` (default: ours), of which an ulp is taken. Where
    the true value is zero, as the gradient of a key's bias is, the ulp is one of the norm of `neighbour`, a tensor
    that it is a difference of. `factor` is for one of many small tensors whose errors are judged together elsewhere.
    """
    assert ours.shape == truth.shape, f"{name}: shape {list(ours.shape)}, should be {list(truth.shape)}"
    truth = truth.detach().double()
    if truth.numel() == 0:
        return
    error, allowed = error_and_allowed(ours, theirs, truth, dtype or ours.dtype, neighbour, factor)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}; norm {truth.norm():.3g}"


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Frobenius norm of the difference over that of `theirs`."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where kernels are tested."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS: Literal["triton", "cpu", "cuda"] = os.environ.get("BERTFAST_TESTED") or (
    "triton" if DEVICE.type == "cuda" or INTERPRETED else "cpu"
)
"""Which kernels are tested. A process with `TRITON_INTERPRET=1` runs Triton's on a CPU, one with `BERTFAST_TESTED=cuda`
those in CUDA C++, on a CPU with a library that emulates them; any other the library's, and on a GPU Triton's."""

HIGHEST_PRECISION = torch.float16 if KERNELS == "cuda" else torch.float32
"""The most precise dtype that their attention takes."""

of_triton = pytest.mark.skipif(KERNELS != "triton", reason="only Triton's kernels have it")
with_half = pytest.mark.skipif(KERNELS == "cpu", reason="half precision is for GPUs")


def tf32x3_factor(dtype: torch.dtype) -> float:
    """How many times PyTorch's error Triton's matmuls may have: 2, and 4 where a GPU makes fp32 of three TF32 matmuls.

    Tensor cores truncate partial sums where fp32 arithmetic rounds them to nearest, so that errors have one sign and
    add up. With truncated sums the error of attention at D = 128 was computed to be 2.02 times PyTorch's.
    """
    return 4 if DEVICE.type == "cuda" and KERNELS == "triton" and dtype == torch.float32 else 2


def dropout_over(sequences: Sequences, p: float = 0.3, operation: int = 5) -> Dropout:
    """Dropout over the tokens of `sequences`, with a seed of its own."""
    seed = torch.tensor(0x0123_4567_89AB_CDEF, device=sequences.cu_seqlens.device)
    return Dropout(p, seed, operation, sequences.token_sequence_ids, sequences.position)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, device="cpu") -> Tensor:
    """Normally distributed numbers, the same each time, that want a gradient."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()


def compare_with_torch(
    ours: Function,
    theirs: Function,
    inputs: list[Tensor],
    dtypes: torch.dtype | list[torch.dtype],
    products: torch.dtype | None = None,
    factor: float = 2,
) -> None:
    """Hold the outputs and all gradients of `ours` to the rule; `inputs` are float64 and give the truth.

    Both are functions of the inputs, in one dtype or in one each, to one tensor or several; their gradient is that of a
    sum with random weights. Outputs that are no floating-point numbers are compared as they are. `products` is
    autocast's dtype where the functions use it; `factor` is that of `assert_as_accurate_as_torch`.
    """
    dtypes = [dtypes] * len(inputs) if isinstance(dtypes, torch.dtype) else dtypes
    # The truth is that of the very numbers that both get.
    rounded = [x.detach().to(dtype) for x, dtype in zip(inputs, dtypes, strict=True)]
    results = []
    for function, truth in ((ours, False), (theirs, False), (theirs, True)):
        leaves = [x.to(torch.float64 if truth else x.dtype).requires_grad_() for x in rounded]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        differentiable = [x for x in outputs if x.is_floating_point()]
        weights = [normal(*x.shape, seed=1).detach().to(x.device, dtypes[0]).to(x.dtype) for x in differentiable]
        results.append([*outputs, *torch.autograd.grad(differentiable, leaves, weights)])
    lowest = max([*dtypes, products or dtypes[0]], key=lambda dtype: torch.finfo(dtype).eps)
    for place, (our, their, truth) in enumerate(zip(*results, strict=True)):
        gradient = place - len(results[0]) + len(inputs)
        name = f"output {place}" if gradient < 0 else f"the gradient of input {gradient}"
        assert our.dtype == their.dtype, f"{name}: {our.dtype}, should be {their.dtype}"
        if our.is_floating_point():
            assert_as_accurate_as_torch(our, their, truth, name=name, dtype=lowest, factor=factor)
        else:
            assert torch.equal(our, truth), f"{name}: {our}, should be {truth}"


def under_autocast(function: Function, dtype: torch.dtype) -> Function:
    """`function` under autocast, except where it is given float64 and makes the truth."""

    def run(*inputs):
        with torch.autocast(inputs[0].device.type, dtype, enabled=inputs[0].dtype != torch.float64):
            return function(*inputs)

    return run


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has for which any operation takes memory."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        known, made = (
            [(x.untyped_storage().data_ptr(), x.numel()) for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
            for tree in (arguments, result)
        )
        memory = {place for place, _ in known}
        self.elements = max([self.elements, *(size for place, size in made if place not in memory)])
        return result
