"""`bertfast verify MODEL`: whether a model of one's own gives here what it gives in `transformers`."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tyro.conf import Positional

from bertfast.cli.compare import TextSettings, open_both, outputs

FACTOR, ULPS = 2, 8  # the rule of the project's own tests


@dataclass
class VerifySettings(TextSettings):
    """Which model, on which texts.

    Attributes:
        model_name_or_path: Folder or hub id of a BERT and its tokenizer.
    """

    model_name_or_path: Positional[str]


def verify(settings: VerifySettings) -> None:
    """Print the errors of both against a float64 truth; outputs and gradients, in fp32 and under bf16 autocast.

    An error is the Frobenius norm of all differences, each tensor's as a share of its own truth. Raises ValueError with
    the verdict where ours are over twice theirs.
    """
    both = open_both(settings.model_name_or_path, settings)
    truth = copy.deepcopy(both.theirs).double()
    lines, failed = [], []
    for precision, autocast in (("fp32", None), ("bf16", torch.bfloat16)):
        errors = torch.zeros(2, 2, dtype=torch.float64)  # outputs and gradients; ours and theirs
        for batch in both.batches:
            true = _outputs_and_gradients(truth, batch, None)
            for side, model in enumerate((both.ours, both.theirs)):
                found = _outputs_and_gradients(model, batch, autocast)
                for row in (0, 1):
                    errors[row, side] += _error(found[row], true[row])
        ulp = torch.finfo(autocast or torch.float32).eps
        for what, (ours, theirs) in zip(("outputs", "gradients"), errors.sqrt().tolist(), strict=True):
            within = ours <= FACTOR * theirs + ULPS * ulp
            lines.append(
                f"{precision} {what:10} ours {ours:.2e}  transformers {theirs:.2e}  {'ok' if within else 'WRONG'}"
            )
            if not within:
                failed.append(f"{what} in {precision}")
    print("\n".join(lines))
    if failed:
        raise ValueError(f"{', '.join(failed)} are less accurate than transformers': do not rely on this model here")
    texts = sum(len(batch["input_ids"]) for batch in both.batches)
    print(f"{settings.model_name_or_path} is as accurate here as in transformers, on {texts} texts.")


def _outputs_and_gradients(
    model: nn.Module, batch: dict[str, Tensor], autocast: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The outputs, and the gradients of their sum with fixed random weights."""
    model.zero_grad()
    found = outputs(model, batch, autocast)
    generator = torch.Generator().manual_seed(0)
    loss = sum((value * torch.randn(value.shape, generator=generator).to(value)).sum() for value in found.values())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in found.items()}, gradients


def _error(found: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """The squared relative errors of all tensors, summed; what is nothing but rounding in the truth is left out."""
    largest = max(float(value.norm()) for value in true.values())
    return sum(
        float(((found[name].double() - value).norm() / value.norm()) ** 2)
        for name, value in true.items()
        if name in found and float(value.norm()) > 1e-9 * largest
    )
