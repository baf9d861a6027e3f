"""What an adapter says of a model family: where its modules are, and what its classes do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from bertfast.encoder import ACTIVATIONS, EmbeddingParts, LayerParts, MaskedLMParts, PackedHead, pooled, transform

_DROPOUTS = ("attention_dropout", "attention_output_dropout", "intermediate_dropout", "output_dropout")
# The parts of a layer that are one part of `LayerParts`, in its order.
QKV = ("qkv", "query", "key", "value")
INTERMEDIATE = ("intermediate_dense", "gate_dense", "up_dense")
# What a part is, by the last word of its name; parts of other names are options, not modules.
_KINDS = {
    "activation": "activation",
    "dense": "linear",
    "dropout": "dropout",
    "embeddings": "embedding",
    "key": "linear",
    "norm": "norm",
    "qkv": "linear",
    "query": "linear",
    "value": "linear",
}
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh}  # that tasks name
_ACTIVATION_NAMES = {type(ACT2FN[name]): name for name in reversed(ACTIVATIONS)}


@dataclass(frozen=True, eq=False)
class Architecture:
    """A family of models of transformers that the packed encoder runs. Paths are attribute names joined by dots.

    Attributes:
        model_type: `model_type` of a configuration.
        module: Name of the module of transformers with the family's classes.
        prefix: What the names of its models begin with.
        classes: Names of these classes, by the roles of the mixins in `bertfast.models.fused` that fuse them.
        embeddings, stack, layers: Paths from the encoder to its embeddings, to the module around the layers, and to
            the layers. `stack` is "" if that is the encoder itself.
        embedding: Paths from the embeddings to the parts, by their names in `EmbeddingParts`; none if the embeddings
            are a table of tokens alone, which is called.
        layer: Paths from a layer to the parts, by their names in `LayerParts`, where `qkv` is one module or "query",
            "key" and "value", and `intermediate` is "intermediate_dense", or "gate_dense" and "up_dense". A path that
            is None is of an option that the family, or this version of transformers, does not have.
        sizes: The embedding tables, by their names in `embedding`, whose number of rows is in a configuration, by its
            name there.
        default_inputs: The difference between neighbours in the embeddings' buffers that hold the default token types,
            0, and positions, 0, 1, …, by the names of these buffers.
        output: Name in `transformers.modeling_outputs` of what the encoder returns.
        tasks: What heads call one after the other on rows of the encoder's output, by the end of the model's name:
            paths to modules, names of functions, and "pooler" for the encoder's.
        head: Paths from a model to its masked-LM head: "transform", the module around the parts of `transform`,
            "decoder", whose parameters are read, and if the family has it "next_sentence", which is called.
        head_containers: Paths from a model to the modules around those of its head, which must not be hooked.
        transform: Paths from the masked-LM head's transform to its "dense", "activation" (GELU if it has none) and
            "norm".
        pre_norm, gated: See `LayerParts`.
        final_norm: Name in the encoder of the norm after the last layer.
        rotary: Name in the encoder of the module that computes the cos and sin of rotary positions.
        layer_type: Name in a layer of the kind of its attention, "full_attention" or "sliding_attention", which has the
            window and rotary positions of its own.
        pooling: Path from a model with a head for sequences to the name of what that reads; None: the first token.
        width: Name in a configuration of the number of columns of the embedding tables.
        slices_layers: Whether an encoder runs as many of its layers as its configuration says, and not all.
        projection: Name in the encoder of a layer after the embeddings, which not every model has.
        padding_index: Path from the encoder to the token id that positions skip; they are counted from it + 1. None:
            positions are columns.
        first_token_readers: Paths from models that read the encoder's output at the first token alone to the modules
            that do, by the names of these models; "" if it is in their own `forward`.
        loss: Name in models of a module that computes their loss, if it is not made at each call.
        other_heads: Paths from models to modules of heads that programs do not run.
        config_names: The family's names of entries that BERT names otherwise, by BERT's names.
        pretraining_output: Name in `module` of what the model with both heads returns.
        modeling: The module of that name.
        embedding_modules, layer_modules, transform_modules: The modules that the packed encoder reads, as pairs of a
            path and a kind: "activation", "dropout", "embedding", "linear", "norm", and "container" for the module
            itself (its path is "") and for those between it and its parts, which are not called.
    """

    model_type: str
    module: str
    prefix: str
    classes: Mapping[str, Sequence[str]]
    embeddings: str
    stack: str
    layers: str
    embedding: Mapping[str, str]
    layer: Mapping[str, str | None]
    sizes: Mapping[str, str]
    default_inputs: Mapping[str, int]
    output: str
    tasks: Mapping[str, Sequence[str]]
    head: Mapping[str, str]
    head_containers: Sequence[str]
    transform: Mapping[str, str]
    pre_norm: bool = False
    gated: bool = False
    final_norm: str | None = None
    rotary: str | None = None
    layer_type: str | None = None
    pooling: str | None = None
    width: str = "hidden_size"
    slices_layers: bool = False
    projection: str | None = None
    padding_index: str | None = None
    first_token_readers: Mapping[str, str] = field(default_factory=dict)
    loss: str | None = None
    other_heads: Sequence[str] = ()
    config_names: Mapping[str, str] = field(default_factory=dict)
    pretraining_output: str | None = None
    modeling: ModuleType = field(init=False)
    embedding_modules: tuple[tuple[str, str], ...] = field(init=False)
    layer_modules: tuple[tuple[str, str], ...] = field(init=False)
    transform_modules: tuple[tuple[str, str], ...] = field(init=False)

    _layer_paths: Sequence[tuple[str, Sequence[str] | None]] = field(init=False, repr=False)
    _embedding_paths: Sequence[tuple[str, Sequence[str]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Set here and not when first read, as a compiler may trace that.
        derived = {
            "modeling": import_module(self.module),
            "embedding_modules": _modules(self.embedding),
            "layer_modules": _modules(self.layer),
            "transform_modules": _modules(self.transform),
            "_layer_paths": [(name, path and path.split(".")) for name, path in self.layer.items()],
            "_embedding_paths": [(name, path.split(".")) for name, path in self.embedding.items()],
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def embedding_parts(self, module: nn.Module) -> EmbeddingParts:
        """Read the parts of an embeddings module."""
        values = {name: read(module, path) for name, path in self._embedding_paths}
        values["dropout"] = values["dropout"].p
        return EmbeddingParts(**values)

    def layer_parts(self, module: nn.Module) -> LayerParts:
        """Read the parts of a layer, and the options that they hold now."""
        values: dict[str, Any] = {name: path and read(module, path) for name, path in self._layer_paths}
        values["activation"] = activation_name(values["activation"])
        for name in _DROPOUTS:
            values[name] = _probability(values.get(name))
        values["qkv"] = tuple([values.pop(name) for name in QKV if name in values])
        values["intermediate"] = tuple([values.pop(name) for name in INTERMEDIATE if name in values])
        if self.rotary is not None:
            values["rotary"] = self.kind_of_layer(module)
        if values.get("rotary") != "sliding_attention":
            values["window"] = None
        return LayerParts(**values, pre_norm=self.pre_norm, gated=self.gated)

    def kind_of_layer(self, module: nn.Module) -> str:
        """Return the kind of a layer's attention."""
        kind: str = "full_attention" if self.layer_type is None else getattr(module, self.layer_type)
        return kind

    def rotary_tables(self, encoder: nn.Module, position_ids: Tensor) -> dict[str, Tensor]:
        """Compute the rotary tables of an encoder's layers.

        Args:
            encoder: Its module at `rotary` is called, once for each kind of layer.
            position_ids: int [T].

        Returns:
            By kind of layer, fp32 [T, D]: the cos of D / 2 angles, then their sin.
        """
        assert self.rotary is not None
        kinds = dict.fromkeys(self.kind_of_layer(layer) for layer in part_at(encoder, self.layers))
        like = torch.empty(0, device=position_ids.device)  # of the dtype and device of the cos and sin
        tables = {}
        for kind in kinds:
            arguments = [like, position_ids[None], *([] if self.layer_type is None else [kind])]
            # transformers repeats the cos and the sin for both halves of a head.
            halves = [table[0].chunk(2, dim=1)[0] for table in getattr(encoder, self.rotary)(*arguments)]
            tables[kind] = torch.cat(halves, dim=1)
        return tables

    def pooling_of(self, model: nn.Module) -> str:
        """Return what a model's head for sequences reads: see `bertfast.encoder.PackedHead`."""
        name = "first" if self.pooling is None else str(part_at(model, self.pooling))
        return "first" if name in ("cls", "bos") else name

    def projection_of(self, encoder: nn.Module) -> nn.Module | None:
        """Return the layer after an encoder's embeddings, None if it has none."""
        module: nn.Module | None = None if self.projection is None else getattr(encoder, self.projection, None)
        return module

    @property
    def has_transform_module(self) -> bool:
        """Whether the masked-LM head's transform is a module of its own, which is called."""
        return bool(self.classes.get("transform"))

    def masked_lm_parts(self, model: nn.Module) -> MaskedLMParts:
        """Read the modules of a model's masked-LM head, and of its next-sentence head if it has one."""
        module, decoder = (part_at(model, self.head.get(part, "")) for part in ("transform", "decoder"))
        around, _, name = self.head.get("next_sentence", "").rpartition(".")
        next_sentence = getattr(part_at(model, around), name, None) if name else None
        if self.has_transform_module:
            return MaskedLMParts(module, decoder, next_sentence)
        if not self.transform:
            return MaskedLMParts(_unchanged, decoder, next_sentence)
        dense, norm = (part_at(module, self.transform[part]) for part in ("dense", "norm"))
        activation = part_at(module, self.transform["activation"]) if "activation" in self.transform else None
        is_gelu = activation is None or activation_name(activation) == "gelu"
        return MaskedLMParts(partial(transform, dense, None if is_gelu else activation, norm), decoder, next_sentence)

    def task_steps(self, model: nn.Module) -> list[Callable[[Tensor], Tensor]]:
        """Return what a task's head calls one after the other on rows [R, H] of the encoder's output."""
        kinds = [kind.__name__ for kind in type(model).__mro__]
        steps = next(steps for task, steps in self.tasks.items() if any(name.endswith(task) for name in kinds))
        functions = _FUNCTIONS | {"pooler": partial(pooled, cast(PackedHead, model))}
        return [functions.get(name) or part_at(model, name) for name in steps]

    def head_prefixes(self, kind: type) -> tuple[str, ...]:
        """Return what the names of the weights begin with that a model of a class has besides the encoder's."""
        if kind.__name__.endswith("ForMaskedLM"):
            parts = self.head.get("transform"), self.transform.get("dense", self.head["decoder"])
            return (".".join([*filter(None, parts), ""]),)
        paths = [path for task, steps in self.tasks.items() if kind.__name__.endswith(task) for path in steps]
        return tuple(dict.fromkeys(f"{path.partition('.')[0]}." for path in paths if path != "pooler"))

    @property
    def all_head_prefixes(self) -> tuple[str, ...]:
        """What the names of the weights of all heads begin with."""
        transform = self.head.get("transform")
        parts = [path for name, path in self.head.items() if name != "transform"]
        parts += [transform] if transform else [*self.transform.values()]
        paths = [*parts, *(path for steps in self.tasks.values() for path in steps), *self.other_heads]
        return tuple(dict.fromkeys(f"{path.partition('.')[0]}." for path in paths))

    def config_name(self, name: str) -> str:
        """Return the family's name of an entry of a configuration that BERT calls `name`."""
        return self.config_names.get(name, name)

    def first_position(self, config: Any) -> int:
        """Return the position of a sequence's first token."""
        padding: int = -1 if self.padding_index is None else config.pad_token_id
        return padding + 1

    def max_positions(self, config: Any) -> int:
        """Return the number of tokens that a sequence may have, or should: rotary positions know any."""
        positions: int = config.max_position_embeddings
        return positions - self.first_position(config)

    @property
    def has_next_sentence(self) -> bool:
        """Whether a model of the family has both heads of pre-training."""
        return "next_sentence" in self.head


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden


