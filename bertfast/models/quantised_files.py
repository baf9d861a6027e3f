"""The files of quantised models: int8 values, scales and factors, under names that nothing takes for weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from bertfast.architectures import part_at
from bertfast.data.text_files import read_json
from bertfast.encoder.linear import stacked
from bertfast.encoder.packed_linear import INT8_FACTORS, INT8_SCALES, INT8_VALUES
from bertfast.models.freeze import can_group, linear_groups, replace_linears, require_freezable
from bertfast.models.quantised_config import mark
from bertfast.models.weights import Weights, read_weights, require_floating_point
from bertfast.ops.packed_linear import PackedWeight, dequantise, pack, packed_int8

Quantised = dict[str, tuple[Tensor, Tensor, Tensor]]
"""Values, scales and factors of quantised linear layers, see `PackedWeight`, by their names."""

_AGAIN = "copy the files again, or save the quantised model again"


def read_dequantised(
    folder: Path, name: str, variant: str | None, is_marked: bool, takes_quantised: bool = True
) -> tuple[Weights, Quantised]:
    """Read the weights of a folder, of which the quantised ones are dequantised.

    Args:
        folder: Folder of the model.
        name: That, or its hub id, for messages.
        variant: See `read_weights`.
        is_marked: Whether its configuration says that the model is quantised.
        takes_quantised: Whether there may be quantised weights.

    Returns:
        The weights, and the layers that were quantised.

    Raises:
        FileNotFoundError: There are no weights.
        ValueError: They are damaged, of another type, or not finite; or they are quantised, and may not be; or they are
            not, although the configuration says so.
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
    if is_marked and not quantised:
        raise ValueError(
            f"{name}: config.json says that the model is quantised to int8, but no weight is: take the config.json "
            "that belongs to the weights"
        )
    return weights, quantised


def has_quantised_weights(folder: Path) -> bool:
    """Return whether a folder has intact files of int8 weights, also if its `config.json` does not say so."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    try:
        if whole.is_file():
            with safe_open(whole, framework="pt") as file:
                names = [*file.keys()]
        else:
            names = [*read_json(index)["weight_map"]]
    except (OSError, SafetensorError, ValueError, LookupError, TypeError):
        return False
    return any(name.endswith(f".{INT8_VALUES}") for name in names)


def _take_quantised(weights: Weights, name: str) -> Quantised:
    """Return the quantised linear layers of a checkpoint, and replace their entries in `weights` by dequantised ones.

    Args:
        weights: All weights of the checkpoint.
        name: Its folder or hub id, for messages.

    Raises:
        ValueError: An entry of a layer is missing, or is not what `save_pretrained` writes.
    """
    if not any(key.endswith(f".{INT8_VALUES}") for key in weights):
        return {}
    entries = (INT8_VALUES, INT8_SCALES, INT8_FACTORS)
    modules = dict.fromkeys(key.rpartition(".")[0] for key in weights if key.rpartition(".")[2] in entries)
    taken: Quantised = {}
    for module in modules:
        values, scales, factors = (_take(weights, f"{module}.{entry}", name) for entry in entries)
        problem = _problem(values, scales, factors)
        if f"{module}.weight" in weights:
            problem = f"weight is there as well as {INT8_VALUES}"
        if problem is not None:
            raise ValueError(f"{name}: {module}.{problem}: {_AGAIN}")
        taken[module] = values, scales, factors
        weights[f"{module}.weight"] = dequantise(values, scales, factors)
    return taken


def _take(weights: Weights, key: str, name: str) -> Tensor:
    if key not in weights:
        raise ValueError(f"{name} has no {key}: {_AGAIN}")
    return weights.pop(key)


def _problem(values: Tensor, scales: Tensor, factors: Tensor) -> str | None:
    """Return what is wrong with the entries of a layer, which begins with the name of one; None: nothing is."""
    if values.dim() != 2 or values.dtype != torch.int8:
        return f"{INT8_VALUES} is {_kind(values)}, and must be int8 [outputs, inputs]"
    for entry, x, size in ((INT8_SCALES, scales, len(values)), (INT8_FACTORS, factors, values.shape[1])):
        if x.shape != (size,) or x.dtype != torch.float32:
            return f"{entry} is {_kind(x)}, and must be float32 [{size}]"
    if values.numel() and int(values.min()) < -127:
        return f"{INT8_VALUES} has the value -128, and the least is -127"
    if not bool((scales.isfinite() & (scales >= 0)).all()):
        return f"{INT8_SCALES} has values that are negative, NaN or infinite"
    if not bool((factors.isfinite() & (factors > 0)).all()):
        return f"{INT8_FACTORS} has values that are zero, negative, NaN or infinite"
    return None


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {[*x.shape]}"


def _by_module(
    model: PreTrainedModel, quantised: Quantised, name: str
) -> dict[nn.Module, tuple[Tensor, Tensor, Tensor]]:
    """Return the values, scales and factors of a fused model's linear layers; see `restore_quantised`."""
    prefix = f"{model.base_model_prefix}."
    names = {module: path for path, module in model.named_modules()}
    modules = {path.removeprefix(prefix): module for module, path in names.items()}
    groups = [[part_at(layer, path) for path in paths] for layer, paths in linear_groups(model)]
    linears = {linear for group in groups for linear in group}
    by_module: dict[nn.Module, tuple[Tensor, Tensor, Tensor]] = {}
    for key, values_of_layer in quantised.items():
        module = modules.get(key.removeprefix(prefix))
        if module is None or module not in linears:
            raise ValueError(f"{name}: {key}.{INT8_VALUES} is not that of a linear layer in an encoder layer: {_AGAIN}")
        by_module[module] = values_of_layer
    for group in filter(can_group, groups):
        stored = [linear for linear in group if linear in by_module]
        for linear in stored[1:]:
            if not torch.equal(by_module[linear][2], by_module[stored[0]][2]):
                raise ValueError(
                    f"{name}: {INT8_FACTORS} of {names[linear]} and {names[stored[0]]}, which have the same input, "
                    f"differ: {_AGAIN}"
                )
    return by_module


def restore_quantised(model: PreTrainedModel, quantised: Quantised, name: str) -> None:
    """Quantise a fused model with the dequantised weights of a checkpoint as it was when it was saved.

    Args:
        model: The model.
        quantised: What `read_dequantised` returned; names may lack the prefix of the model's, or the other way round.
            It is emptied, so that values and packed weights are not in memory together.
        name: Folder or hub id of the model, for messages.

    Raises:
        ValueError: It cannot be frozen as it is, see `require_freezable`; or layers that are no linear layers of its
            encoder are quantised, or layers of the same input have different factors.
    """
    require_freezable(model)
    by_module = _by_module(model, quantised, name)
    quantised.clear()

    def packed(linears: list[nn.Linear]) -> PackedWeight:
        stored = [each for linear in linears if (each := by_module.pop(linear, None)) is not None]
        weight, bias = stacked(linears)
        if len(stored) < len(linears):
            return pack(weight, bias)
        values, scales, factors = zip(*stored, strict=True)
        is_one = bool((factors[0] == 1).all())  # which is what a layer without factors has in files
        return packed_int8(torch.cat(values), torch.cat(scales), bias, None if is_one else factors[0])

    replace_linears(model, packed)
    mark(model)
