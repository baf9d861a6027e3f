"""How a model makes embeddings of its encoder's hidden states: the modules of sentence-transformers.

Shapes: S texts, D embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, normalizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from bertfast.models.families import architecture_of

PoolingName = Literal["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
NormalizationName = Literal["auto", "l2", "none"]


class Step(nn.Module):
    """A module on embeddings.

    Attributes:
        effect: What it has done to embeddings, in words.
    """

    effect: str

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return fp32 [S, D'] of fp32 [S, D]."""
        raise NotImplementedError


class Normalize(Step):
    """L2 normalisation of embeddings."""

    effect = "normalised"

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return fp32 [S, D] of length 1."""
        return F.normalize(embeddings, dim=-1)


class Truncate(Step):
    """Truncation of embeddings to their first elements, those that Matryoshka models can be used with.

    Args:
        size: Number of elements, D'.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size, self.effect = size, f"truncated to {size} elements"

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return fp32 [S, D'] of fp32 [S, D]."""
        return embeddings[:, : self.size]


class Dense(Step):
    """A linear layer on embeddings, with an activation and perhaps a residual connection.

    Args:
        linear: The layer.
        activation: Its activation.
        residual: What is added: a linear layer or the identity of the input; None: nothing.
    """

    def __init__(self, linear: nn.Linear, activation: nn.Module, residual: nn.Module | None):
        super().__init__()
        self.linear, self.activation, self.residual = linear, activation, residual
        self.effect = f"projected to {linear.out_features} elements"

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return fp32 [S, D'] of fp32 [S, D]."""
        result: Tensor = self.activation(self.linear(embeddings))
        return result if self.residual is None else result + self.residual(embeddings)


@dataclass(frozen=True, eq=False)
class SentenceModules:
    """How a model makes embeddings of its encoder's hidden states.

    Attributes:
        encoder: Folder of the encoder and its tokenizer.
        pooling: Poolings, whose results are concatenated; empty: the model has none of its own.
        pools_prompt: Whether the tokens of a prompt are pooled.
        after: Modules on the pooled embeddings; truncation comes after those of `modules.json`.
        prompts: Texts to put before those to embed, by name.
        default_prompt: Name of the one that is used if none is chosen.
        max_seq_length: Maximum tokens of a text; None: as many as the encoder has positions.
        lowercases: Whether texts are lower-cased.
        files: Files, besides those of the encoder, that determine the embeddings.
        similarity: How embeddings are compared: its similarity_fn_name.
    """

    encoder: Path
    pooling: tuple[str, ...] = ("mean",)
    pools_prompt: bool = True
    after: tuple[Step, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    max_seq_length: int | None = None
    lowercases: bool = False
    files: tuple[Path, ...] = ()
    similarity: str = "cosine"

    @property
    def normalizes(self) -> bool:
        """Whether embeddings have length 1."""
        return bool(self.after) and isinstance(self.after[-1], Normalize)

    @property
    def truncates(self) -> bool:
        """Whether embeddings are truncated."""
        return any(isinstance(module, Truncate) for module in self.after)

    @property
    def normalizes_before_truncation(self) -> bool:
        """Whether what is truncated has length 1."""
        return any(isinstance(x, Normalize) and isinstance(y, Truncate) for x, y in pairwise(self.after))

    def without_normalization(self) -> SentenceModules:
        """Return the same without the Normalize at their end, or before the truncation at their end."""
        tail = self.after[-1:] if self.after and isinstance(self.after[-1], Truncate) else ()
        kept = self.after[: len(self.after) - len(tail)]
        if kept and isinstance(kept[-1], Normalize):
            kept = kept[:-1]
        return replace(self, after=(*kept, *tail))

    def changed(self, pooling: str, normalization: str, name: str) -> SentenceModules:
        """Return the same with the pooling and the normalisation that flags name.

        Args:
            pooling: A key of `POOLINGS`, "none", or "auto" for that of the model.
            normalization: l2, none, or "auto" for that of the model.
            name: The model, for messages.

        Raises:
            ValueError: There is no pooling.
        """
        if pooling == "none":
            return replace(self, pooling=("none",), after=())
        modules = self if pooling == "auto" else replace(self, pooling=(pooling,))
        if not modules.pooling:
            raise ValueError(f"{name} has no module Pooling of its own: choose one with --pooling")
        if normalization == "none":
            modules = modules.without_normalization()
        if normalization == "l2" and not modules.normalizes:
            modules = replace(modules, after=(*modules.after, Normalize()))
        return modules

    def length_for(self, config: PretrainedConfig) -> int:
        """Return the maximum tokens of a text for an encoder of this configuration.

        Raises:
            ValueError: There is no room for text.
        """
        positions = architecture_of(config).max_positions(config)
        length = min(positions, self.max_seq_length or positions)
        if length < 4:
            raise ValueError(
                f"{self.encoder} has a max_seq_length of {length}: choose another one with --max-seq-length"
            )
        return length

    def prepare_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Have a tokenizer lower-case texts if the model says so."""
        known = tokenizer.normalizer
        if not self.lowercases or isinstance(known, normalizers.Lowercase):
            return
        steps = [] if known is None else [known]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])

    def size_of(self, hidden_size: int) -> int:
        """Return the size of embeddings of hidden states of this size.

        Raises:
            ValueError: A module Dense takes embeddings of another size, or they are truncated to a larger one.
        """
        size = hidden_size * len(self.pooling)
        for module in self.after:
            if isinstance(module, Dense):
                if module.linear.in_features != size:
                    raise ValueError(
                        f"{self.encoder}: its module Dense takes embeddings of {module.linear.in_features} elements, "
                        f"and --pooling and --layers give {size}: leave both out"
                    )
                size = module.linear.out_features
            if isinstance(module, Truncate):
                if module.size > size:
                    raise ValueError(
                        f"config_sentence_transformers.json of {self.encoder}: truncate_dim {module.size} is larger "
                        f"than the embeddings, of {size} elements: correct or remove it"
                    )
                size = module.size
        return size
