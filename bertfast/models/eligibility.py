"""Decide at each call what can run packed, and say why the rest is left to transformers' own code.

A function `…_unsupported_reason` returns None where the packed encoder computes what the module would, and else a
sentence for the report. No function knows a model family: an `Architecture` says where the parts are.

A compiler takes decisions as constants. Its graph is guarded only by what it guards anyway: the modules that it traces,
their modes and their options. As everywhere in torch.compile, hooks that are registered later are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from operator import attrgetter
from typing import Any, cast

from torch import nn
from transformers.activations import ACT2FN

from bertfast.architectures import Architecture, activation_name, methods
from bertfast.architectures.options import (
    defaults_unsupported_reason,
    layers_unsupported_reason,
    options_unsupported_reason,
    rotary_unsupported_reason,
)
from bertfast.architectures.snapshot import Snapshot
from bertfast.encoder import is_linear, is_plain
from bertfast.encoder.packed_layer import packed_layer
from bertfast.encoder.packed_linear import is_frozen
from bertfast.models.registry import PACKED_LAYER, SNAPSHOT, Fused, FusedModel
from bertfast.ops.reference import IGNORE_INDEX
from bertfast.runtime.torch_compat import constant_result, is_sharded

Reading = Callable[[nn.Module], bool]  # whether the parameters of a linear layer can be read

# The class that a part of each kind must have exactly, and the options that the packed encoder has for it.
_PLAIN: dict[str, tuple[type[nn.Module], Callable[[Any], bool]]] = {
    "dropout": (nn.Dropout, lambda x: 0 <= x.p < 1),
    "embedding": (nn.Embedding, lambda x: not (x.sparse or x.max_norm is not None or x.scale_grad_by_freq)),
    "norm": (nn.LayerNorm, lambda x: x.weight is not None),
}
# The attributes of modules that decide here what `whole_unsupported_reason` returns, besides those of an architecture.
_OPTIONS = {"training", "p", "sparse", "max_norm", "scale_grad_by_freq", "is_causal", "position_embedding_type", "act"}
_OPTIONS |= {"attention_dropout", "rope_type"}
# The options of a layer, by the names of `LayerParts`, that a `PackedLayer` keeps.
_LAYER_OPTIONS = ("heads", "head_dimension", "query_groups", "scale", "causal", "window")


@constant_result
def has_dropout(encoder: nn.Module) -> bool:
    """Return whether training drops anything; if not, no seed is drawn and torch's generator stays as it is."""
    return any(map(_drops, encoder.modules()))


def _drops(module: nn.Module) -> bool:
    """Return whether a module is a dropout, or has the probability of one of attention weights as a number."""
    p = module.p if isinstance(module, nn.Dropout) else vars(module).get("attention_dropout")
    return isinstance(p, float | int) and p > 0


@constant_result
def whole_unsupported_reason(encoder: FusedModel) -> str | None:
    """Return why tokens cannot stay packed from the embeddings of a fused encoder to its last layer."""
    snapshot = vars(encoder).setdefault(SNAPSHOT, None)
    if snapshot is not None and snapshot.still_holds(encoder):
        return None
    architecture = encoder.architecture
    reason = next((f"{path}: {why}" for path, why in unsupported_reasons(encoder).items() if why is not None), None)
    options = {(architecture.layer.get(name) or "").rpartition(".")[2] for name in _LAYER_OPTIONS}
    for layer in _at(encoder, architecture.layers) if reason is None else ():
        _keep_packed_layer(layer)
    vars(encoder)[SNAPSHOT] = Snapshot(encoder, architecture, _OPTIONS | options) if reason is None else None
    return reason


def _keep_packed_layer(layer: Fused) -> None:
    """Have a layer keep its `PackedLayer`, or none, until the encoder is examined again."""
    whole = packed_layer(layer.architecture.layer_parts(layer)) if is_frozen(layer) else None
    if whole is not None:
        vars(layer)[PACKED_LAYER] = whole
    else:
        vars(layer).pop(PACKED_LAYER, None)


def unsupported_reasons(encoder: FusedModel) -> dict[str, str | None]:
    """Return why parts of a fused encoder run transformers' own code, None for those that can run packed.

    Returns:
        Reasons by the paths of the embeddings and of each layer; also by that of the module around the layers if these
        cannot share packed tokens.
    """
    architecture, config = encoder.architecture, encoder.config
    paths = (architecture.embeddings, architecture.stack, architecture.layers)
    embeddings, stack, layers = (_at(encoder, path) for path in paths)
    if embeddings is None or stack is None or layers is None:
        return {path: "it was replaced by another module" for path in paths if _at(encoder, path) is None}
    reason = None
    if not methods.runs_family_forward(architecture, encoder) or not (
        stack is encoder or methods.is_genuine(architecture, stack)
    ):
        reason = "the forward of its encoder was replaced"
    attention = methods.foreign_attention(architecture, config._attn_implementation)
    if attention is not None:
        reason = f"its attention is {attention}"
    projection = architecture.projection_of(encoder)
    if projection is not None:
        reason = reason or _part_unsupported_reason(architecture, projection, "linear", str(architecture.projection))
    if architecture.final_norm is not None:
        norm = architecture.final_norm
        reason = reason or _module_unsupported_reason(encoder, [(norm, "norm")], encoder.training)
    reason = reason or rotary_unsupported_reason(architecture, encoder)
    reason = reason or layers_unsupported_reason(architecture, config, layers)
    why = reason
    if why is None and architecture.embedding:  # a table alone is called
        why = _module_unsupported_reason(embeddings, architecture.embedding_modules, encoder.training)
    reasons = {architecture.embeddings: why or defaults_unsupported_reason(architecture, embeddings)}
    if stack is not encoder and methods.is_changed(stack):
        reasons[architecture.stack] = "it has a hook or a replaced forward, so each layer removes padding itself"
    for index, layer in enumerate(layers):
        why = reason or _module_unsupported_reason(layer, architecture.layer_modules, encoder.training)
        reasons[f"{architecture.layers}.{index}"] = why or options_unsupported_reason(architecture, config, layer)
    return reasons


