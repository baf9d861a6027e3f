"""What can run packed, decided anew at each call, and why the rest is left to transformers' own code.

A function `…_unsupported_reason` returns None where the packed encoder computes what the module would, and else a
sentence's end for the report. None of them knows a model family: an `Architecture` says where the parts are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial, wraps
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bertfast.architectures import Architecture, activation_name
from bertfast.encoder import hooks, is_plain, is_watched
from bertfast.fast_kernels import gemm_dtype, why_left_to_transformers
from bertfast.runtime import torch_compat

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_KNOWN = {*INPUTS, *PACKING, "return_dict", "use_cache", "output_hidden_states", "num_items_in_batch"}
HOOKED = "a hook watches it"


def decided_when_traced(decide: Callable) -> Callable:
    """Have a compiler take a decision as a constant.

    It guards nothing then but what it guards anyway: the modules that it traces, their modes and their options. As in
    all of torch.compile, hooks that come later are not seen.
    """
    as_constant = torch.compiler.assume_constant_result(decide)

    @wraps(decide)
    def decided(*args):
        return as_constant(*args) if torch.compiler.is_compiling() else decide(*args)

    return decided


def call_unsupported_reason(encoder: nn.Module, arguments: dict) -> str | None:
    """Why a call asks for what the packed encoder does not have."""
    config = encoder.config
    unknown = [name for name, x in arguments.items() if x is not None and x is not False and name not in _KNOWN]
    if unknown:
        return f"it does not take {', '.join(unknown)}"
    ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    given = ids if embeddings is None else embeddings
    if (ids is None) == (embeddings is None) or given.dim() != (2 if embeddings is None else 3) or 0 in given.shape:
        return "the input has another shape than [batch, length]"
    mask = arguments.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        return "the mask is one between pairs of tokens"
    use_cache = arguments.get("use_cache")
    if getattr(config, "is_decoder", False) and (config.use_cache if use_cache is None else use_cache):
        return "it fills a cache"
    if config.output_attentions:
        return "attention weights are asked for"
    return tracing_unsupported_reason(given)


def tracing_unsupported_reason(given: Tensor) -> str | None:
    """Why a call runs under something that the packed encoder does not run under."""
    if torch.compiler.is_compiling():
        return "an exported graph is to be free of bertfast" if torch.compiler.is_exporting() else None
    if torch.jit.is_tracing():
        return "a traced graph is to be free of bertfast"
    if given.is_meta or isinstance(given, FakeTensor):
        return "the tensors hold no values"
    if torch_compat.is_transformed():
        return "torch.func transforms it"
    return None


def kernels_unsupported_reason(encoder: nn.Module, arguments: dict) -> str | None:
    """Why a call is left to transformers for want of fast kernels where the model is now."""
    if torch.compiler.is_compiling():  # which would compile again for sizes on the other side of a bound
        return _kernels_reason_of_any_shape(encoder)
    given = arguments.get("input_ids") if arguments.get("inputs_embeds") is None else arguments["inputs_embeds"]
    padded = given is not None and arguments.get("cu_seq_lens_q") is None
    return _kernels_reason(encoder, tuple(given.shape[:2]) if padded else None)


def _kernels_reason(encoder: nn.Module, shape: tuple[int, int] | None) -> str | None:
    weight, config = _any_weight(encoder), encoder.config
    head_dimension = config.hidden_size // config.num_attention_heads
    return why_left_to_transformers(weight.device, gemm_dtype(weight), head_dimension, shape)


def _any_weight(encoder: nn.Module) -> Tensor:
    """Return a parameter, or in a replica that DataParallel made, which has none, the tensor in place of one."""
    weight = next(encoder.parameters(), None)
    if weight is not None:
        return weight
    return next(x for module in encoder.modules() for x in getattr(module, "_former_parameters", {}).values())


@decided_when_traced
def _kernels_reason_of_any_shape(encoder: nn.Module) -> str | None:
    return _kernels_reason(encoder, None)


class Snapshot:
    """What was found when a whole encoder could run packed, by which a call can tell cheaply that it still can."""

    def __init__(self, encoder: nn.Module):
        modules = [*encoder.modules()]
        by_kind = [kind for module in modules for kind in hooks(module)]
        self.modules, self.training = modules, encoder.training
        self.no_hooks = [kind for kind in by_kind if not kind]
        self.harmless_hooks = [(kind, [*kind]) for kind in by_kind if kind]
        self.own = [vars(module) for module in modules]
        self.children = [
            (module._modules, name, child) for module in modules for name, child in module._modules.items()
        ]
        self.counts = [(module._modules, len(module._modules)) for module in modules]
        kinds = {original_class(type(module)) for module in modules}
        self.forwards = [(kind, kind.forward) for kind in kinds]
        self.dropouts = [(module, module.p) for module in modules if isinstance(module, nn.Dropout)]
        self.options = _options(encoder)

    def still_holds(self, encoder: nn.Module) -> bool:
        """Whether nothing has changed by which a call could not run packed."""
        training = encoder.training
        return (
            self.training == training
            and not any(self.no_hooks)
            and all([*kind] == known for kind, known in self.harmless_hooks)
            and not any("forward" in own for own in self.own)
            and all(children.get(name) is child for children, name, child in self.children)
            and all(len(children) == count for children, count in self.counts)
            and all(module.training == training for module in self.modules)
            and all(dropout.p == p for dropout, p in self.dropouts)
            and all(kind.forward is forward for kind, forward in self.forwards)
            and self.options == _options(encoder)
        )

    # A copy of a model looks for itself.
    def __deepcopy__(self, memo):
        return None

    def __reduce__(self):
        return type(None), ()


def _options(encoder: nn.Module) -> tuple:
    config = encoder.config
    name = config._attn_implementation
    return getattr(config, "is_decoder", False), name, _attention_function(encoder.architecture, name)


@decided_when_traced
def has_dropout(encoder: nn.Module) -> bool:
    """Whether training drops anything; if not, no seed is drawn, and torch's generator gives others what it gave."""
    return any(module.p for module in encoder.modules() if isinstance(module, nn.Dropout))


