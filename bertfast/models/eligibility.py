"""Decide at each call what can run packed, and say why the rest is left to transformers' own code.

A function `…_unsupported_reason` returns None where the packed encoder computes what the module would, and else a
sentence for the report. No function knows a model family: an `Architecture` says where the parts are.

A compiler takes decisions as constants. Its graph is guarded only by what it guards anyway: the modules that it traces,
their modes and their options. As everywhere in torch.compile, hooks that are registered later are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from inspect import isfunction
from operator import attrgetter, itemgetter

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import assume_constant_result
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bertfast.architectures import Architecture, activation_name
from bertfast.encoder import is_plain, is_watched, kernel_support
from bertfast.models.registry import SNAPSHOT_HOLDER, Fused
from bertfast.runtime import torch_compat

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_KNOWN = {*INPUTS, *PACKING, "return_dict", "use_cache", "output_hidden_states", "num_items_in_batch"}

# The class that a part of each kind must have exactly, and the options that the packed encoder has for it.
_PLAIN: dict[str, tuple[type[nn.Module], Callable[..., bool]]] = {
    "dropout": (nn.Dropout, lambda dropout: 0 <= dropout.p < 1),
    "embedding": (
        nn.Embedding,
        lambda table: not (table.sparse or table.max_norm is not None or table.scale_grad_by_freq),
    ),
    "norm": (nn.LayerNorm, lambda norm: norm.weight is not None and norm.bias is not None),
}


def main_input(arguments: dict) -> Tensor | None:
    """Return the token ids of a call, or the embeddings that it has in their place."""
    embeddings = arguments.get("inputs_embeds")
    return arguments.get("input_ids") if embeddings is None else embeddings


def call_unsupported_reason(encoder: nn.Module, arguments: dict) -> str | None:
    """Return why a call asks for something that the packed encoder does not compute."""
    config = encoder.config
    unknown = [name for name, x in arguments.items() if x is not None and x is not False and name not in _KNOWN]
    if unknown:
        return f"the packed encoder does not take {', '.join(unknown)}"
    ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    tokens = main_input(arguments)
    if (ids is None) == (embeddings is None) or tokens.dim() != (2 if embeddings is None else 3) or 0 in tokens.shape:
        return "the input does not have the shape [batch, length]"
    mask = arguments.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        return "the attention mask is one between pairs of tokens"
    if mask is not None and mask.shape != tokens.shape[:2]:
        return "the attention mask has another shape than the input"
    use_cache = arguments.get("use_cache")
    if getattr(config, "is_decoder", False) and (config.use_cache if use_cache is None else use_cache):
        return "the call fills a cache"
    if config.output_attentions:
        return "the configuration asks for attention weights"
    if not torch.compiler.is_compiling() and torch_compat.has_global_hooks():
        return "hooks are registered for all modules of PyTorch"
    return tracing_unsupported_reason(tokens)


def tracing_unsupported_reason(x: Tensor) -> str | None:
    """Return why a call with the input `x` runs under a transform that the packed encoder does not support."""
    if torch.compiler.is_compiling():
        return "torch.export makes graphs without operations of bertfast" if torch.compiler.is_exporting() else None
    if torch.jit.is_tracing():
        return "torch.jit makes graphs without operations of bertfast"
    if x.is_meta or isinstance(x, FakeTensor):
        return "the tensors hold no values"
    if torch_compat.is_transformed():
        return "torch.func transforms the call"
    return None


def kernels_unsupported_reason(encoder: nn.Module, arguments: dict) -> str | None:
    """Return why a call is left to transformers for want of fast kernels on the model's device and in its dtype."""
    tokens, shape = main_input(arguments), None
    # A compiler would compile again for sizes on the other side of a bound, so that shapes do not matter to it.
    if tokens is not None and arguments.get("cu_seq_lens_q") is None and not torch.compiler.is_compiling():
        shape = tuple(tokens.shape[:2])
    return _kernels_unsupported_reason(encoder, shape)


@assume_constant_result
def _kernels_unsupported_reason(encoder: nn.Module, shape: tuple[int, int] | None) -> str | None:
    weight, config = _any_weight(encoder), encoder.config
    head_dimension = config.hidden_size // config.num_attention_heads
    return kernel_support.unsupported_reason(weight.device, kernel_support.gemm_dtype(weight), head_dimension, shape)


def is_short(arguments: dict) -> bool:
    """Return whether a call has so few tokens, and no padding, that transformers' own code is at least as fast."""
    tokens = main_input(arguments)
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or tokens.device.type != "cpu":
        return False
    if tokens.shape[0] * tokens.shape[1] >= kernel_support.MIN_SLOTS_WITHOUT_PADDING:
        return False
    mask = arguments.get("attention_mask")
    return mask is None or bool(mask.all())


