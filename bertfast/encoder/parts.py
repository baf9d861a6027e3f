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
    norm: nn.LayerNorm
    dropout: float
    position_embeddings: nn.Embedding | None = None
    token_type_embeddings: nn.Embedding | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LayerParts:
    """The modules of one layer, and the options that it was built with.

    Attributes:
        qkv: The projections of queries, keys and values, or one of all three.
        intermediate: The linear layer before the activation; of a gated one, those of the activated half and of its
            factor, or one of both.
        attention_norm, output_norm: Normalise the sums after the attention and after the feed-forward layer, or with
            `pre_norm` the inputs of both, where an Identity leaves the input as it is.
        activation: Name of the feed-forward layer's activation, one of `ACTIVATIONS`.
        heads: Number of attention heads; None: as many as heads of `head_dimension` fill the projection.
        head_dimension: Columns of a head; None: they follow from `heads`.
        query_groups: Number of heads of queries that share a head of keys and values.
        scale: Factor of the attention scores; None: 1 / sqrt(head dimension).
        causal: Whether a position attends to no later one.
        window: A position attends only to positions at most this far away; None: no limit.
        rotary: Which of the batch's rotary tables rotates queries and keys; None: none does.
        pre_norm: Whether the norms come before the attention and the feed-forward layer.
        gated: Whether half of the intermediate columns are activated and multiplied by the other half.
        attention_dropout, attention_output_dropout, intermediate_dropout, output_dropout: Dropout probabilities: of the
            attention weights, after the attention's output projection, before the last linear layer, and after it.
    """

    qkv: tuple[nn.Module, ...]
    attention_dense: nn.Module
    attention_norm: nn.Module
    intermediate: tuple[nn.Module, ...]
    output_dense: nn.Module
    output_norm: nn.Module
    activation: str
    scale: float | None
    causal: bool
    attention_dropout: float
    attention_output_dropout: float
    output_dropout: float
    intermediate_dropout: float = 0.0
    heads: int | None = None
    head_dimension: int | None = None
    query_groups: int = 1
    window: int | None = None
    rotary: str | None = None
    pre_norm: bool = False
    gated: bool = False


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

    def with_rotary(self, packed: Packed) -> Packed:
        """Return packed tokens with the rotary tables that the layers read, if they read any."""
        ...

    def output_norm(self) -> nn.Module | None:
        """Return the norm after the last layer; None: there is none."""
        ...

    def padding_index(self) -> int | None:
        """Return the token id that positions skip, which are then counted from it + 1; None: they are columns."""
        ...

    def max_positions(self) -> int | None:
        """Return the number of rows of the position table; None: there is none."""
        ...


class PackedHead(Protocol):
    """A model with a task's head, as transformers has them.

    Its `base_model` is a `PackedModel`. Its other modules depend on the task: `task_steps()` returns what its head
    calls one after the other on rows [R, H] of the encoder's output, and `pooling()` says which rows those of a head
    for sequences are: "first", the first token; "mean", the mean of all tokens; "late", each token, and the logits of
    a sequence are the mean of its tokens' logits.
    """

    training: bool

    @property
    def base_model(self) -> nn.Module:
        """The encoder."""
        ...

    def __getattr__(self, name: str) -> Any:
        """Return `task_steps`, `pooling`, or the configuration, `config`."""
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
