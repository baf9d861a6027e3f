"""`bertfast.quantize(model)`: int8 weights and activations for inference on a CPU.

Weights have one scale per output channel, tokens a scale and a zero point each, which are computed when they are
multiplied. Calibration moves the range of input channels with outliers from the activations to the weights: the scale
migration of SmoothQuant (Xiao et al., 2023).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from bertfast.architectures import part_at
from bertfast.encoder import is_plain
from bertfast.encoder.linear import stacked
from bertfast.encoder.packed_linear import is_frozen
from bertfast.models.freeze import fused_encoders, linear_groups, replace_linears, report_frozen, require_freezable
from bertfast.models.patch import PatchReport, fusable_encoders, patch, require_module
from bertfast.models.quantised_config import mark
from bertfast.models.registry import Fused, unfuse
from bertfast.ops.packed_linear import PackedWeight, pack, quantise
from bertfast.runtime.settings import counted

ALPHA = 0.5  # exponent of SmoothQuant: both the activations and the weights of a channel get the same range
_SMALLEST = 0.01  # of the mean over channels: what a maximum counts at least, as calibration may not reach a channel
_RANDOM_TOKENS = 32, 32  # sequences and their tokens, which calibrate almost as well as texts
FEW_TOKENS = 32  # different ones, below which a calibration does not show the range of activations
_MAX_DEPTH = 2**31 // (255 * 127)  # of a sum in 32 bits

logger = logging.getLogger("bertfast")

Runs = Mapping[str, Callable[[], object]]
"""What runs a fused model on the batches of a calibration, by names of the batches for messages."""


def quantize(model: nn.Module, calibration: Sequence[Mapping[str, Any]] | None = None) -> PatchReport:
    """Quantise a model to int8 for inference on a CPU, in place: fuse it, and quantise its encoders' linear layers.

    A quantised model is a frozen one, see `bertfast.freeze`: it refuses training, other weights, dtypes and devices.
    `save_pretrained` writes its int8 weights, which the Auto classes and the programs of bertfast open. What is not a
    linear layer of an encoder, such as heads, stays as it is.

    Args:
        model: A model of transformers, or any module that holds one; fp32 or bf16, on a CPU. One that is quantised
            already stays as it is.
        calibration: A few batches of typical inputs, dictionaries of the arguments of the model's `forward`, or what it
            takes as its one argument, such as what `preprocess` or `tokenize` of a SentenceTransformer returns. They
            show which channels of activations have outliers, whose range then moves to the weights; a warning says
            if they have very few different tokens. None: sequences of random tokens.

    Returns:
        The report, as `bertfast.report` returns it; it names linear layers that could not be quantised.

    Raises:
        TypeError: `model` is not a module, or `calibration` is not a list of dictionaries of tensors.
        ValueError: The model holds no supported encoder, is frozen in fp32 or bf16, or has another device or dtype; or
            there is no native library; or `calibration` has ids outside the vocabulary, or activations that are NaN or
            infinite although the weights are finite. Nothing has been changed then, and neither if the model's
            `forward` raises another error on a batch.
    """
    require_module("quantize", model)
    if is_frozen(model):
        return report_frozen(model, "int8")
    require_freezable(model)
    if calibration is None:
        return quantise_model(model, random_tokens(model))
    if not isinstance(calibration, Sequence) or not all(isinstance(batch, Mapping) for batch in calibration):
        raise TypeError(
            "quantize: calibration must be a list of batches, each a dictionary of the arguments of the model's "
            "forward, such as input_ids and attention_mask"
        )
    if not calibration:
        raise ValueError("quantize: calibration has no batch: give a few, or None for random tokens")
    vocab_size = max((encoder.config.vocab_size for encoder in fusable_encoders(model)), default=None)
    batches = {f"calibration[{n}]": batch for n, batch in enumerate(calibration)}
    for name, batch in batches.items():
        _require_tensors(name, batch, vocab_size)
    result = quantise_model(model, {name: partial(_run_on_batch, model, batch) for name, batch in batches.items()})
    ids = [*_input_ids(calibration)]
    if ids and (count := len(torch.cat(ids).unique())) < FEW_TOKENS:
        logger.warning(
            "quantize: calibration has %s, too few to show the range of activations: give a few dozen typical texts, "
            "or leave it out, for random tokens",
            counted(count, "different token"),
        )
    return result


def _input_ids(batches: Iterable[Mapping[str, Any]]) -> Iterator[Tensor]:
    """Yield the token ids of batches, each flat."""
    for batch in batches:
        yield from _input_ids(x for x in batch.values() if isinstance(x, Mapping))
        ids = batch.get("input_ids")
        if isinstance(ids, Tensor) and ids.is_cpu:
            yield ids.flatten()


def random_tokens(model: nn.Module) -> Runs:
    """Return what runs a fused model on sequences of random tokens."""
    return {"random tokens": partial(_run_on_random_tokens, model)}


def _run_on_batch(model: nn.Module, batch: Mapping[str, Any]) -> None:
    # Copies of dictionaries, as the modules of a SentenceTransformer add their results.
    arguments = {name: dict(x) if isinstance(x, Mapping) else x for name, x in batch.items()}
    parameters = signature(model.forward).parameters.values()
    positional = [x for x in parameters if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)]
    required = [x.name for x in positional if x.default is x.empty]
    takes_dictionary = len(required) == 1 and required[0] not in ("input_ids", *arguments)
    _ = model(arguments) if takes_dictionary else model(**arguments)


def _require_tensors(name: str, batch: Mapping[str, Any], vocab_size: int | None) -> None:
    for key, value in batch.items():
        if isinstance(value, Mapping):
            _require_tensors(f"{name}[{key!r}]", value, vocab_size)
        elif not isinstance(value, Tensor | int | str | None):  # flags such as return_dict, too
            raise TypeError(f"quantize: {name}[{key!r}] is a {type(value).__name__}: pass a tensor")
    ids = batch.get("input_ids")
    if vocab_size is None or not isinstance(ids, Tensor) or ids.is_floating_point() or not ids.is_cpu:
        return
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise ValueError(
            f"quantize: {name}['input_ids'] has the id {int(outside[0])}, and those of the model's vocabulary are "
            f"0 … {vocab_size - 1}: use the model's own tokenizer"
        )


def quantise_model(model: nn.Module, runs: Runs) -> PatchReport:
    """Quantise a model that can be frozen; see `quantize`.

    Args:
        model: The model.
        runs: Run the fused model on typical inputs.

    Raises:
        ValueError: Activations are NaN or infinite although the weights are finite; or what a run raises. Nothing has
            been changed then.
    """
    with _unchanged_by_errors(model):
        patch(model)
        maxima = _input_maxima(model, runs)

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


@contextmanager
def _unchanged_by_errors(model: nn.Module) -> Iterator[None]:
    """Restore the classes and modes of a model's modules after an error."""
    modes = {module: module.training for module in model.modules()}
    fused = {module for module in modes if isinstance(module, Fused)}
    try:
        yield
    except BaseException:
        unfuse(model, fused)
        for module, mode in modes.items():
            module.training = mode
        raise


@torch.no_grad()
def _input_maxima(model: nn.Module, runs: Runs) -> dict[nn.Module, Tensor]:
    """Return the largest |x| of each input channel, fp32 [K], of the linear layers in a model's encoder layers."""
    maxima: dict[nn.Module, Tensor] = {}

    def observe(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
        if len(x):
            largest = x.abs().amax(0).float()
            maxima[module] = torch.maximum(maxima[module], largest) if module in maxima else largest

    parts = [part_at(layer, path) for layer, paths in linear_groups(model) for path in paths]
    model.eval()
    hooks = [part.register_forward_pre_hook(observe) for part in parts if is_plain(part)]
    try:
        for name, run in runs.items():
            run()
            _require_finite(model, maxima, name)
    finally:
        for hook in hooks:
            hook.remove()
    return maxima


def _require_finite(model: nn.Module, maxima: Mapping[nn.Module, Tensor], name: str) -> None:
    """Check that a batch has finite activations, unless weights that are not finite explain those that are not."""
    if all(bool(largest.isfinite().all()) for largest in maxima.values()):
        return
    if all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise ValueError(
            f"quantize: {name} gives the encoder activations that are NaN or infinite: leave that batch out, or "
            "correct it"
        )


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