def _any_weight(encoder: nn.Module) -> Tensor:
    """Return a parameter, or the tensor in place of one in a replica that DataParallel made, which has none."""
    weight = next(encoder.parameters(), None)
    if weight is not None:
        return weight
    return next(x for module in encoder.modules() for x in getattr(module, "_former_parameters", {}).values())


@assume_constant_result
def has_dropout(encoder: nn.Module) -> bool:
    """Return whether training drops anything; if not, no seed is drawn and torch's generator stays as it is."""
    return any(module.p for module in encoder.modules() if isinstance(module, nn.Dropout))


class Snapshot:
    """The state of an encoder that could run packed whole; a call compares with it instead of deciding again."""

    def __init__(self, encoder: nn.Module):
        self.modules = modules = [*encoder.modules()]
        # Options, modes, and methods that were set on a module: its public attributes, and how many it has of any kind.
        self.attributes = [vars(module) for module in modules]
        self.readers = [itemgetter(*(name for name in own if name[0] != "_")) for own in self.attributes]
        self.known_attributes = self._attributes()
        self.norms = [module._parameters for module in modules if isinstance(module, nn.LayerNorm)]
        self.classes = [*{original_class(type(module)) for module in modules}]
        tables = [table for module in modules for table in (module._modules, *torch_compat.module_hooks(module))]
        self.empty_tables = [table for table in tables if not table]  # most of them, and quicker to compare
        self.tables = [table for table in tables if table]
        self.known_tables = [{**table} for table in self.tables]
        self.known_state = self._state(encoder)

    def still_holds(self, encoder: nn.Module) -> bool:
        """Return whether all that the decision depends on is what it was."""
        is_own = self.modules[0] is encoder  # and not a replica of it, whose attributes are a copy
        is_same = is_own and self.tables == self.known_tables and self.known_state == self._state(encoder)
        return is_same and not any(self.empty_tables) and self._attributes_hold()

    def _attributes_hold(self) -> bool:
        try:
            return self._attributes() == self.known_attributes
        except (
            KeyError,
            RuntimeError,
            ValueError,
        ):  # one was deleted, or is a tensor, whose comparison has no truth value
            return False

    def _attributes(self) -> tuple[list, list[int]]:
        values = [read(own) for read, own in zip(self.readers, self.attributes, strict=True)]
        return values, [len(own) for own in self.attributes]

    def _state(self, encoder: nn.Module) -> tuple:
        config = encoder.config
        return (
            [type(module) for module in self.modules],
            [norm.get("weight") is None or norm.get("bias") is None for norm in self.norms],
            [method for kind in self.classes for method in _methods(kind)],
            getattr(config, "is_decoder", False),
            config._attn_implementation,
            _attention_function(encoder.architecture, config._attn_implementation),
        )


class _Holder:
    """An encoder's attribute that holds its snapshot, and is always the same while snapshots compare attributes.

    A copy holds none, as its modules are others.
    """

    def __init__(self):
        self.snapshot: Snapshot | None = None

    def __deepcopy__(self, memo):
        return _Holder()

    def __reduce__(self):
        return _Holder, ()


@assume_constant_result
def whole_unsupported_reason(encoder: nn.Module) -> str | None:
    """Return why tokens cannot stay packed from the embeddings of a fused encoder to its last layer."""
    holder = vars(encoder).setdefault(SNAPSHOT_HOLDER, _Holder())
    if holder.snapshot is not None and holder.snapshot.still_holds(encoder):
        return None
    reason = next((f"{path}: {why}" for path, why in unsupported_reasons(encoder).items() if why is not None), None)
    holder.snapshot = Snapshot(encoder) if reason is None else None
    return reason


def unsupported_reasons(encoder: nn.Module) -> dict[str, str | None]:
    """Return why parts of a fused encoder run transformers' own code, None for those that can run packed.

    Returns:
        Reasons by the paths of the embeddings and of each layer; also by that of the module around the layers if these
        cannot share packed tokens.
    """
    architecture, config = encoder.architecture, encoder.config
    embeddings, stack, layers = attrgetter(architecture.embeddings, architecture.stack, architecture.layers)(encoder)
    reason = None
    if not runs_family_forward(encoder, architecture) or not _is_genuine(architecture, stack):
        reason = "the forward of its encoder was replaced"
    function = _attention_function(architecture, config._attn_implementation)
    if function is not None and not function.__module__.startswith("transformers."):
        reason = f"its attention is {function.__module__}.{function.__qualname__}"
    parts, training = architecture.embedding_modules, encoder.training
    reasons = {architecture.embeddings: reason or _module_unsupported_reason(embeddings, parts, training)}
    if is_watched(stack):
        reasons[architecture.stack] = "a hook or a forward was set on it, so each of its layers removes padding itself"
    for index, layer in enumerate(layers):
        why = reason or _module_unsupported_reason(layer, architecture.layer_modules, training)
        reasons[f"{architecture.layers}.{index}"] = why or _options_unsupported_reason(architecture, config, layer)
    return reasons


