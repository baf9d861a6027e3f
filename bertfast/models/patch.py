"""`bertfast.patch(model)`: fuse a live model of transformers in place; `unpatch` undoes it, `report` describes it.

Parameters, names and classes, as saving and `isinstance` see them, stay.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from operator import attrgetter

from torch import nn

from bertfast.encoder import is_linear, is_watched
from bertfast.models import bert, eligibility  # noqa: F401  importing bert registers its classes
from bertfast.models.fused import FusedEncoder, FusedMaskedLM, FusedMean, FusedPreTraining, FusedTransform
from bertfast.models.registry import Fused, fuse, fused_class, unfuse


@dataclass(frozen=True)
class PatchReport:
    """What of a model is fused.

    Attributes:
        fused: Names of modules, and what runs in their place.
        left: Names of modules that are left to transformers, and why.
    """

    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fused: {len(self.fused)}", *(f"  {name}: {what}" for name, what in self.fused.items())]
        lines += [f"left alone: {len(self.left)}", *(f"  {name}: {why}" for name, why in self.left.items())]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [("fused", *item) for item in self.fused.items()] + [("left alone", *item) for item in self.left.items()]
        cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"

    def _note(self, name: str, what: str, reason: str | None) -> None:
        if reason is None:
            self.fused[name] = what
        else:
            self.left[name] = reason


def patch(model: nn.Module) -> PatchReport:
    """Fuse every supported encoder of transformers inside a model, in place; what is fused already stays so.

    What is left alone is decided again at each call, as hooks and adapters come and go; the report is of now.

    Raises:
        TypeError: `model` is no module.
        ValueError: It holds no supported encoder, or its configuration promises other sizes than the weights have.
            Nothing has been changed then.
    """
    if not isinstance(model, nn.Module):
        inside = " (its .model is one)" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise TypeError(f"patch takes a torch module that holds a BERT, not a {type(model).__name__}{inside}")
    encoders = [module for module in model.modules() if _is_encoder(module)]
    if not encoders:
        raise ValueError(f"there is no BertModel of transformers in this {type(model).__name__}, so nothing to fuse")
    for encoder in encoders:
        _check(encoder)
    fuse(model)
    return report(model)


def unpatch(model: nn.Module) -> None:
    """Make a fused model what it was.

    Raises:
        ValueError: It is not fused, or is of a class that derives from a fused one.
    """
    fused = [module for module in model.modules() if isinstance(module, Fused)]
    if not fused:
        raise ValueError(f"this {type(model).__name__} is not patched, so there is nothing to undo")
    for module in fused:
        if "original" not in vars(type(module)):
            kind = type(module)
            raise ValueError(f"{kind.__name__} derives from {kind.mro()[1].__name__} of bertfast, so it stays fused")
    unfuse(model)


def report(module: nn.Module) -> PatchReport:
    """Say what of a model is fused, what is not and why, as it is now; nothing is changed."""
    found = PatchReport()
    for name, child in module.named_modules():
        name = name or eligibility.original_class(type(child)).__name__
        if isinstance(child, FusedEncoder):
            _report_encoder(found, name, child)
        elif isinstance(child, FusedTransform):
            reason = eligibility.transform_unsupported_reason(child.architecture, child, is_linear)
            found._note(name, "bias, GELU and LayerNorm in one operation", reason)
        elif isinstance(child, FusedMaskedLM | FusedPreTraining):
            reason = eligibility.head_unsupported_reason(child, is_linear)
            if isinstance(child.base_model, FusedEncoder):
                reason = reason or eligibility.kernels_unsupported_reason(child.base_model, {})
            found._note(name, "in training, the loss is computed on labelled rows without logits", reason)
        elif isinstance(child, FusedMean):
            found.fused[name] = "a step's loss is one mean over all its accumulated batches"
        elif _is_encoder(child):
            found.left[name] = "it is not patched: bertfast.patch fuses it"
    return found


def is_supported(model: nn.Module) -> bool:
    """Whether a model holds an encoder that can be fused."""
    return any(map(_is_encoder, model.modules()))


def require_packed(model: nn.Module) -> None:
    """Check that a program can hand packed batches to a model and its head.

    Raises:
        ValueError: A part of it would have to run transformers' own code; the message has the report.
    """
    encoder = model.base_model
    broken = (
        not isinstance(encoder, FusedEncoder)
        or eligibility.kernels_unsupported_reason(encoder, {}) is not None
        or eligibility.whole_unsupported_reason(encoder) is not None
    )
    if broken or (hasattr(model, "cls") and eligibility.head_unsupported_reason(model) is not None):
        raise ValueError(f"this {type(model).__name__} cannot run on packed batches:\n{report(model)}")


def _is_encoder(module: nn.Module) -> bool:
    kind = fused_class(type(module))
    return isinstance(module, FusedEncoder) or (kind is not None and issubclass(kind, FusedEncoder))


def _check(encoder: nn.Module) -> None:
    kind = fused_class(type(encoder)) or type(encoder)
    if not isinstance(encoder, Fused) and not eligibility.runs_family_forward_of(type(encoder), kind.architecture):
        raise ValueError(f"{type(encoder).__name__} has a forward of its own, which packed tokens would pass by")
    config, architecture = encoder.config, kind.architecture
    embeddings = attrgetter(architecture.embeddings)(encoder)
    paths = architecture.embedding
    words, positions, types = attrgetter(paths["words"], paths["positions"], paths["token_types"])(embeddings)
    found = {
        "hidden_size": getattr(words, "embedding_dim", config.hidden_size),
        "max_position_embeddings": positions.num_embeddings,
        "type_vocab_size": types.num_embeddings,
    }
    for name, size in found.items():
        promised = getattr(config, name, size)
        if promised != size:
            raise ValueError(f"the config promises {name} {promised}, and the weights have {size}: mend one of them")


def _report_encoder(found: PatchReport, name: str, encoder: FusedEncoder) -> None:
    architecture, training = encoder.architecture, encoder.training
    missing = eligibility.kernels_unsupported_reason(encoder, {})
    if missing is not None:
        found.left[name] = f"left to transformers: {missing}"
        return
    embeddings, stack = attrgetter(architecture.embeddings, architecture.stack)(encoder)
    whole = eligibility.encoder_unsupported_reason(encoder)
    reason = whole or eligibility.embeddings_unsupported_reason(architecture, embeddings, training)
    found._note(f"{name}.{architecture.embeddings}", "on packed tokens", reason)
    if "forward" in vars(encoder):
        found.left[name] = "a forward was set on it, which calls what it was before"
    if is_watched(stack):
        found.left[f"{name}.{architecture.stack}"] = "a hook watches it, so its layers remove padding one by one"
    for index, layer in enumerate(attrgetter(architecture.layers)(encoder)):
        own = f"{name}.{architecture.layers}.{index}"
        reason = whole or (eligibility.HOOKED if eligibility.is_hooked(layer) else None)
        reason = reason or eligibility.layer_unsupported_reason(architecture, encoder.config, layer, training)
        found._note(own, "attention, LayerNorm and GELU on packed tokens", reason)
        if reason is None:
            for path in eligibility.called_linears(architecture, layer, is_linear):
                found.left[f"{own}.{path}"] = f"{type(attrgetter(path)(layer)).__name__} is called as it is"