@decided_when_traced
def whole_unsupported_reason(encoder: nn.Module) -> str | None:
    """Why tokens cannot stay packed from the embeddings of a fused encoder to its last layer."""
    snapshot = vars(encoder).get("_bertfast_snapshot")
    if snapshot is not None and snapshot.still_holds(encoder):
        return None
    reason = _look_through(encoder)
    vars(encoder)["_bertfast_snapshot"] = Snapshot(encoder) if reason is None else None
    return reason


def _look_through(encoder: nn.Module) -> str | None:
    architecture, training = encoder.architecture, encoder.training
    if is_watched(attrgetter(architecture.stack)(encoder)):
        return "a hook watches the module around its layers"
    reason = encoder_unsupported_reason(encoder) or embeddings_unsupported_reason(
        architecture, attrgetter(architecture.embeddings)(encoder), training
    )
    for layer in attrgetter(architecture.layers)(encoder):
        reason = reason or (HOOKED if is_hooked(layer) else None)
        reason = reason or layer_unsupported_reason(architecture, encoder.config, layer, training)
    return reason


def encoder_unsupported_reason(encoder: nn.Module) -> str | None:
    """Why no layer of an encoder can run packed."""
    architecture, config = encoder.architecture, encoder.config
    stack = attrgetter(architecture.stack)(encoder)
    if not runs_family_forward(encoder) or not _is_genuine(architecture, stack):
        return "its forward was replaced"
    function = _attention_function(architecture, config._attn_implementation)
    if function is not None and not function.__module__.startswith("transformers."):
        return f"its attention is {function.__module__}.{function.__qualname__}"
    return None


def embeddings_unsupported_reason(architecture: Architecture, module: nn.Module, training: bool) -> str | None:
    """Why the embeddings' own code must run."""
    paths = architecture.embedding
    if not _is_fused(module) or not _is_genuine(architecture, module):
        return "its parts are of another kind"
    tables = attrgetter(paths["words"], paths["positions"], paths["token_types"])(module)
    if is_hooked(module, *tables):
        return HOOKED
    if any(type(table) is not nn.Embedding for table in tables):
        return "its parts are of another kind"
    if any(table.sparse or table.max_norm is not None or table.scale_grad_by_freq for table in tables):
        return "an embedding has options that only PyTorch knows"
    positions = getattr(module, "position_embedding_type", "absolute")
    if positions != "absolute":
        return f"positions are {positions}"
    norm, dropout = attrgetter(paths["norm"], paths["dropout"])(module)
    return _norm_unsupported_reason(norm) or _dropout_unsupported_reason(dropout, dropout.training, training)


