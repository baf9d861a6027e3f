"""The optimizers of a run: AdamW as in the paper, LAMB for large batches, or Muon for the matrices with AdamW for the
rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from bertfast.runtime.precision import has_bf16_gemm

OptimizerName = Literal["adamw", "lamb", "muon"]

SKIPS_IN_A_ROW = 10  # steps without a finite loss and gradient after which a run stops

# A head's matrix maps to labels or words, not from features to features: it stays with AdamW.
_HEADS = ("decoder", "seq_relationship", "classifier", "qa_outputs")
# The quintic of Jordan et al. (2024), whose slope at zero is as steep as it gets.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def build_optimizers(
    model: nn.Module,
    name: OptimizerName,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> list[Optimizer]:
    """Optimizers that together own every parameter of `model` that takes a gradient.

    Weights decay by `weight_decay`, biases and LayerNorms do not. The rate is a tensor on the parameters' device, where
    `set_learning_rate` changes it and a captured step reads it.
    """
    matrices, weights, vectors = [], [], []
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2:
            vectors.append(parameter)
        elif name == "muon" and "embeddings" not in key and key.split(".")[-2] not in _HEADS:
            matrices.append(parameter)
        else:
            weights.append(parameter)
    groups = [{"params": weights, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    device = next(model.parameters()).device
    rate = torch.tensor(learning_rate, device=device)
    if name == "lamb":
        return [Lamb(groups, rate, betas)]
    adamw = AdamW(groups, lr=rate, betas=betas, fused=True, capturable=device.type == "cuda")
    return [Muon(matrices, rate, weight_decay), adamw] if matrices else [adamw]


def step_if_finite(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    max_grad_norm: float,
    losses: Tensor,
    scaler: GradScaler | None = None,
    keep_gradients: bool = False,
) -> Tensor:
    """Clip the gradients to `max_grad_norm` (0: not at all), take a step, clear the gradients; waits for no device.

    Returns the gradients' norm before it was clipped, []: NaN where that, or one of `losses`, was not finite, and then
    nothing has moved. `scaler` is fp16's, by which the loss was multiplied. `keep_gradients` leaves zeros where the
    gradients are, for a step that is captured.
    """
    for optimizer in optimizers if scaler is not None else ():
        scaler.unscale_(optimizer)
    norm = clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    finite = norm.isfinite() & losses.isfinite().all()
    for optimizer in optimizers:
        optimizer.found_inf = (~finite).float()
        optimizer.step()
    if scaler is not None:
        scaler.update()
    model.zero_grad(set_to_none=not keep_gradients)
    return torch.where(finite, norm, torch.nan)


def not_finite(loss: float, device: torch.device) -> str:
    """Say what is not finite in a step that was skipped, whose loss was read.

    A label outside of the vocabulary raises on a CPU. On a GPU, where a check would wait, it makes the loss NaN.
    """
    if math.isfinite(loss):
        return "a gradient is not finite"
    if device.type == "cpu" or not math.isnan(loss):
        return f"the loss is {loss}"
    return "the loss is NaN, as a label outside of the vocabulary makes it on a GPU: on a CPU an error names the label"


class _Skips(Optimizer):
    """An optimizer that does not move where `found_inf` is 1, as the library's fused ones do not."""

    found_inf: Tensor | None = None

    def _kept(self) -> Tensor:
        """1, or 0 where nothing shall move: fp32 []."""
        return torch.ones(()) if self.found_inf is None else 1 - self.found_inf

    def _gradient(self, parameter: Tensor) -> Tensor:
        return parameter.grad if self.found_inf is None else torch.where(self.found_inf > 0, 0, parameter.grad)


class Lamb(_Skips):
    """AdamW whose step for each weight is as long as a share of that weight (You et al., 2020), for large batches.

    Groups that do not decay, biases and LayerNorms, take AdamW's step, as in the authors' code.
    """

    def __init__(
        self, groups, learning_rate: float | Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6
    ):
        super().__init__(groups, {"lr": learning_rate, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            kept, (beta1, beta2) = self._kept(), group["betas"]
            gradients, states = [self._gradient(p) for p in parameters], [self._state_of(p) for p in parameters]
            counts, means, squares = ([state[name] for state in states] for name in ("count", "mean", "square"))
            torch._foreach_add_(counts, kept, alpha=1)  # without alpha it would ask for kept's value
            count = counts[0].clamp(min=1)  # where the very first step is skipped
            _move(means, gradients, (1 - beta1) * kept)
            _move(squares, torch._foreach_mul(gradients, gradients), (1 - beta2) * kept)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_div_(roots, (1 - beta2**count).sqrt())
            torch._foreach_add_(roots, group["eps"])
            updates = torch._foreach_div(means, roots)
            torch._foreach_div_(updates, 1 - beta1**count)
            if group["weight_decay"]:
                torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
                lengths = zip(torch._foreach_norm(parameters), torch._foreach_norm(updates), strict=True)
                # A weight or an update of zero leaves no share to speak of: the plain step.
                shares = [torch.where((own > 0) & (step > 0), own / step, 1.0) for own, step in lengths]
                torch._foreach_mul_(updates, shares)
            torch._foreach_mul_(updates, group["lr"] * kept)
            torch._foreach_sub_(parameters, updates)
        return loss

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state |= {"count": parameter.new_zeros(()), "mean": torch.zeros_like(parameter)}
            state["square"] = torch.zeros_like(parameter)
        return state


def _move(values: list[Tensor], towards: list[Tensor], weight: Tensor) -> None:
    """Linear interpolation in place, by a weight that is on the device, where the library's would ask for its value."""
    differences = torch._foreach_sub(towards, values)
    torch._foreach_mul_(differences, weight)
    torch._foreach_add_(values, differences)


class Muon(_Skips):
    """Momentum, orthogonalised by Newton-Schulz iterations (Jordan et al., 2024), for matrices.

    `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, computed for all matrices of a shape in one batch, and in
    fp32 where the device does not multiply bf16 natively: there the library's is several times slower
    (`bench/LOG.md`).
    """

    def __init__(self, matrices, learning_rate: float | Tensor, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(matrices, {"lr": learning_rate, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        """Update every matrix that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            matrices = sorted((p for p in group["params"] if p.grad is not None), key=_shape)
            for (rows, columns), same in groupby(matrices, _shape):
                same = list(same)
                update = _orthogonalised(torch.stack([self._momentum(p, group["momentum"]) for p in same]))
                # An orthogonal matrix's entries have root mean square 1 / sqrt(max(rows, columns)); AdamW's about 0.2.
                rate = group["lr"] * self._kept()
                for parameter, direction in zip(same, update, strict=True):
                    parameter.mul_(1 - rate * group["weight_decay"])
                    parameter.sub_(rate * 0.2 * max(rows, columns) ** 0.5 * direction)
        return loss

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = self._gradient(parameter)
        state["momentum"].lerp_(gradient, (1 - momentum) * self._kept())
        return gradient.lerp(state["momentum"], momentum)  # Nesterov's


def _shape(parameter: Tensor) -> tuple[int, int]:
    return tuple(parameter.shape)


def _orthogonalised(x: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, of x [N, rows, columns], in x's dtype."""
    dtype = x.dtype
    if x.shape[1] > x.shape[2]:
        return _orthogonalised(x.mT, iterations).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if has_bf16_gemm(x.device):
        x = x.bfloat16()
    a, b, c = _QUINTIC
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(dtype)
