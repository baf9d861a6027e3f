"""What the packed encoder reads from a model: an architecture adapter says where a family keeps these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from bertfast.encoder.unpadding import Packed


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingParts:
    """The embedding tables of a model, their LayerNorm, and the dropout probability after it."""

    token_embeddings: nn.Embedding
    position_embeddings: nn.Embedding
    norm: nn.LayerNorm
    dropout: float
    token_type_embeddings: nn.Embedding | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LayerParts:
    """The modules of one post-norm layer, and the options that it was built with.

    Attributes:
        activation: Name of the feed-forward layer's activation, one of `ACTIVATIONS`.
        heads: Number of attention heads.
        scale: Factor of the attention scores; None: 1 / sqrt(head dimension).
        causal: Whether a position attends to no later one.
        attention_dropout, attention_output_dropout, output_dropout: Dropout probabilities: of the attention weights,
            after the attention's output projection, and after the feed-forward layer.
    """

    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_dense: nn.Module
    attention_norm: nn.LayerNorm
    intermediate_dense: nn.Module
    output_dense: nn.Module
    output_norm: nn.LayerNorm
    activation: str
    heads: int
    scale: float | None
    causal: bool
    attention_dropout: float
    attention_output_dropout: float
    output_dropout: float


@dataclass(frozen=True, slots=True, eq=False)
class MaskedLMParts:
    """The modules of a masked-LM head.

    Attributes:
        transform: Called on hidden states [R, H] -> [R, H].
        decoder: The layer to the vocabulary, whose parameters are read.
        next_sentence: Called on pooled [S, H] -> [S, 2]; None in a model without that head.
    """

    transform: Callable[[Tensor], Tensor]
    decoder: nn.Linear
    next_sentence: nn.Module | None


class PackedModel(Protocol):
    """An encoder that takes packed tokens; `bertfast.models` makes one of a model of transformers."""

    def packed_modules(self) -> tuple[Callable[[Packed], Tensor], nn.ModuleList]:
        """Return what `encode` calls.

        Returns:
            The embeddings, called as `embeddings(packed)` -> [T, H], and the layers, each called as
            `layer(hidden, packed, index, rows)`: see `bertfast.encoder.layer`.
        """
        ...

    def padding_index(self) -> int | None:
        """Return the token id that positions skip, which are then counted from it + 1; None: they are columns."""
        ...


class PackedHead(Protocol):
    """A model with a task's head, as transformers has them.

    Its `base_model` is a `PackedModel`. Its other modules depend on the task: `task_steps()` returns what its head
    calls one after the other on rows [R, H] of the encoder's output.
    """

    training: bool

    @property
    def base_model(self) -> nn.Module:
        """The encoder."""
        ...

    def __getattr__(self, name: str) -> Any:
        """Return `task_steps`, or the configuration, `config`."""
        ...


class PackedMaskedLM(PackedHead, Protocol):
    """A model with a masked-LM head."""

    def masked_lm_parts(self) -> MaskedLMParts:
        """Return the modules of the head."""
        ...


def has_token_types(config: Any) -> bool:
    """Return whether a configuration's model tells the texts of a pair apart; its tokenizer may do so nevertheless."""
    types: int = getattr(config, "type_vocab_size", 0)
    return types > 1