def layer_unsupported_reason(architecture: Architecture, config, layer: nn.Module, training: bool) -> str | None:
    """Why a layer's own code must run."""
    paths = architecture.layer
    if not _is_fused(layer):
        return "it was put in after patching: patch again"
    containers = [attrgetter(path)(layer) for path in architecture.layer_containers]
    if is_hooked(*containers):
        return HOOKED
    if not all(_is_genuine(architecture, module) for module in (layer, *containers)):
        return "its parts are of another kind"
    if is_hooked(*(attrgetter(path)(layer) for path in architecture.layer_linears)):
        return HOOKED
    return _attention_unsupported_reason(architecture, config, layer) or _parts_unsupported_reason(
        paths, layer, architecture.layer_dropouts, training
    )


def _attention_unsupported_reason(architecture: Architecture, config, layer: nn.Module) -> str | None:
    attention = attrgetter(architecture.layer["query"].rpartition(".")[0])(layer)
    positions = getattr(attention, "position_embedding_type", "absolute")
    if positions != "absolute":
        return f"positions are {positions}"
    if attrgetter(architecture.layer["heads"])(layer) != config.num_attention_heads:
        return "heads were pruned"
    causal, is_decoder = attrgetter(architecture.layer["causal"])(layer), getattr(config, "is_decoder", False)
    if not causal == getattr(attention, "is_causal", causal) == is_decoder:
        return f"it was made with is_decoder {causal}, the config says {is_decoder}"
    return None


def _parts_unsupported_reason(paths, layer: nn.Module, dropouts: tuple[str, ...], training: bool) -> str | None:
    activation = attrgetter(paths["activation"])(layer)
    if activation_name(activation) is None:
        return f"its activation is {getattr(activation, '__name__', type(activation).__name__)}"
    if is_hooked(activation):
        return HOOKED
    for name in ("attention_norm", "output_norm"):
        if (reason := _norm_unsupported_reason(attrgetter(paths[name])(layer))) is not None:
            return reason
    for path in dropouts:
        dropout = attrgetter(path)(layer)
        # That of the attention weights may follow the mode of the module around it.
        modes = {dropout.training, attrgetter(path.rpartition(".")[0])(layer).training}
        if (reason := _dropout_unsupported_reason(dropout, *modes, training)) is not None:
            return reason
    return None


def transform_unsupported_reason(
    architecture: Architecture, module: nn.Module, is_read: Callable[[nn.Module], bool] = is_plain
) -> str | None:
    """Why the own code of what stands before the vocabulary must run."""
    paths = architecture.transform
    dense, activation, norm = attrgetter(paths["dense"], paths["activation"], paths["norm"])(module)
    if not _is_genuine(architecture, module):
        return "its forward was replaced"
    if activation_name(activation) != "gelu":
        return "its activation is not GELU"
    if not is_read(dense) or is_hooked(activation):
        return "a part of it is not plain"
    return _norm_unsupported_reason(norm)


@decided_when_traced
def head_unsupported_reason(model: nn.Module, is_read: Callable[[nn.Module], bool] = is_plain) -> str | None:
    """Why the loss of a masked-LM head cannot be computed without its logits."""
    architecture = model.architecture
    if is_watched(model.base_model):  # it is not called as a module then
        return "a hook watches the encoder"
    containers = [attrgetter(path)(model) for path in architecture.head["containers"]]
    transform, decoder = attrgetter(architecture.head["transform"], architecture.head["decoder"])(model)
    if is_hooked(*containers, transform, decoder):
        return HOOKED
    if not runs_family_forward(model) or not all(_is_genuine(architecture, x) for x in (*containers, transform)):
        return "its parts are of another kind"
    return None if is_read(decoder) else f"the product with the vocabulary is {type(decoder).__name__}"


