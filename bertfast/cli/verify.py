"""`bertfast verify MODEL`: check that a model is as accurate in bertfast as in `transformers`."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tyro.conf import Positional

from bertfast.cli.compare import Comparison, TextSettings, open_both, outputs
from bertfast.runtime.settings import counted

FACTOR, ULPS = 2, 8  # the accuracy rule of the project's own tests
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}
QUANTITIES = ("outputs", "gradients")


@dataclass(frozen=True)
class VerifySettings(TextSettings):
    """Which model to check, on which texts.

    Attributes:
        model_name_or_path: Folder or hub id of a model and its tokenizer.
    """

    model_name_or_path: Positional[str]


def verify(settings: VerifySettings) -> None:
    """Print the errors of bertfast and transformers against a float64 reference, in fp32 and under bf16 autocast.

    The error of the outputs (or gradients) is the square root of the sum, over batches and tensors, of the squared
    Frobenius norm of the difference, relative to that of the tensor's true value.

    Raises:
        ValueError: An error of bertfast is larger than twice that of transformers plus a few ulps.
    """
    both = open_both(settings.model_name_or_path, settings)
    reference = copy.deepcopy(both.hf).double()
    lines, failed = [], []
    for precision, autocast in AUTOCAST.items():
        ulp = torch.finfo(autocast or torch.float32).eps
        errors = _errors(both, reference, autocast)
        for quantity, (error, hf_error) in zip(QUANTITIES, errors.tolist(), strict=True):
            passed = error <= FACTOR * hf_error + ULPS * ulp
            lines.append(
                f"{precision} {quantity:10} bertfast {error:.2e}  transformers {hf_error:.2e}  "
                f"{'ok' if passed else 'FAILED'}"
            )
            if not passed:
                failed.append(f"{quantity} in {precision}")
    print("\n".join(lines))
    if failed:
        raise ValueError(
            f"{', '.join(failed)} are less accurate than in transformers: do not use this model with bertfast on this "
            "machine, and please report the lines above"
        )
    texts = counted(sum(len(batch["input_ids"]) for batch in both.batches), "text")
    print(f"{settings.model_name_or_path} is as accurate in bertfast as in transformers, on {texts}.")


def _errors(both: Comparison, reference: nn.Module, autocast: torch.dtype | None) -> Tensor:
    """Return the errors over all batches, float64 [quantity, library]: outputs and gradients; bertfast and hf."""
    squared = torch.zeros(2, 2, dtype=torch.float64)
    for batch in both.batches:
        true = _outputs_and_gradients(reference, batch, None)
        for library, model in enumerate((both.bertfast, both.hf)):
            results = _outputs_and_gradients(model, batch, autocast)
            for quantity in (0, 1):
                squared[quantity, library] += _squared_error(results[quantity], true[quantity])
    return squared.sqrt()


def _outputs_and_gradients(
    model: nn.Module, batch: dict[str, Tensor], autocast: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the outputs, and the gradients of their sum weighted with fixed random numbers."""
    model.zero_grad()
    results = outputs(model, batch, autocast)
    generator = torch.Generator().manual_seed(0)
    torch.autograd.backward(
        [(value * torch.randn(value.shape, generator=generator).to(value)).sum() for value in results.values()]
    )
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in results.items()}, gradients


def _squared_error(results: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """Return the sum of squared relative errors; tensors that are only rounding noise in the reference are left out."""
    largest = max(float(value.norm()) for value in true.values())
    return sum(
        float(((results[name].double() - value).norm() / value.norm()) ** 2)
        for name, value in true.items()
        if name in results and float(value.norm()) > 1e-9 * largest
    )