def _module_unsupported_reason(module: nn.Module, parts: Iterable[tuple[str, str]], training: bool) -> str | None:
    """Return why a fused module cannot be computed from its parts; `Architecture` says what their kinds are."""
    if not isinstance(module, Fused):
        return "it was put in after patching: patch the model again"
    for path, kind in parts:
        part, name = _at(module, path), f"its {path}" if path else "it"
        if part is None:
            return f"it has no {path}"
        if methods.is_changed(part):
            return f"{name} has a hook or a replaced forward"
        if kind == "container" and path and is_sharded(part) and not isinstance(module, FusedModel):
            return f"FSDP2 shards {name} by itself, and it is not called"
        reason = _part_unsupported_reason(module.architecture, part, kind, name)
        if reason is not None:
            return reason
        # The dropout of attention weights may follow the mode of the module around it.
        if kind == "dropout" and getattr(part, "p", False):
            around = _at(module, path.rpartition(".")[0])
            if not part.training == around.training == training:
                return f"{name} is in training mode and the model is not, or the other way round"
    return None


def _at(module: nn.Module, path: str) -> Any:
    """Return the part at a path, which may be a function as activation; None if other modules were put in."""
    try:
        return attrgetter(path)(module) if path else module
    except AttributeError:
        return None


def _part_unsupported_reason(architecture: Architecture, part: Any, kind: str, name: str) -> str | None:
    """Return why a part of a kind does not compute what the packed encoder computes instead."""
    if kind == "linear":  # is called if its parameters cannot be read
        if type(part) is nn.Linear and not methods.is_original(nn.Linear, "forward"):
            return "the forward of torch.nn.Linear was replaced"
        return None
    if kind == "activation":
        activation = getattr(part, "__name__", type(part).__name__)
        if activation_name(part) is None:
            return f"its activation is {activation}"
        is_own = methods.is_original(type(part), "forward") and _calls_own_function(part)
        return None if is_own else f"the forward of {activation} was replaced"
    if kind == "container":
        positions = getattr(part, "position_embedding_type", "absolute")
        if positions != "absolute":
            return f"its positions are {positions}"
        return None if methods.is_genuine(architecture, part) else f"the forward of {name} is not transformers' own"
    if kind == "dropout" and isinstance(part, float | int):
        return None if 0 <= part < 1 else f"{name} is {part}"
    if type(part) is nn.Identity and (kind == "dropout" or (kind == "norm" and architecture.pre_norm)):
        return None
    if kind == "norm" and type(part).__name__.endswith("RMSNorm") and methods.is_genuine(architecture, part):
        return None
    plain, has_known_options = _PLAIN[kind]
    is_plain_part = type(part) is plain and has_known_options(part) and methods.is_original(plain, "forward")
    return None if is_plain_part else f"{name} is not a plain {plain.__name__}"


def _calls_own_function(activation: nn.Module) -> bool:
    """Return whether an activation calls the function that its class has set; GELUActivation and its like have one."""
    function, own = (getattr(x, "act", None) for x in (activation, ACT2FN[str(activation_name(activation))]))
    if isinstance(function, partial) and isinstance(own, partial):
        return (function.func, function.args, function.keywords) == (own.func, own.args, own.keywords)
    return function is own or getattr(function, "__self__", None) is activation


def transform_unsupported_reason(transform: Fused, is_read: Reading = is_plain) -> str | None:
    """Return why the masked-LM head's transform must run transformers' own code."""
    parts, paths = transform.architecture.transform_modules, transform.architecture.transform
    dense, activation = _at(transform, paths["dense"]), _at(transform, paths["activation"])
    reason = _module_unsupported_reason(transform, parts, transform.training)
    if reason is None and activation_name(activation) != "gelu":
        reason = "its activation is not GELU"
    return reason or (None if is_read(dense) else f"its dense is a {type(dense).__name__}, not a plain Linear")


