"""What an adapter says of a model family: where its modules are, and which of its classes do what."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter

from torch import nn

from bertfast.encoder import EmbeddingParts, LayerParts


@dataclass(frozen=True)
class EmbeddingPaths:
    """Where the embeddings' parts are, as attribute paths from the embeddings module."""

    words: str
    positions: str
    token_types: str
    norm: str
    dropout: str


@dataclass(frozen=True)
class LayerPaths:
    """Where a layer's parts are, as attribute paths from the layer.

    Attributes:
        heads, causal: Paths of options that the attention module was built with.
        scale: Name of the attention module's factor of the scores, for versions that have it.
    """

    query: str
    key: str
    value: str
    attention_dense: str
    attention_norm: str
    intermediate_dense: str
    activation: str
    output_dense: str
    output_norm: str
    attention: str
    heads: str
    causal: str
    scale: str
    attention_dropout: str
    attention_output_dropout: str
    output_dropout: str

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """The paths of the linear layers."""
        return (
            self.query,
            self.key,
            self.value,
            self.attention_dense,
            self.intermediate_dense,
            self.output_dense,
        )

    @cached_property
    def norms(self) -> tuple[str, ...]:
        """The paths of the LayerNorms."""
        return self.attention_norm, self.output_norm

    @cached_property
    def dropouts(self) -> tuple[str, ...]:
        """The paths of the dropouts."""
        return self.attention_dropout, self.attention_output_dropout, self.output_dropout

    @cached_property
    def containers(self) -> tuple[str, ...]:
        """The paths of the modules between the layer and its parts, whose `forward` does not run."""
        parts = (*self.linears, *self.norms, *self.dropouts, self.activation)
        names = (path.split(".") for path in parts)
        return tuple(dict.fromkeys(".".join(name[:end]) for name in names for end in range(1, len(name))))

    @cached_property
    def _read(self) -> attrgetter:
        options = (self.activation, self.heads, self.causal)
        return attrgetter(*self.linears, *self.norms, *options, *(f"{path}.p" for path in self.dropouts))


@dataclass(frozen=True)
class MaskedLMHeadPaths:
    """Where the masked-LM head's parts are, as attribute paths from the model.

    Attributes:
        transform: What stands before the vocabulary; it is called.
        decoder: The linear layer to the vocabulary; its parameters are read.
        containers: The modules around them.
        next_sentence: The next-sentence head, where there is one.
    """

    transform: str
    decoder: str
    containers: tuple[str, ...]
    next_sentence: str


@dataclass(frozen=True)
class TransformPaths:
    """Where the parts of the masked-LM head's transform are, as attribute paths from it."""

    dense: str
    activation: str
    norm: str


@dataclass(frozen=True)
class Architecture:
    """A family of models of transformers that runs on the packed encoder.

    Attributes:
        model_type: As in a configuration.
        module: The module of transformers with the family's classes.
        roles: What each class does, by name: "encoder", "embeddings", "layer", "transform", or the kind of a head:
            "masked_lm", "pretraining", "pooled" (it reads the pooled output alone), "tokens", "other".
        embeddings, stack, layers, pooler: Attribute paths from the encoder: its embeddings, the module around the
            layers, the layers, and the pooler.
    """

    model_type: str
    module: str
    roles: dict[str, str]
    embeddings: str
    stack: str
    layers: str
    pooler: str
    embedding: EmbeddingPaths
    layer: LayerPaths
    transform: TransformPaths
    masked_lm: MaskedLMHeadPaths
    pooler_class: str
    _cache: dict = field(default_factory=dict, compare=False, repr=False)

    def embedding_parts(self, module: nn.Module) -> EmbeddingParts:
        """Read the parts of an embeddings module."""
        paths = self.embedding
        read = attrgetter(paths.words, paths.positions, paths.token_types, paths.norm, f"{paths.dropout}.p")
        return EmbeddingParts(*read(module))

    def layer_parts(self, module: nn.Module) -> LayerParts:
        """Read the parts of a layer and the options that they hold now."""
