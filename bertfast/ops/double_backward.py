"""Second derivatives of the operators: a backward pass that must be differentiable differentiates the reference.

The kernels compute first derivatives only. PyTorch enables gradient mode inside a backward pass exactly when that pass
must be differentiable (`create_graph=True`: gradient penalties, Hessian-vector products, MAML). The operator then
differentiates its reference at the same inputs, with the same dropout mask, which is a function of RNG coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def must_be_differentiable() -> bool:
    """Return whether the running backward pass must be differentiable.

    A compiled one never must: PyTorch does not support its second derivatives.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def reference_gradients(
    definition: Callable[..., Tensor | tuple[Tensor, ...]],
    arguments: Sequence[Any],
    needs_grad: Sequence[bool],
    d_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the gradients of `definition(*arguments)`, differentiable in the arguments and in `d_outputs`.

    Args:
        definition: The operator's reference; its differentiable outputs come first.
        arguments: The saved arguments: the tensors are still connected to their graph.
        needs_grad: Which arguments require a gradient.
        d_outputs: Gradients of the differentiable outputs; None for outputs that were not used.
    """
    # Views are separate nodes of the graph: if one argument was computed from another, the gradient of the latter must
    # not include the path through the former.
    views = [x.view_as(x) if needed else x for x, needed in zip(arguments, needs_grad, strict=True)]
    with torch.enable_grad():
        outputs = definition(*views)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    known = [(y, d_y) for y, d_y in zip(outputs, d_outputs, strict=False) if d_y is not None and y.requires_grad]
    differentiated = [view for view, needed in zip(views, needs_grad, strict=True) if needed]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in known], differentiated, [d_y for _, d_y in known], create_graph=True, allow_unused=True
        )
    )
    return [next(found) if needed else None for needed in needs_grad]