def _options_unsupported_reason(architecture: Architecture, config, layer: nn.Module) -> str | None:
    """Return why the options of a layer's attention are not those of the configuration."""
    attention = attrgetter(architecture.layer["query"].rpartition(".")[0])(layer)
    heads, causal = attrgetter(architecture.layer["heads"], architecture.layer["causal"])(layer)
    is_decoder = getattr(config, "is_decoder", False)
    if heads != config.num_attention_heads:
        return f"it has {heads} attention heads and the configuration {config.num_attention_heads}: heads were pruned"
    if not causal == getattr(attention, "is_causal", causal) == is_decoder:
        return f"it was made with is_decoder={causal}, and the configuration has is_decoder={is_decoder}"
    return None


def _module_unsupported_reason(module: nn.Module, parts: Iterable[tuple[str, str]], training: bool) -> str | None:
    """Return why a fused module cannot be computed from its parts; `Architecture` says what their kinds are."""
    if not isinstance(module, Fused):
        return "it was put in after patching: patch the model again"
    for path, kind in parts:
        part, name = _at(module, path), f"its {path}" if path else "it"
        reason = _hook_reason(part, name) or _part_unsupported_reason(module.architecture, part, kind, name)
        if reason is not None:
            return reason
        # The dropout of attention weights may follow the mode of the module around it.
        if kind == "dropout" and part.p:
            around = _at(module, path.rpartition(".")[0])
            if not part.training == around.training == training:
                return f"{name} is in training mode and the model is not, or the other way round"
    return None


def _at(module: nn.Module, path: str) -> nn.Module:
    return attrgetter(path)(module) if path else module


def _part_unsupported_reason(architecture: Architecture, part: nn.Module, kind: str, name: str) -> str | None:
    """Return why a part of a kind does not compute what the packed encoder computes in its place."""
    if kind == "linear":  # is called if its parameters cannot be read
        if type(part) is nn.Linear and not _is_original(nn.Linear, "forward"):
            return "the forward of torch.nn.Linear was replaced"
        return None
    if kind == "activation":
        activation = getattr(part, "__name__", type(part).__name__)
        return None if activation_name(part) is not None else f"its activation is {activation}"
    if kind == "container":
        positions = getattr(part, "position_embedding_type", "absolute")
        if positions != "absolute":
            return f"its positions are {positions}"
        return None if _is_genuine(architecture, part) else f"the forward of {name} is not transformers' own"
    plain, has_known_options = _PLAIN[kind]
    is_plain_part = type(part) is plain and has_known_options(part) and _is_original(plain, "forward")
    return None if is_plain_part else f"{name} is not a plain {plain.__name__}"


def transform_unsupported_reason(transform: nn.Module, is_read: Callable[[nn.Module], bool] = is_plain) -> str | None:
    """Return why the masked-LM head's transform must run transformers' own code.

    Args:
        transform: The fused module.
        is_read: Whether the parameters of a linear layer can be read.
    """
    parts, paths = transform.architecture.transform_modules, transform.architecture.transform
    dense, activation = attrgetter(paths["dense"], paths["activation"])(transform)
    reason = _module_unsupported_reason(transform, parts, transform.training)
    if reason is None and activation_name(activation) != "gelu":
        reason = "its activation is not GELU"
    return reason or (None if is_read(dense) else f"its dense is a {type(dense).__name__}, not a plain Linear")


@assume_constant_result
def head_unsupported_reason(model: nn.Module, is_read: Callable[[nn.Module], bool] = is_plain) -> str | None:
    """Return why the loss of a masked-LM head cannot be computed without its logits; see above for `is_read`."""
    paths = model.architecture.head
    parts = [(path, "container") for path in (*paths["containers"], paths["transform"])]
    if is_watched(model.base_model):  # the loss does not call it as a module
        return "a hook or a forward was set on its encoder"
    if not runs_family_forward(model, model.architecture):
        return "its forward was replaced"
    decoder = attrgetter(paths["decoder"])(model)
    reason = _module_unsupported_reason(model, [*parts, (paths["decoder"], "linear")], model.training)
    return reason or (None if is_read(decoder) else f"its decoder is a {type(decoder).__name__}, not a plain Linear")


@assume_constant_result
def pooler_unsupported_reason(encoder: nn.Module) -> str | None:
    """Return why a pooler must be given more than the rows that transformers' pooler reads."""
    if encoder.pooler is None:
        return "it has no pooler"
    return _module_unsupported_reason(encoder, [("pooler", "container")], encoder.training)


