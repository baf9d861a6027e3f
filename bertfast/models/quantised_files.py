"""The files of quantised models: int8 values, scales and factors, under names that nothing takes for weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bertfast.encoder.linear import stacked
from bertfast.encoder.packed_linear import INT8_FACTORS, INT8_SCALES, INT8_VALUES
from bertfast.models.freeze import replace_linears, require_freezable
from bertfast.models.quantised_config import mark
from bertfast.models.weights import Weights, read_weights, require_floating_point
from bertfast.ops.packed_linear import PackedWeight, dequantise, pack, packed_int8

Quantised = dict[str, tuple[Tensor, Tensor, Tensor | None]]
"""Values, scales and factors of quantised linear layers, see `PackedWeight`, by their names."""


def read_dequantised(
    folder: Path, name: str, variant: str | None = None, *, takes_quantised: bool = True
) -> tuple[Weights, Quantised]:
    """Read the weights of a folder, of which the quantised ones are dequantised.

    Args:
        folder: Folder of the model.
        name: That, or its hub id, for messages.
        variant: See `read_weights`.
        takes_quantised: Whether there may be quantised weights.

    Returns:
        The weights, and the layers that were quantised.

    Raises:
        FileNotFoundError: There are no weights.
        ValueError: They are damaged, of another type, or not finite; or they are quantised, and may not be.
    """
    weights = read_weights(folder, variant)
    quantised = _take_quantised(weights, name)
    if quantised and not takes_quantised:
        raise ValueError(
            f"{name} is quantised to int8, which `bertfast predict`, `embed`, `search`, `fill-mask` and `evaluate "
            "--objective task` run: give the model from which it was made"
        )
    require_floating_point(weights, name)
    damaged = next((key for key, x in weights.items() if x.is_floating_point() and not x.isfinite().all()), None)
    if damaged is not None:
        raise ValueError(f"{name}: {damaged} has values that are NaN or infinite: use another checkpoint")
    return weights, quantised


def _take_quantised(weights: Weights, name: str) -> Quantised:
    """Return the quantised linear layers of a checkpoint, and replace their entries in `weights` by dequantised ones.

    Args:
        weights: All weights of the checkpoint.
        name: Its folder or hub id, for messages.

    Raises:
        ValueError: A layer's scales or factors are missing or have other sizes.
    """
    taken: Quantised = {}
    for key in [key for key in weights if key.endswith(f".{INT8_VALUES}")]:
        module = key.removesuffix(f".{INT8_VALUES}")
        values = weights.pop(key)
        scales, factors = (weights.pop(f"{module}.{entry}", None) for entry in (INT8_SCALES, INT8_FACTORS))
        if scales is None or not _belong_together(values, scales, factors):
            raise ValueError(
                f"{name}: the {INT8_VALUES}, {INT8_SCALES} and {INT8_FACTORS} of {module} do not belong together: "
                "save the quantised model again"
            )
        taken[module] = values, scales, factors
        weights[f"{module}.weight"] = dequantise(values, scales, factors)
    return taken


def _belong_together(values: Tensor, scales: Tensor, factors: Tensor | None) -> bool:
    is_int8 = values.dtype == torch.int8 and values.dim() == 2
    return is_int8 and scales.shape == values.shape[:1] and (factors is None or factors.shape == values.shape[1:])


def restore_quantised(model: PreTrainedModel, quantised: Quantised) -> None:
    """Quantise a fused model with the dequantised weights of a checkpoint as it was when it was saved.

    Args:
        model: The model.
        quantised: What `read_dequantised` returned; names may lack the prefix of the model's, or the other way round.
            It is emptied, so that values and packed weights are not in memory together.

    Raises:
        ValueError: It cannot be frozen as it is; see `require_freezable`.
    """
    require_freezable(model)
    prefix = f"{model.base_model_prefix}."
    modules = {name.removeprefix(prefix): module for name, module in model.named_modules()}
    by_module: dict[nn.Module, tuple[Tensor, Tensor, Tensor | None]] = {}
    while quantised:
        name, values_of_layer = quantised.popitem()
        if (module := modules.get(name.removeprefix(prefix))) is not None:
            by_module[module] = values_of_layer
    modules.clear()  # else the weights below would stay in memory

    def packed(linears: list[nn.Linear]) -> PackedWeight:
        stored = [each for linear in linears if (each := by_module.pop(linear, None)) is not None]
        weight, bias = stacked(linears)
        if len(stored) < len(linears):
            return pack(weight, bias)
        values, scales, factors = zip(*stored, strict=True)
        return packed_int8(torch.cat(values), torch.cat(scales), bias, factors[0])

    replace_linears(model, packed)
    mark(model)
