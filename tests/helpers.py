"""The rule by which every numerical test judges, and what such tests need."""

from collections.abc import Callable

import torch
from torch import Tensor

from bertfast.dropout import Dropout
from bertfast.sequences import Sequences

ULPS = 8
Function = Callable[..., Tensor]


def assert_as_accurate_as_torch(
    ours: Tensor,
    theirs: Tensor,
    truth: Tensor,
    *,
    name: str = "the result",
    dtype: torch.dtype | None = None,
    neighbour: Tensor | None = None,
) -> None:
    """The Frobenius error of `ours` is at most twice that of `theirs`, plus a few ulps of the largest true value.

    `truth` is float64; `theirs` is PyTorch's own result in `dtype` (default: ours), of which an ulp is taken. Where
    the true value is zero, as the gradient of a key's bias is, the ulp is one of the norm of `neighbour`, a tensor
    that it is a difference of.
    """
    assert ours.shape == truth.shape, f"{name}: shape {list(ours.shape)}, should be {list(truth.shape)}"
    truth = truth.detach().double()
    if truth.numel() == 0:
        return
    error, allowed = ((x.detach().double() - truth).norm() for x in (ours, theirs))
    largest = truth.abs().max() if neighbour is None else neighbour.detach().double().norm()
    allowed = 2 * allowed + ULPS * torch.finfo(dtype or ours.dtype).eps * largest
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}; norm {truth.norm():.3g}"


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Frobenius norm of the difference over that of `theirs`."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


def dropout_over(sequences: Sequences, p: float = 0.3, operation: int = 5) -> Dropout:
    """Dropout over the tokens of `sequences`, with a seed of its own."""
    seed = torch.tensor(0x0123_4567_89AB_CDEF, device=sequences.cu_seqlens.device)
    return Dropout(p, seed, operation, sequences.token_number, sequences.position)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normally distributed numbers, the same each time, that want a gradient."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def compare_with_torch(ours: Function, theirs: Function, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Hold the outputs and all gradients of `ours` in `dtype` to the rule; `inputs` are float64 and give the truth.

    Both are functions of the inputs to one tensor; their gradient is that of a sum with random weights.
    """
    rounded = [x.detach().to(dtype) for x in inputs]  # the truth is that of the very numbers that both get
    results = []
    for function, kind in ((ours, dtype), (theirs, dtype), (theirs, torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in rounded]
        output = function(*leaves)
        weights = normal(*output.shape, seed=1).detach().to(dtype).to(output.dtype)
        results.append([output, *torch.autograd.grad(output, leaves, weights)])
    for place, (our, their, truth) in enumerate(zip(*results, strict=True)):
        name = f"the gradient of input {place - 1}" if place else "the output"
        assert our.dtype == their.dtype, f"{name}: {our.dtype}, should be {their.dtype}"
        assert_as_accurate_as_torch(our, their, truth, name=name, dtype=dtype)
