"""Optimizers: AdamW as in the BERT paper, LAMB for large batches, or Muon for matrices and AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import AdamW, Optimizer

from bertfast.runtime.precision import has_bf16_gemm
from bertfast.training.schedule import LR_SCALE

OptimizerName = Literal["adamw", "lamb", "muon"]

SKIPS_IN_A_ROW = 10  # steps without a finite loss and gradient after which a run stops

# The matrix of a head maps to labels or vocabulary entries, not from features to features: AdamW updates it.
_HEADS = ("decoder", "generator_lm_head", "vocab_projector", "seq_relationship", "classifier", "qa_outputs")
# Coefficients of the quintic polynomial of Jordan et al. (2024), chosen for the steepest slope at zero.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def build_optimizers(
    model: nn.Module,
    name: OptimizerName,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    scale_of: Callable[[str], float] = lambda name: 1.0,
) -> list[Optimizer]:
    """Return the optimizers that together update all trainable parameters of `model`.

    Args:
        model: Model that is trained.
        name: adamw, lamb or muon.
        learning_rate: Initial learning rate. It is kept as a tensor on the device of the parameters, which
            `set_learning_rate` changes and captured steps read.
        weight_decay: Weight decay of matrices; biases and LayerNorm parameters do not decay.
        betas: β1 and β2 of AdamW or LAMB.
        scale_of: Returns the factor of the learning rate of a parameter by its name.
    """
    # Parameters by the factor of their learning rate.
    matrices: dict[float, list[nn.Parameter]] = {}
    weights: dict[float, list[nn.Parameter]] = {}
    vectors: dict[float, list[nn.Parameter]] = {}
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2:
            of_kind = vectors
        elif name == "muon" and "embeddings" not in key and key.split(".")[-2] not in _HEADS:
            of_kind = matrices
        else:
            of_kind = weights
        of_kind.setdefault(scale_of(key), []).append(parameter)
    device = next(model.parameters()).device

    def groups(of_kind: dict[float, list[nn.Parameter]], decay: float) -> list[dict[str, Any]]:
        return [
            {
                "params": parameters,
                "weight_decay": decay,
                "lr": torch.tensor(learning_rate * scale, device=device),
                LR_SCALE: scale,
            }
            for scale, parameters in of_kind.items()
        ]

    others = groups(weights, weight_decay) + groups(vectors, 0.0)
    if name == "lamb":
        return [Lamb(others, learning_rate, betas)]
    adamw = AdamW(others, betas=betas, fused=True, capturable=device.type == "cuda")
    return [Muon(groups(matrices, weight_decay), learning_rate), adamw] if matrices else [adamw]


def step_if_finite(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    max_grad_norm: float,
    losses: Tensor,
    scaler: GradScaler | None = None,
    keep_gradients: bool = False,
) -> Tensor:
    """Clip the gradients, take a step unless something is not finite, and clear the gradients.

    It does not wait for the device.

    Args:
        model: Model with gradients.
        optimizers: Its optimizers.
        max_grad_norm: Gradient-clipping norm (0 = off).
        losses: Losses of the step, of any shape.
        scaler: Loss scaler in fp16; None: the loss was not scaled.
        keep_gradients: Set gradients to zero instead of None, as a captured step requires.

    Returns:
        Gradient norm before clipping, []; NaN if it or one of the losses was not finite: then no parameter and no
        optimizer state has changed.
    """
    if scaler is not None:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    finite = norm.isfinite() & losses.isfinite().all()
    # The optimizers divide by this as they read the gradients; clip_grad_norm_ would read and write them once more.
    divisor = ((norm + 1e-6) / max_grad_norm).clamp(min=1) if max_grad_norm else None
    for optimizer in optimizers:
        vars(optimizer).update(found_inf=(~finite).float(), grad_scale=divisor)  # PyTorch does not declare them
        optimizer.step()
    if scaler is not None:
        scaler.update()
    if keep_gradients and gradients:
        torch._foreach_zero_(gradients)  # a few launches; `zero_grad` has one per parameter
    else:
        model.zero_grad()
    return torch.where(finite, norm, torch.nan)


def not_finite(loss: float, device: torch.device) -> str:
    """Return what was not finite in a skipped step with this loss.

    A label outside of the vocabulary raises an error on a CPU. On a GPU, where a check would have to wait for the
    device, it makes the loss NaN.
    """
    if math.isfinite(loss):
        return "a gradient is not finite"
    if device.type == "cpu" or not math.isnan(loss):
        return f"the loss is {loss}"
    return "the loss is NaN, as a label outside of the vocabulary makes it on a GPU: on a CPU an error names the label"


def remedy_for(any_step_taken: bool, rate_flag: str = "--learning-rate") -> str:
    """Return what to do about skipped steps: as long as no step was taken, the learning rate is not the cause."""
    if any_step_taken:
        return f"lower {rate_flag}"
    return "no step was taken yet, so the initial weights are the cause: choose another model, or --precision fp32"


class _Skips(Optimizer):
    """Optimizer that changes nothing in a step in which `found_inf` is 1, like PyTorch's fused optimizers.

    Like these, it divides gradients by `grad_scale`.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def _kept(self) -> Tensor:
        """Return 1, or 0 if the step is skipped, fp32 []."""
        return torch.ones(()) if self.found_inf is None else 1 - self.found_inf

    def _gradient(self, parameter: Tensor) -> Tensor:
        """Return the gradient of a parameter, or zeros if the step is skipped."""
        assert parameter.grad is not None
        gradient = parameter.grad if self.grad_scale is None else parameter.grad / self.grad_scale
        return gradient if self.found_inf is None else torch.where(self.found_inf > 0, 0, gradient)


