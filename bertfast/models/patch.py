"""`bertfast.patch(model)`: fuse a live model of transformers in place; `unpatch` undoes it, `report` describes it.

Parameters, names and classes, as saving and `isinstance` see them, stay.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeGuard, cast

from torch import nn
from transformers import PreTrainedModel

from bertfast.architectures import Architecture
from bertfast.architectures.methods import (
    is_genuine,
    original_class,
    overridden_method,
    replaced_method,
    runs_family_loss,
)
from bertfast.architectures.unsupported import family_unsupported_reason
from bertfast.encoder import is_linear, kernel_support
from bertfast.encoder.packed_linear import FROZEN, PackedLinear, has_int8, is_frozen
from bertfast.models import bert, calls, eligibility, fused  # noqa: F401  importing bert registers its classes
from bertfast.models.registry import Fused, FusedModel, fuse, fused_class, unfuse
from bertfast.runtime.precision import autocast
from bertfast.runtime.torch_compat import any_parameter, has_global_hooks, unsharded_class


@dataclass(frozen=True)
class PatchReport:
    """What of a model is fused.

    Attributes:
        fused: What runs instead of each fused module, by the module's name.
        left: Why a module is left to transformers, by the module's name.
    """

    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for title, modules in self._sections():
            lines += [f"{title}: {len(modules)}", *(f"  {name}: {sentence}" for name, sentence in modules.items())]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [(title, *item) for title, modules in self._sections() for item in modules.items()]
        cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"

    def _sections(self) -> tuple[tuple[str, dict[str, str]], ...]:
        return ("fused", self.fused), ("left to transformers", self.left)

    def _add(self, name: str, what: str, reason: str | None) -> None:
        if reason is None:
            self.fused[name] = what
        else:
            self.left[name] = reason


def patch(model: nn.Module) -> PatchReport:
    """Fuse every supported encoder of transformers inside a model, in place; what is fused already stays so.

    Whether a module runs fused is decided again at each call, as hooks and adapters come and go; the report describes
    the model as it is now.

    Args:
        model: A model of transformers, or any module that holds one.

    Returns:
        The report, as `report` returns it.

    Raises:
        TypeError: `model` is not a module.
        ValueError: It holds no supported encoder, or its configuration has other sizes than the weights. Nothing has
            been changed then.
    """
    require_module("patch", model)
    encoders = [module for module in model.modules() if _is_encoder(module)]
    left = [encoder for encoder in encoders if _own_method(encoder) is not None]
    if (reason := unsupported_reason(model)) is not None:
        raise ValueError(f"there is nothing to fuse in this {type(model).__name__}: {reason}")
    for encoder in fusable_encoders(model):
        _check(encoder)
    fuse(model, left)
    return report(model)


def require_module(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        inside = " (its .model is one)" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise TypeError(f"{function} takes a torch module that holds an encoder, not a {type(model).__name__}{inside}")


def unpatch(model: nn.Module) -> None:
    """Restore the original classes of a fused model's modules.

    Raises:
        ValueError: The model is not fused, is of a class that derives from a fused one, or is frozen.
    """
    require_module("unpatch", model)
    if is_frozen(model):
        raise ValueError(FROZEN)
    kinds = [type(module) for module in model.modules() if isinstance(module, Fused)]
    if not kinds:
        raise ValueError(f"this {type(model).__name__} is not patched, so there is nothing to undo")
    for kind in kinds:
        if "original" not in vars(kind) and unsharded_class(kind) is not kind:
            raise ValueError(f"FSDP2 shards this {original_class(kind).__name__}: unpatch it before fully_shard")
        if "original" not in vars(kind):
            raise ValueError(f"{kind.__name__} derives from {kind.mro()[1].__name__} of bertfast, so it stays fused")
    unfuse(model)


def report(module: nn.Module) -> PatchReport:
    """Describe what of a model is fused, what is not and why, as it is now, and change nothing."""
    require_module("report", module)
    result = PatchReport()
    global_reason = kernel_support.GLOBAL_HOOKS if has_global_hooks() else None
    for name, child in module.named_modules():
        name = name or original_class(type(child)).__name__
        if isinstance(child, fused.FusedEncoder):
            _report_encoder(result, name, child)
        elif isinstance(child, fused.FusedTransform):
            reason = eligibility.transform_unsupported_reason(child, is_linear) or global_reason
            reason = reason or kernel_support.module_unsupported_reason(any_parameter(child))
            result._add(name, "bias, GELU and LayerNorm are one operation", reason)
        elif isinstance(child, fused.FusedMaskedLM | fused.FusedPreTraining):
            reason = "its encoder is not fused"
            if isinstance(encoder := child.base_model, fused.FusedEncoder):
                reason = _encoder_unsupported_reason(encoder) or eligibility.loss_unsupported_reason(child, is_linear)
            result._add(name, "in training, its loss is computed on labelled rows without logits", reason)
        elif isinstance(child, fused.FusedFirstToken) and eligibility.reads_of_first_token(child) == "padding":
            result.left[name] = "it reads other tokens than the first, also padding: so its encoder is not fused either"
        elif isinstance(child, fused.FusedMeanLoss):
            reason = None if runs_family_loss(child.architecture, child) else "its forward or its loss was replaced"
            result._add(name, "the loss of accumulated batches is one mean over all their labels", reason)
        elif _is_encoder(child):
            result.left[name] = _own_method(child) or "it is not patched: call bertfast.patch to fuse it"
        elif isinstance(child, PreTrainedModel) and not isinstance(child, Fused) and child.base_model is child:
            result._add(name, "", family_unsupported_reason(child) or "its family is unknown")
    return result


def unsupported_reason(model: nn.Module) -> str | None:
    """Return why no encoder of a model can be fused; None if it holds one that can be."""
    reasons = [_own_method(module) for module in model.modules() if _is_encoder(module)]
    if not reasons:
        return family_unsupported_reason(model) or "it holds no supported encoder"
    return None if None in reasons else reasons[0]


def require_packed(model: PreTrainedModel, precision: str = "fp32") -> None:
    """Check that the functions of `bertfast.encoder` can run a model and its head on packed batches.

    Args:
        model: The model, on the device on which it will run.
        precision: fp32, bf16 or fp16.

    Raises:
        ValueError: A part of the model would have to run transformers' own code; the message has the report.
    """
    encoder, name = model.base_model, type(model).__name__
    with autocast(model.device, precision):
        is_packed = isinstance(encoder, fused.FusedEncoder) and eligibility.whole_unsupported_reason(encoder) is None
        is_packed = is_packed and overridden_method(type(encoder)) is None
        reason = calls.kernels_unsupported_reason(encoder, {}) if isinstance(encoder, fused.FusedEncoder) else None
        if isinstance(model, fused.FusedMaskedLM | fused.FusedPreTraining):
            is_packed = is_packed and eligibility.head_unsupported_reason(model) is None
        if isinstance(model, fused.FusedFirstToken):
            is_packed = is_packed and eligibility.reads_of_first_token(model) not in (None, "padding")
        if not is_packed:
            raise ValueError(f"this {name} cannot run on packed batches:\n{report(model)}")
    if reason is not None:
        advice = ": pass --precision fp32" if precision != "fp32" else ""
        raise ValueError(f"this {name} cannot run on packed batches with --precision {precision}, {reason}{advice}")


def fusable_encoders(model: nn.Module) -> list[PreTrainedModel]:
    """Return the supported encoders inside a model, fused or not."""
    return [module for module in model.modules() if _is_encoder(module) and _own_method(module) is None]


def _is_encoder(module: nn.Module) -> TypeGuard[PreTrainedModel]:
    kind = fused_class(type(module)) or type(module)
    return issubclass(kind, fused.FusedEncoder)


def _architecture(encoder: nn.Module) -> Architecture:
    return (fused_class(type(encoder)) or cast(Fused, encoder)).architecture


def _own_method(encoder: nn.Module) -> str | None:
    """Return why an encoder of a user's class cannot be fused."""
    method = None if isinstance(encoder, Fused) else replaced_method(_architecture(encoder), encoder)
    name = type(encoder).__name__
    return method and f"{name} has a {method} of its own, which a fused encoder would not call"


