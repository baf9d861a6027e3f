"""`bertfast.quantize(model)`: int8 weights and activations for inference on a CPU.

Weights have one scale per output channel, tokens a scale and a zero point each, which are computed when they are
multiplied. Calibration moves the range of input channels with outliers from the activations to the weights: the scale
migration of SmoothQuant (Xiao et al., 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bertfast.architectures import part_at
from bertfast.encoder import is_plain
from bertfast.encoder.linear import stacked
from bertfast.models.freeze import fused_encoders, linear_groups, replace_linears, require_freezable
from bertfast.models.patch import PatchReport, patch, require_module
from bertfast.models.quantised_files import mark
from bertfast.ops.packed_linear import PackedWeight, pack, quantise

ALPHA = 0.5  # share of the range, in powers, that moves to the weights
_SMALLEST = 0.01  # of the mean over channels: what a maximum counts at least, as calibration may not reach a channel
_RANDOM_TOKENS = 32, 32  # sequences and their tokens, which calibrate almost as well as texts
_MAX_DEPTH = 2**31 // (255 * 127)  # of a sum in 32 bits


def quantize(model: nn.Module, calibration: Sequence[Mapping[str, Any]] | None = None) -> PatchReport:
    """Quantise a model to int8 for inference on a CPU, in place: fuse it, and quantise its encoders' linear layers.

    A quantised model is a frozen one, see `bertfast.freeze`: it refuses training, other weights, dtypes and devices.
    `save_pretrained` writes its int8 weights, which the Auto classes and the programs of bertfast open. What is not a
    linear layer of an encoder, such as heads, stays as it is.

    Args:
        model: A model of transformers, or any module that holds one; fp32 or bf16, on a CPU.
        calibration: A few batches of typical inputs, dictionaries of the arguments of the model's `forward`. They show
            which channels of activations have outliers, whose range then moves to the weights. None: sequences of
            random tokens.

    Returns:
        The report, as `bertfast.report` returns it; it names linear layers that could not be quantised.

    Raises:
        TypeError: `model` is not a module, or `calibration` is not a list of dictionaries.
        ValueError: The model holds no supported encoder, is frozen already, or has another device or dtype; or there is
            no native library. Nothing has been changed then.
    """
    require_module("quantize", model)
    require_freezable(model)
    if calibration is None:
        return quantise_model(model, partial(_run_on_random_tokens, model))
    if not isinstance(calibration, Sequence) or not all(isinstance(batch, Mapping) for batch in calibration):
        raise TypeError(
            "quantize: calibration must be a list of batches, each a dictionary of the arguments of the model's "
            "forward, such as input_ids and attention_mask"
        )
    if not calibration:
        raise ValueError("quantize: calibration has no batch: give a few, or None for random tokens")

    def run() -> None:
        for batch in calibration:
            model(**batch)

    return quantise_model(model, run)


def quantise_model(model: nn.Module, run: Callable[[], object]) -> PatchReport:
    """Quantise a model that can be frozen; see `quantize`.

    Args:
        model: The model.
        run: Runs the fused model on typical inputs.
    """
    patch(model)
    maxima = _input_maxima(model, run)

    def packed(linears: list[nn.Linear]) -> PackedWeight:
        weight, bias = stacked(linears)
        if weight.shape[1] > _MAX_DEPTH or not bool(weight.isfinite().all()):
            return pack(weight, bias)
        return quantise(weight, bias, _factors(weight, [maxima.pop(linear, None) for linear in linears]))

    result = replace_linears(model, packed)
    mark(model)
    return result


def _run_on_random_tokens(model: nn.Module) -> None:
    for encoder in fused_encoders(model):
        length = min(_RANDOM_TOKENS[1], encoder.architecture.max_positions(encoder.config))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(encoder.config.vocab_size, (_RANDOM_TOKENS[0], length), generator=generator)
        encoder(input_ids=ids, attention_mask=torch.ones_like(ids))


@torch.no_grad()
def _input_maxima(model: nn.Module, run: Callable[[], object]) -> dict[nn.Module, Tensor]:
    """Return the largest |x| of each input channel, fp32 [K], of the linear layers in a model's encoder layers."""
    maxima: dict[nn.Module, Tensor] = {}

    def observe(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
        if len(x):
            largest = x.abs().amax(0).float()
            maxima[module] = torch.maximum(maxima[module], largest) if module in maxima else largest

    parts = [part_at(layer, path) for layer, paths in linear_groups(model) for path in paths]
    training = model.training
    model.eval()
    hooks = [part.register_forward_pre_hook(observe) for part in parts if is_plain(part)]
    try:
        run()
    except BaseException:
        model.train(training)
        raise
    finally:
        for hook in hooks:
            hook.remove()
    return maxima


def _factors(weight: Tensor, maxima: list[Tensor | None]) -> Tensor | None:
    """Return the factors of the input channels of layers with a common input, fp32 [K].

    Args:
        weight: The weights of all layers, [N, K].
        maxima: The largest |x| by input channel that each layer has seen; None: it was not run.

    Returns:
        max|W|^(1 - ALPHA) / max|x|^ALPHA; None: 1, as a layer was not run, or on values that are not finite.
    """
    known = [each for each in maxima if each is not None]
    if len(known) < len(maxima):
        return None
    largest = [torch.stack(known).amax(0), weight.detach().abs().amax(0).float()]
    # A channel that is always zero gets a neighbour's factor: only the ratios between factors matter.
    x, w = (each.clamp(min=_SMALLEST * float(each.mean())) for each in largest)
    factors = w ** (1 - ALPHA) / x**ALPHA
    return factors if bool((factors.isfinite() & (factors > 0)).all()) else None