@decided_when_traced
def can_pool_alone(model: nn.Module) -> bool:
    """Whether a head that reads the pooled output alone can have its encoder compute nothing else."""
    base = model.base_model
    return model.passes_keywords and _is_fused(base) and not is_watched(base) and runs_family_forward(model)


@decided_when_traced
def pooler_unsupported_reason(encoder: nn.Module) -> str | None:
    """Why a pooler must be given more than the rows that it reads."""
    pooler = encoder.pooler
    if not _is_genuine(encoder.architecture, pooler) or is_watched(pooler):
        return "it is not transformers' own"
    return None


def _norm_unsupported_reason(norm: nn.Module) -> str | None:
    plain = type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None and not is_hooked(norm)
    return None if plain else "a LayerNorm is not plain"


def _dropout_unsupported_reason(dropout: nn.Module, *modes: bool) -> str | None:
    if type(dropout) is not nn.Dropout or is_hooked(dropout) or not 0 <= dropout.p < 1:
        return "a dropout is not plain"
    return "a dropout is in another mode than the model" if len({*modes}) > 1 and dropout.p else None


def is_hooked(*modules: nn.Module) -> bool:
    """Whether someone watches one of these, other than transformers itself and the engines that share a model."""
    return any(
        "forward" in vars(module) or any(_is_watcher(hook, module) for kind in hooks(module) for hook in kind.values())
        for module in modules
        if is_watched(module)
    )


def _is_watcher(hook: Callable, module: nn.Module) -> bool:
    function = hook
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__module__", None) or type(function).__module__
    if name == "transformers.utils.output_capturing" or name.startswith(("torch.distributed.", "torch.nn.parallel.")):
        return False
    # Embeddings whose layers are recomputed are made to require a gradient, which those that are trained do anyway.
    harmless = getattr(function, "__name__", None) == "make_inputs_require_grads" and name.startswith("transformers.")
    return not (harmless and all(p.requires_grad for p in module.parameters()))


def _is_fused(module: nn.Module) -> bool:
    return hasattr(type(module), "architecture")


def _is_genuine(architecture: Architecture, module: nn.Module) -> bool:
    """Whether a module is of a class of the family, and runs the `forward` that was written there."""
    kind = original_class(type(module))
    return kind.__module__ == architecture.module and _is_own_forward(kind.forward, kind.__module__, kind.__name__)


def runs_family_forward(model: nn.Module) -> bool:
    """Whether a fused model runs the `forward` of its family, and not one of a user's class or one put in its place."""
    return runs_family_forward_of(original_class(type(model)), model.architecture)


def runs_family_forward_of(kind: type, architecture: Architecture) -> bool:
    """Whether modules of a class run the `forward` of the family's class that it is or derives from."""
    name = next(base.__name__ for base in kind.__mro__ if base.__module__ == architecture.module)
    return _is_own_forward(kind.forward, architecture.module, name)


def original_class(kind: type) -> type:
    """Return the class that a module had before it was fused, and before FSDP2 derived one from it."""
    own = next(base for base in kind.__mro__ if not base.__module__.startswith("torch.distributed."))
    return getattr(kind, "original", own)


@cache
def _is_own_forward(function: Callable, module: str, name: str) -> bool:
    # functools.wraps copies names, but not the module in which a wrapper was written.
    while True:
        if not function.__globals__["__name__"].startswith("transformers."):
            return False
        if not hasattr(function, "__wrapped__"):
            return function.__globals__["__name__"] == module and function.__qualname__ == f"{name}.forward"
        function = function.__wrapped__


def _attention_function(architecture: Architecture, name: str | None) -> Callable | None:
    """Return what a configuration's attention implementation resolves to; None where a version resolves none."""
    eager = getattr(architecture.modeling, "eager_attention_forward", None)
    function = eager if name in (None, "eager") else ALL_ATTENTION_FUNCTIONS.get(name, eager)
    while isinstance(function, partial):
        function = function.func
    return function


def called_linears(architecture: Architecture, layer: nn.Module, is_read: Callable[[nn.Module], bool]) -> Iterable[str]:
    """Yield the paths of a layer's linear layers that are called, as reading their parameters would not do."""
    return (path for path in architecture.layer_linears if not is_read(attrgetter(path)(layer)))