def _check(encoder: PreTrainedModel) -> None:
    config, architecture = encoder.config, _architecture(encoder)
    embeddings, paths = attrgetter(architecture.embeddings)(encoder), architecture.embedding
    if not is_genuine(architecture, embeddings):
        return
    tables = {name: attrgetter(paths[table])(embeddings) for name, table in architecture.sizes.items()}
    sizes = {name: table.num_embeddings for name, table in tables.items()}
    norm: Any = attrgetter(paths["norm"])(embeddings)
    widths = [*(table.embedding_dim for table in tables.values()), *getattr(norm, "normalized_shape", ())]
    sizes[architecture.width] = widths[0]
    for name, size in sizes.items():
        if (configured := getattr(config, name, size)) != size:
            raise ValueError(f"the config has {name} {configured}, and the weights have {size}: correct one of them")


def _encoder_unsupported_reason(encoder: FusedModel) -> str | None:
    reason = kernel_support.GLOBAL_HOOKS if has_global_hooks() else None
    return reason or calls.config_unsupported_reason(encoder) or calls.kernels_unsupported_reason(encoder, {})


def _report_encoder(result: PatchReport, name: str, encoder: fused.FusedEncoder) -> None:
    reason = _encoder_unsupported_reason(encoder)
    if reason is not None:
        result.left[name] = reason
        return
    own = overridden_method(type(encoder))
    if own is not None:
        result.left[name] = f"{type(encoder).__name__} has a {own} of its own, which its heads call"
    if "forward" in vars(encoder):
        result.left[name] = "its `forward` was replaced on the instance"
    reasons = eligibility.unsupported_reasons(encoder)
    if encoder.recomputes() and (encoder.config.output_hidden_states or any(reasons.values())):
        alone = "its activations are recomputed, which requires that the encoder is fused whole"
        reasons = {path: reason or alone for path, reason in reasons.items()}
    for path, _ in encoder.named_modules():
        if path.endswith(".crossattention"):
            result.left[f"{name}.{path}"] = (
                "cross-attention is left to transformers: calls with encoder_hidden_states run its code in all layers"
            )
    is_quantised = has_int8(encoder)
    for path, reason in reasons.items():
        if reason is not None:
            result.left[f"{name}.{path}"] = reason
            continue
        module = encoder.get_submodule(path)
        linears = [linear for linear in module.modules() if isinstance(linear, PackedLinear)]
        weights = "int8" if any(linear.is_int8 for linear in linears) else "packed"
        result.fused[f"{name}.{path}"] = "runs on packed tokens" + f" and {weights} weights" * bool(linears)
        if isinstance(module, fused.FusedLayer):
            for linear_path, linear in eligibility.called_linears(module, is_linear):
                kind = type(linear)
                why = f"{kind.__module__}.{kind.__name__} is called as a module: its weights cannot be read"
                if isinstance(linear, PackedLinear):
                    if linear.is_int8 or not is_quantised:
                        continue
                    why = (
                        "its weight has values that are not finite, or too many columns, for int8: it is not quantised"
                    )
                result.left[f"{name}.{path}.{linear_path}"] = why