def _probability(dropout: Any) -> float:
    """Return the probability of a dropout: of a module, of an Identity or None, or the number itself."""
    p: float = dropout if isinstance(dropout, float | int) else getattr(dropout, "p", 0.0)
    return p


def part_at(module: nn.Module, path: str) -> Any:
    """Read an attribute by its path, "" for the module itself."""
    return read(module, path.split(".")) if path else module


def _modules(paths: Mapping[str, str | None]) -> tuple[tuple[str, str], ...]:
    """Return the path and kind of each module on the way to the parts at `paths`, the parts included."""
    kinds = {path: _KINDS.get(name.rpartition("_")[2]) for name, path in paths.items() if path is not None}
    names = [path.split(".")[:-1] for path, kind in kinds.items() if kind is not None]
    containers = {".".join(parents[:end]): "container" for parents in names for end in range(len(parents) + 1)}
    return (*containers.items(), *((path, kind) for path, kind in kinds.items() if kind is not None))


def read(module: nn.Module, path: Sequence[str]) -> Any:
    """Read an attribute by its path of names, as `operator.attrgetter`, which a compiler does not trace."""
    value: Any = module
    for name in path:
        value = getattr(value, name)
    return value


def activation_name(module: nn.Module) -> str | None:
    """Return the name of an activation that runs packed, None for any other."""
    return _ACTIVATION_NAMES.get(type(module))
