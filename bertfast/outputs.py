"""What the models return: `outputs.loss`, `outputs["loss"]` and `outputs[0]`, like Hugging Face's."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor


class ModelOutput(dict):
    """Named results in order. A field that is None counts as absent, for keys, positions and length alike."""

    def __post_init__(self):
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None:
                super().__setitem__(entry.name, value)

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setattr__(self, name, value):
        if value is not None and name in self:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def to_tuple(self) -> tuple:
        """All results that are there, in order."""
        return tuple(self.values())


@dataclass(eq=False)
class BaseModelOutput(ModelOutput):
    """`BertModel`: [B, L, H], [B, H], and on request every layer's [B, L, H] and [B, A, L, L]."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class PreTrainingOutput(ModelOutput):
    """`BertForPreTraining`: loss [], [B, L, V] and [B, 2]."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class HeadOutput(ModelOutput):
    """Every model with one kind of logits."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class QuestionAnsweringOutput(ModelOutput):
    """`BertForQuestionAnswering`: loss [], two times [B, L]."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
