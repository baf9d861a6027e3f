"""`bertfast.freeze(model)`: pack the weights of a model's encoders once, for inference on a CPU.

A model that is not frozen reads each weight in the layout of training. With the few tokens of one sentence that costs
more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import nn

from bertfast.architectures import part_at
from bertfast.architectures.architecture import INTERMEDIATE, QKV
from bertfast.encoder import is_plain
from bertfast.encoder.linear import stacked
from bertfast.encoder.packed_linear import PackedLinear, frozen_precision, is_frozen
from bertfast.models.fused import FusedEncoder, FusedLayer
from bertfast.models.patch import PatchReport, fusable_encoders, patch, report, require_module
from bertfast.models.registry import IS_FROZEN, SNAPSHOT
from bertfast.ops import native
from bertfast.ops.packed_linear import PANEL, PackedWeight, pack
from bertfast.runtime.malloc import give_freed_memory_back

FrozenPrecision = Literal["fp32", "bf16"]
"""The precisions in which a model can be frozen."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def freeze(model: nn.Module, precision: FrozenPrecision | None = None) -> PatchReport:
    """Prepare a model for inference on a CPU, in place: fuse it, and pack the weights of its encoders' layers.

    A frozen model computes no gradients. It refuses training mode, other weights, dtypes and devices; load it again for
    these. It can be saved, in its own dtype; weights that `precision` has rounded to bf16 stay rounded. Its other
    modules, such as heads, stay as they are, without gradients.

    Args:
        model: A model of transformers, or any module that holds one; fp32 or bf16, on a CPU. One that is frozen in this
            precision already stays as it is.
        precision: That of the GEMMs and of attention; None: that of the weights. The residual stream stays in the
            dtype of the weights.

    Returns:
        The report, as `bertfast.report` returns it.

    Raises:
        TypeError: `model` is not a module.
        ValueError: It holds no supported encoder, is frozen in another precision, or has another device or dtype; or
            there is no native library. Nothing has been changed then.
    """
    if precision is not None and precision not in _DTYPES:
        raise ValueError(f"freeze: precision must be fp32 or bf16, got {precision!r}")
    require_module("freeze", model)
    if is_frozen(model):
        return report_frozen(model, precision)
    require_freezable(model)
    patch(model)
    dtype = None if precision is None else _DTYPES[precision]

    def packed(modules: list[nn.Linear]) -> PackedWeight:
        return pack(*stacked(modules), dtype)

    return replace_linears(model, packed)


def report_frozen(model: nn.Module, precision: str | None) -> PatchReport:
    """Return the report of a model that is frozen in a precision already.

    Args:
        model: The frozen model.
        precision: fp32, bf16 or int8; None: any.

    Raises:
        ValueError: It is frozen in another precision, or not all of its encoders are frozen.
    """
    found = frozen_precision(model)
    state = "quantised to int8" if found == "int8" else f"frozen in {found}"
    wish = "quantise it" if precision == "int8" else "freeze it" + f" in {precision}" * (precision is not None)
    if not all(IS_FROZEN in vars(encoder) for encoder in fusable_encoders(model)):
        raise ValueError(f"a part of this model is {state}: load it again to {wish} as a whole")
    if precision not in (None, found):
        source = "the model from which it was made" if found == "int8" else "it again"
        raise ValueError(f"this model is {state}: load {source} to {wish}")
    return report(model)


def require_freezable(model: nn.Module) -> None:
    """Check that the weights of a model can be packed.

    Raises:
        ValueError: They cannot.
    """
    if native.UNAVAILABLE_REASON is not None:
        raise ValueError(f"a model can be frozen only with the native library: {native.UNAVAILABLE_REASON}")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            remedy = "load its weights" if parameter.is_meta else "call model.cpu()"
            raise ValueError(f"{name} is on {parameter.device}: frozen models run on a CPU, {remedy} first")
        if parameter.dtype not in _DTYPES.values():
            raise ValueError(
                f"{name} is {parameter.dtype}: frozen models are float32 or bfloat16, call model.float(), or load the "
                "model with dtype=torch.float32"
            )


def replace_linears(model: nn.Module, packed: Callable[[list[nn.Linear]], PackedWeight]) -> PatchReport:
    """Replace the linear layers of a fused model's encoder layers by packed ones.

    Each weight is freed, and its memory given back, before the next layer is packed: both models together never exist.

    Args:
        model: The model.
        packed: Packs linear layers of the same input, one after the other. It must not keep them.
    """
    for encoder in fused_encoders(model):
        vars(encoder).pop(SNAPSHOT, None)  # which refers to all weights
    last = None
    for layer, paths in [*linear_groups(model)]:
        if layer is not last:
            give_freed_memory_back()
        _replace(layer, paths, packed)
        last = layer
    for encoder in fused_encoders(model):
        vars(encoder)[IS_FROZEN] = True
    give_freed_memory_back()
    model.eval()
    model.requires_grad_(False)
    return report(model)


def linear_groups(model: nn.Module) -> Iterator[tuple[FusedLayer, list[str]]]:
    """Yield the paths of the linear layers in a fused model's encoder layers, those of the same input together."""
    for encoder in fused_encoders(model):
        for layer in [module for module in encoder.modules() if isinstance(module, FusedLayer)]:
            paths = layer.architecture.layer
            for names in (QKV, ("attention_dense",), INTERMEDIATE, ("output_dense",)):
                yield layer, [path for name in names if (path := paths.get(name)) is not None]


def fused_encoders(model: nn.Module) -> list[FusedEncoder]:
    """Return the fused encoders of a model."""
    return [module for module in model.modules() if isinstance(module, FusedEncoder)]


def can_group(linears: Sequence[nn.Linear]) -> bool:
    """Return whether linear layers of the same input are packed as one weight, of which each is a part."""
    has_bias = {linear.bias is not None for linear in linears}
    return len(has_bias) == 1 and all(linear.out_features % PANEL == 0 for linear in linears)


def _replace(layer: FusedLayer, paths: list[str], packed: Callable[[list[nn.Linear]], PackedWeight]) -> None:
    modules = [part_at(layer, path) for path in paths]
    linears = [module for module in modules if is_plain(module)]
    if len(linears) < len(modules):
        return  # an adapter, or a layer with a hook, is called as it is
    group, first = packed(linears) if can_group(linears) else None, 0
    for path, linear in zip(paths, linears, strict=True):
        end = first + linear.out_features
        weight = packed([linear]) if group is None else group.rows(first, end)
        module = PackedLinear(weight, group, first, linear.weight.dtype)
        parent, _, name = path.rpartition(".")
        setattr(part_at(layer, parent), name, module)
        first = end
