"""`bertfast verify MODEL`: check that a model is as accurate in bertfast as in `transformers`."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from tyro.conf import Positional

from bertfast.cli.compare import Comparison, TextSettings, open_both, outputs
from bertfast.inference.int8_speed import log_int8_speed
from bertfast.models.freeze import freeze, require_freezable
from bertfast.models.quantize import FEW_TOKENS, quantise_model
from bertfast.ops import native
from bertfast.runtime.precision import choose_precision
from bertfast.runtime.settings import counted

FACTOR, ULPS = 2, 8  # the accuracy rule of the project's own tests
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}
QUANTITIES = ("outputs", "gradients", "frozen")
# In int8, of the cosines between a text's vectors in int8 and in fp32: the smallest mean and first percentile.
MEAN_COSINE, LOW_COSINE = 0.999, 0.99

logger = logging.getLogger("bertfast")


@dataclass(frozen=True)
class VerifySettings(TextSettings):
    """Which model to check, on which texts.

    Attributes:
        model_name_or_path: Folder or hub id of a model and its tokenizer.
        precision: auto: fp32, and bf16 by autocast; or one of them; or int8, on a CPU, calibrated on the first batch.
    """

    model_name_or_path: Positional[str]
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"


def verify(settings: VerifySettings) -> None:
    """Print the errors of bertfast and transformers against a float64 reference, in fp32 and under bf16 autocast.

    The error of the outputs (or gradients) is the square root of the sum, over batches and tensors, of the squared
    Frobenius norm of the difference, relative to that of the tensor's true value. On a CPU, the outputs are also those
    of the frozen model, which other commands run there.

    Raises:
        ValueError: An error of bertfast is larger than twice that of transformers plus a few ulps; or in int8 the
            vectors of texts differ too much from those in fp32.
    """
    both = open_both(settings.model_name_or_path, settings)
    texts = counted(sum(len(batch["input_ids"]) for batch in both.batches), "text")
    if settings.precision == "int8":
        _verify_int8(both)
        print(f"{settings.model_name_or_path} keeps its accuracy in int8, on {texts}.")
        return
    reference = copy.deepcopy(both.hf).double()
    lines, failed = [], []
    for precision in AUTOCAST if settings.precision == "auto" else (settings.precision,):
        autocast = AUTOCAST[precision]
        ulp = torch.finfo(autocast or torch.float32).eps
        errors = _errors(both, reference, autocast)
        for quantity, (error, hf_error) in zip(QUANTITIES, errors.tolist(), strict=False):
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
    print(f"{settings.model_name_or_path} is as accurate in bertfast as in transformers, on {texts}.")


def _verify_int8(both: Comparison) -> None:
    """Print the cosines between the vectors of texts in int8 and in fp32: the mean of a text's token vectors."""
    choose_precision(both.batches[0]["input_ids"].device, "int8")  # raises where there is no int8
    model = copy.deepcopy(both.bertfast)
    require_freezable(model)
    first = both.batches[0]
    if (count := len(first["input_ids"].unique())) < FEW_TOKENS:
        logger.warning(
            "the first batch has only %s, too few to calibrate int8: give a file with more and longer texts in "
            "--input-file",
            counted(count, "different token"),
        )
    for name, why in quantise_model(model, {"the first batch": lambda: model(**first)}).left.items():
        print(f"{name}: {why}")
    log_int8_speed(model, int(first["attention_mask"].sum()))
    cosines = torch.cat(
        [torch.cosine_similarity(_text_vectors(model, x), _text_vectors(both.hf, x)) for x in both.batches]
    )
    mean, low = float(cosines.mean()), float(cosines.quantile(0.01))
    passed = mean >= MEAN_COSINE and low >= LOW_COSINE  # not with NaN
    print(f"int8 cosine with fp32   mean {mean:.5f}  first percentile {low:.5f}  {'ok' if passed else 'FAILED'}")
    if not passed:
        raise ValueError(
            f"in int8 the vectors of texts differ from those in fp32 by more than a mean cosine of {MEAN_COSINE} and a "
            f"first percentile of {LOW_COSINE}: use this model with --precision bf16 or fp32"
        )


@torch.no_grad()
def _text_vectors(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the means over the tokens of each text of the last hidden states, [texts, H]."""
    base: nn.Module = getattr(model, "base_model", model)
    mask = batch["attention_mask"][..., None]
    hidden: Tensor = base(**batch).last_hidden_state
    return (hidden * mask).sum(1) / mask.sum(1)


def _errors(both: Comparison, reference: nn.Module, autocast: torch.dtype | None) -> Tensor:
    """Return the errors over all batches, float64 [quantity, library]: QUANTITIES by bertfast and hf.

    The last quantity, the outputs of the frozen model, is left out where models cannot be frozen.
    """
    is_on_cpu = both.batches[0]["input_ids"].device.type == "cpu"
    frozen = copy.deepcopy(both.bertfast) if is_on_cpu and native.UNAVAILABLE_REASON is None else None
    if frozen is not None:
        freeze(frozen, "fp32" if autocast is None else "bf16")
    squared = torch.zeros(2 if frozen is None else 3, 2, dtype=torch.float64)
    for batch in both.batches:
        true = _outputs_and_gradients(reference, batch, None)
        for library, model in enumerate((both.bertfast, both.hf)):
            results = _outputs_and_gradients(model, batch, autocast)
            for quantity in (0, 1):
                squared[quantity, library] += _squared_error(results[quantity], true[quantity])
        if frozen is not None:
            squared[2, 0] += _squared_error(outputs(frozen, batch, autocast), true[0])
    if frozen is not None:
        squared[2, 1] = squared[0, 1]
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
