"""What an adapter says of a model family: where its modules are, and what its classes do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from bertfast.encoder import ACTIVATIONS, EmbeddingParts, LayerParts, MaskedLMParts

_DROPOUTS = ("attention_dropout", "attention_output_dropout", "output_dropout")
# What a part is, by the last word of its name; parts of other names are options, not modules.
_KINDS = {
    "activation": "activation",
    "dense": "linear",
    "dropout": "dropout",
    "embeddings": "embedding",
    "key": "linear",
    "norm": "norm",
    "query": "linear",
    "value": "linear",
}
_ACTIVATION_NAMES = {type(ACT2FN[name]): name for name in reversed(ACTIVATIONS)}


@dataclass(frozen=True, eq=False)
class Architecture:
    """A family of models of transformers that the packed encoder runs. Paths are attribute names joined by dots.

    Attributes:
        model_type: `model_type` of a configuration.
        module: Name of the module of transformers with the family's classes.
        embeddings, stack, layers: Paths from the encoder to its embeddings, to the module around the layers, and to
            the layers.
        embedding: Paths from the embeddings to the parts, by their names in `EmbeddingParts`.
        layer: Paths from a layer to the parts, by their names in `LayerParts`; a path that is None is of an option
            that this version of transformers does not have.
        sizes: The embedding tables, by their names in `embedding`, whose number of rows is in a configuration, by its
            name there.
        default_inputs: The difference between neighbours in the embeddings' buffers that hold the default token types,
            0, and positions, 0, 1, …, by the names of these buffers.
        transform: Paths from the masked-LM head's transform to its "dense", "activation" and "norm".
        head: Paths from a model to its masked-LM head: "transform", which is called, "decoder", whose parameters are
            read, and "next_sentence", which is called.
        head_containers: Paths from a model to the modules around those of its head, which must not be hooked.
        pretraining_output: Name in `module` of what the model with both heads returns.
        modeling: The module of that name.
        embedding_modules, layer_modules, transform_modules: The modules that the packed encoder reads, as pairs of a
            path and a kind: "activation", "dropout", "embedding", "linear", "norm", and "container" for the module
            itself (its path is "") and for those between it and its parts, which are not called.
    """

    model_type: str
    module: str
    embeddings: str
    stack: str
    layers: str
    embedding: Mapping[str, str]
    layer: Mapping[str, str | None]
    sizes: Mapping[str, str]
    default_inputs: Mapping[str, int]
    transform: Mapping[str, str]
    head: Mapping[str, str]
    head_containers: Sequence[str]
    pretraining_output: str
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
            values[name] = values[name].p
        return LayerParts(**values)

    def masked_lm_parts(self, model: nn.Module) -> MaskedLMParts:
        """Read the modules of a model's masked-LM head, and of its next-sentence head if it has one."""
        *parents, name = self.head["next_sentence"].split(".")
        transform, decoder = (read(model, self.head[part].split(".")) for part in ("transform", "decoder"))
        return MaskedLMParts(transform, decoder, getattr(read(model, parents), name, None))


def _modules(paths: Mapping[str, str | None]) -> tuple[tuple[str, str], ...]:
    """Return the path and kind of each module on the way to the parts at `paths`, the parts included."""
    kinds = {path: _KINDS.get(name.rpartition("_")[2]) for name, path in paths.items() if path is not None}
    names = [path.split(".")[:-1] for path in kinds]
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
