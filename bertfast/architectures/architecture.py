"""What an adapter says of a model family: where its modules are, and what its classes do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from importlib import import_module
from operator import attrgetter
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

    @cached_property
    def modeling(self) -> ModuleType:
        """The module of transformers with the family's classes."""
        return import_module(self.module)

    def embedding_parts(self, module: nn.Module) -> EmbeddingParts:
        """Read the parts of an embeddings module."""
        *tables, norm, dropout = self._read_embedding(module)
        return EmbeddingParts(*tables, norm, dropout.p)

    def layer_parts(self, module: nn.Module) -> LayerParts:
        """Read the parts of a layer, and the options that they hold now."""
        values = dict(zip(self._layer_names, self._read_layer(module), strict=True))
        values["activation"] = activation_name(values["activation"])
        for name in _DROPOUTS:
            values[name] = values[name].p
        return LayerParts(**{"scale": None} | values)

    @cached_property
    def layer_linears(self) -> tuple[str, ...]:
        """Paths from a layer to its linear layers."""
        return tuple(self.layer[name] for name in _LINEARS)

    @cached_property
    def layer_dropouts(self) -> tuple[str, ...]:
        """Paths from a layer to its dropouts, the one of the attention weights first."""
        return tuple(self.layer[name] for name in _DROPOUTS)

    @cached_property
    def layer_containers(self) -> tuple[str, ...]:
        """Paths of the modules between a layer and its parts, which are read and not called."""
        parts = [path.split(".")[:-1] for path in self.layer.values() if path is not None]
        return tuple(dict.fromkeys(".".join(part[:end]) for part in parts for end in range(1, len(part) + 1)))

    @cached_property
    def _layer_names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in fields(LayerParts) if self.layer[entry.name] is not None)

    @cached_property
    def _read_layer(self) -> attrgetter:
        return attrgetter(*(self.layer[name] for name in self._layer_names))

    @cached_property
    def _read_embedding(self) -> attrgetter:
        return attrgetter(*(self.embedding[entry.name] for entry in fields(EmbeddingParts)))


def activation_name(module: nn.Module) -> str | None:
    """Return the name of an activation that runs packed, None for any other."""
    return _ACTIVATION_NAMES.get(type(module))