@assume_constant_result
def can_pool_alone(model: nn.Module) -> bool:
    """Return whether the encoder of a head that reads only its pooled output need not compute anything else."""
    encoder = model.base_model
    calls_encoder = model.passes_keywords and runs_family_forward(model, model.architecture)
    return calls_encoder and isinstance(encoder, Fused) and not is_watched(encoder)


def _hook_reason(module: nn.Module, name: str) -> str | None:
    """Return that a module does more than its class says; hooks of transformers and of distributed engines apart."""
    registered = (hook for table in torch_compat.module_hooks(module) for hook in table.values())
    kind = type(module)
    methods = any(callable(x) and hasattr(kind, own) for own, x in vars(module).items())
    changed = methods or any(_changes_calls(hook, module) for hook in registered)
    return f"a hook or a forward was set on {name}" if changed else None


def _changes_calls(hook: Callable, module: nn.Module) -> bool:
    """Return whether someone but transformers and the engines that shard a model registered a hook."""
    function = _unwrapped(hook)
    name = getattr(function, "__module__", None) or type(function).__module__
    if name == "transformers.utils.output_capturing" or name.startswith(("torch.distributed.", "torch.nn.parallel.")):
        return False
    # Embeddings whose layers are recomputed are made to require a gradient, which those that are trained do anyway.
    is_harmless = getattr(function, "__name__", None) == "make_inputs_require_grads" and name.startswith(
        "transformers."
    )
    return not (is_harmless and all(p.requires_grad for p in module.parameters()))


def _is_genuine(architecture: Architecture, module: nn.Module) -> bool:
    """Return whether a module is of a class of the family, and runs the methods that were written there."""
    kind = original_class(type(module))
    return kind.__module__ == architecture.module and _runs_methods_of(kind, kind)


def runs_family_forward(model: nn.Module, architecture: Architecture) -> bool:
    """Return whether a model runs its family's `forward` and what that calls, and not a user's or a replacement."""
    kind = original_class(type(model))
    return _runs_methods_of(kind, next(base for base in kind.__mro__ if base.__module__ == architecture.module))


def original_class(kind: type) -> type:
    """Return the class that a module had before it was fused, and before FSDP2 derived one from it."""
    undistributed = next(base for base in kind.__mro__ if not base.__module__.startswith("torch.distributed."))
    return getattr(kind, "original", undistributed)


def _methods(kind: type) -> list[Callable]:
    """Return what a class of modules has now for each method of it that a call can run."""
    return [getattr(kind, name) for name in _method_names(kind)]


@cache
def _method_names(kind: type) -> tuple[str, ...]:
    """Return the names of the functions in a class body, without those that make, load or resize a module."""
    others = ("__", "_init_weights", "get_", "set_", "prune", "_prune", "tie_", "_tie", "resize_", "extra_repr")
    names = [name for name, x in vars(kind).items() if isfunction(x) and not name.startswith(others)]
    return (*dict.fromkeys(["forward", *names]),)


def _runs_methods_of(kind: type, family_class: type) -> bool:
    """Return whether a class runs the methods that were written in the body of `family_class`, itself or a base."""
    names = _method_names(family_class)
    module = family_class.__module__
    return all(_is_written_in(getattr(kind, name), module, f"{family_class.__name__}.{name}") for name in names)


def _is_original(kind: type, name: str) -> bool:
    return _is_written_in(getattr(kind, name), kind.__module__, f"{kind.__name__}.{name}")


@cache
def _is_written_in(function: Callable, module: str, name: str) -> bool:
    # functools.wraps copies names, but not the module in which a wrapper was written.
    library = module.partition(".")[0] + "."
    while isfunction(function) and function.__globals__["__name__"].startswith(library):
        if not hasattr(function, "__wrapped__"):
            return function.__globals__["__name__"] == module and function.__qualname__ == name
        function = function.__wrapped__
    return False


def _attention_function(architecture: Architecture, name: str | None) -> Callable | None:
    """Return what a configuration's attention implementation resolves to; None if this version resolves none."""
    eager = getattr(architecture.modeling, "eager_attention_forward", None)
    return _unwrapped(eager if name in (None, "eager") else ALL_ATTENTION_FUNCTIONS.get(name, eager))


def _unwrapped(function: Callable | None) -> Callable | None:
    while isinstance(function, partial):
        function = function.func
    return function


def called_linears(layer: nn.Module, is_read: Callable[[nn.Module], bool]) -> Iterable[tuple[str, nn.Module]]:
    """Yield the linear layers of a fused layer that are called because their parameters cannot be read, by path."""
    linears = ((path, attrgetter(path)(layer)) for path, kind in layer.architecture.layer_modules if kind == "linear")
    return ((path, linear) for path, linear in linears if not is_read(linear))