class Lamb(_Skips):
    """LAMB (You et al., 2020): AdamW with steps whose norm is proportional to that of the weight, for large batches.

    Groups without weight decay (biases and LayerNorm parameters) take AdamW's step, as in the authors' code.

    Args:
        groups: Parameter groups.
        learning_rate: Learning rate.
        betas: β1 and β2.
        eps: Added to the root of the second moment.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        learning_rate: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ):
        super().__init__(groups, {"lr": learning_rate, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            kept, (beta1, beta2) = self._kept(), group["betas"]
            gradients, states = [self._gradient(p) for p in parameters], [self._state_of(p) for p in parameters]
            counts, means, squares = ([state[name] for state in states] for name in ("count", "mean", "square"))
            torch._foreach_add_(counts, kept, alpha=1)  # without alpha, the host would read kept
            count = counts[0].clamp(min=1)  # it is 0 if the very first step is skipped
            _move(means, gradients, (1 - beta1) * kept)
            _move(squares, torch._foreach_mul(gradients, gradients), (1 - beta2) * kept)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_div_(roots, (1 - beta2**count).sqrt())
            torch._foreach_add_(roots, group["eps"])
            updates = torch._foreach_div(means, roots)
            torch._foreach_div_(updates, 1 - beta1**count)
            if group["weight_decay"]:
                torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
                norms = zip(torch._foreach_norm(parameters), torch._foreach_norm(updates), strict=True)
                # The ratio is undefined for a weight or an update of zero: then AdamW's step is taken.
                ratios = [torch.where((weight > 0) & (step > 0), weight / step, 1.0) for weight, step in norms]
                torch._foreach_mul_(updates, ratios)
            torch._foreach_mul_(updates, group["lr"] * kept)
            torch._foreach_sub_(parameters, updates)
        return loss

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state |= {"count": parameter.new_zeros(()), "mean": torch.zeros_like(parameter)}
            state["square"] = torch.zeros_like(parameter)
        return state


def _move(values: list[Tensor], towards: list[Tensor] | tuple[Tensor, ...], weight: Tensor) -> None:
    """Interpolate linearly, in place, with a weight on the device; the host would read it in PyTorch's function."""
    differences = torch._foreach_sub(towards, values)
    torch._foreach_mul_(differences, weight)
    torch._foreach_add_(values, differences)


class Muon(_Skips):
    """Muon (Jordan et al., 2024): momentum, orthogonalised by Newton-Schulz iterations, for matrices.

    Equal to `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, but all matrices of one shape are updated in one
    batch, and in fp32 if the device has no native bf16 GEMMs, where PyTorch's is several times slower (`bench/LOG.md`).

    Args:
        matrices: Parameters, or parameter groups.
        learning_rate: Learning rate.
        weight_decay: Weight decay.
        momentum: Decay of the momentum.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        learning_rate: float | Tensor,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ):
        super().__init__(matrices, {"lr": learning_rate, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every matrix that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            matrices = sorted((p for p in group["params"] if p.grad is not None), key=_shape)
            for (rows, columns), of_shape in groupby(matrices, _shape):
                parameters = list(of_shape)
                update = _orthogonalised(torch.stack([self._momentum(p, group["momentum"]) for p in parameters]))
                # The root mean square of an orthogonal matrix is 1 / sqrt(max(rows, columns)), of AdamW's steps 0.2.
                rate = group["lr"] * self._kept()
                for parameter, direction in zip(parameters, update, strict=True):
                    parameter.mul_(1 - rate * group["weight_decay"])
                    parameter.sub_(rate * 0.2 * max(rows, columns) ** 0.5 * direction)
        return loss

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = self._gradient(parameter)
        state["momentum"].lerp_(gradient, (1 - momentum) * self._kept())
        return gradient.lerp(state["momentum"], momentum)  # Nesterov momentum


def _shape(parameter: Tensor) -> tuple[int, int]:
    rows, columns = parameter.shape
    return rows, columns


def _orthogonalised(x: Tensor, iterations: int = 5) -> Tensor:
    """Return approximately the nearest semi-orthogonal matrices of x [N, rows, columns], in its dtype."""
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
