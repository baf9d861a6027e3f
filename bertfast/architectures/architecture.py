"""What an adapter says of a model family: where its modules are, and what its classes do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType

from torch import nn
from transformers.activations import ACT2FN

from bertfast.encoder import ACTIVATIONS, EmbeddingParts, LayerParts

_LINEARS = ("query", "key", "value", "attention_dense", "intermediate_dense", "output_dense")
_DROPOUTS = ("attention_dropout", "attention_output_dropout", "output_dropout")
_ACTIVATION_NAMES = {type(ACT2FN[name]): name for name in reversed(ACTIVATIONS)}


@dataclass(frozen=True, eq=False)
class Architecture:
    """A family of models of transformers that the packed encoder runs. Paths are attribute names joined by dots.

    Attributes:
        model_type: As in a configuration.
        module: Name of the module of transformers with the family's classes.
        embeddings, stack, layers: Paths from the encoder to its embeddings, to the module around the layers, and to
            the layers.
        embedding: Paths from the embeddings to the parts, by their names in `EmbeddingParts`.
        layer: Paths from a layer to the parts, by their names in `LayerParts`; a path that is None is of an option
            that this version of transformers does not have.
        transform: Paths from the masked-LM head's transform to its "dense", "activation" and "norm".
        head: Paths from a model to its masked-LM head: "containers", what must not be hooked, "transform", which is
            called, "decoder", whose parameters are read, and "next_sentence", which is called.
        pretraining_output: Name in `module` of what the model with both heads returns.
        modeling: The module of that name.
        layer_linears, layer_dropouts: Paths from a layer to its linear layers, and to its dropouts.
        layer_containers: Paths of the modules between a layer and its parts, which are not called.
    """

    model_type: str
    module: str
    embeddings: str
    stack: str
    layers: str
    embedding: Mapping[str, str]
    layer: Mapping[str, str | None]
    transform: Mapping[str, str]
    head: Mapping[str, str | tuple[str, ...]]
    pretraining_output: str
    modeling: ModuleType = field(init=False)
    layer_linears: tuple[str, ...] = field(init=False)
    layer_dropouts: tuple[str, ...] = field(init=False)
    layer_containers: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        # Set here and not when first read, as a compiler may trace that.
        parts = [path.split(".")[:-1] for path in self.layer.values() if path is not None]
        containers = dict.fromkeys(".".join(part[:end]) for part in parts for end in range(1, len(part) + 1))
        derived = {
            "modeling": import_module(self.module),
            "layer_linears": tuple(self.layer[name] for name in _LINEARS),
            "layer_dropouts": tuple(self.layer[name] for name in _DROPOUTS),
            "layer_containers": tuple(containers),
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
        values = {name: path and read(module, path) for name, path in self._layer_paths}
        values["activation"] = activation_name(values["activation"])
        for name in _DROPOUTS:
            values[name] = values[name].p
        return LayerParts(**values)


def read(module: nn.Module, path: Sequence[str]):
    """Read an attribute by its path of names, as `operator.attrgetter`, which a compiler does not trace."""
    for name in path:
        module = getattr(module, name)
    return module


def activation_name(module: nn.Module) -> str | None:
    """Return the name of an activation that runs packed, None for any other."""
    return _ACTIVATION_NAMES.get(type(module))