@constant_result
def head_unsupported_reason(model: FusedModel, is_read: Reading = is_plain) -> str | None:
    """Return why the loss of a masked-LM head cannot be computed without its logits."""
    architecture = model.architecture
    transform, decoder = architecture.head.get("transform", ""), architecture.head["decoder"]
    containers = [path for path in (*architecture.head_containers, transform) if path]
    own = methods.overridden_method(type(model.base_model))
    if methods.is_changed(model.base_model) or own is not None:  # the loss does not call it as a module
        return f"its encoder has {'a hook or a replaced forward' if own is None else f'a {own} of its own'}"
    if not methods.runs_family_forward(architecture, model):
        return "its forward was replaced"
    if not methods.runs_family_loss(architecture, model):
        return "PyTorch's cross entropy was replaced"
    parts = [*((path, "container") for path in containers), (decoder, "linear")]
    if architecture.transform and not architecture.has_transform_module:
        around = f"{transform}." if transform else ""
        parts += [(around + path, kind) for path, kind in architecture.transform_modules if kind != "container"]
    reason = _module_unsupported_reason(model, parts, model.training)
    if reason is not None:
        return reason
    if architecture.has_transform_module and any(map(methods.is_changed, _at(model, transform).modules())):
        return "a module of its transform has a hook or a replaced forward"
    module = _at(model, decoder)
    if any(is_sharded(_at(model, path)) for path in (*architecture.head_containers, decoder)):
        is_read = is_linear  # its parameters are gathered before they are read
    return None if is_read(module) else f"its decoder is a {type(module).__name__}, not a plain Linear"


@constant_result
def loss_unsupported_reason(model: FusedModel, is_read: Reading = is_plain) -> str | None:
    """Return why the training loss of a fused masked-LM head, on a fused encoder, is computed from logits."""
    encoder, config = cast(FusedModel, model.base_model), model.config
    if getattr(config, "return_logits", False) or config.output_hidden_states:
        return "the configuration asks for logits or hidden states"
    others = ignored_labels(model) - {IGNORE_INDEX}
    if others:
        return f"its sparse_pred_ignore_index is {min(others)}, not {IGNORE_INDEX}"
    reason = head_unsupported_reason(model, is_read) or whole_unsupported_reason(encoder)
    next_sentence = model.architecture.head.get("next_sentence")
    reads_pooler = next_sentence is not None and _at(model, next_sentence) is not None
    return reason or (pooler_unsupported_reason(encoder) if reads_pooler else None)


def ignored_labels(model: nn.Module) -> set[int]:
    """Return the labels that a head's loss leaves out: with sparse prediction, also one of the head's own."""
    own: int = getattr(model, "sparse_pred_ignore_index", IGNORE_INDEX)
    return {IGNORE_INDEX, own} if getattr(model, "sparse_prediction", False) else {IGNORE_INDEX}


def pooler(encoder: FusedModel) -> nn.Module | None:
    """Return an encoder's pooler, None if it has none."""
    module: nn.Module | None = getattr(encoder, "pooler", None)
    return module


@constant_result
def pooler_unsupported_reason(encoder: FusedModel) -> str | None:
    """Return why a pooler must be given more than the rows that transformers' pooler reads."""
    if pooler(encoder) is None:
        return "it has no pooler"
    return _module_unsupported_reason(encoder, [("pooler", "container")], encoder.training)


@constant_result
def runs_family_forward(model: FusedModel) -> bool:
    """Return whether a model runs its family's `forward`, and not a user's or a replacement."""
    return methods.runs_family_forward(model.architecture, model)


@constant_result
def can_pool_alone(model: FusedModel) -> bool:
    """Return whether the encoder of a head that reads only its pooled output need not compute anything else."""
    encoder = model.base_model
    is_own = isinstance(encoder, Fused) and methods.overridden_method(type(encoder)) is None
    return runs_family_forward(model) and is_own and not methods.is_changed(encoder)


@constant_result
def reads_of_first_token(model: FusedModel) -> str | None:
    """Return what a head that reads the first token says of this to its encoder: see `bertfast.models.fused`.

    Returns:
        "first" if nothing else is read, "first and others" if hooks may read more, "tokens" if it reads all tokens and
        no padding, "padding" if it is configured to read other tokens than the first, None if the code is unknown that
        reads what the encoder returns.
    """
    architecture = model.architecture
    readers = architecture.first_token_readers
    path = next(readers[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in readers)
    reader = _at(model, path)
    if not runs_family_forward(model) or (path and not methods.is_genuine(architecture, reader)):
        return None
    if getattr(reader, "summary_type", "first") != "first":
        return "padding"
    if model.pooling() != "first":
        return "tokens" if model.pooling() in ("mean", "late") else None
    is_alone = can_pool_alone(model) and not (path and methods.is_changed(reader))
    return "first" if is_alone else "first and others"


def called_linears(layer: Fused, is_read: Reading) -> Iterable[tuple[str, nn.Module]]:
    """Yield the linear layers of a fused layer that are called because their parameters cannot be read, by path."""
    linears = ((path, _at(layer, path)) for path, kind in layer.architecture.layer_modules if kind == "linear")
    return ((path, linear) for path, linear in linears if not is_read(linear))
