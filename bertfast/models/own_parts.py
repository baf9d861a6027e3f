"""Models with parts that transformers does not have, of a type that it refuses: programs alone run them.

A BiLSTM between the encoder and a head, and pooling of a sequence's last token, as causal models need.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from transformers import BertConfig, PreTrainedModel

from bertfast.models import bert

# The weights' file is `model.bertfast.safetensors`, as transformers' classes that are named open any type of model.
VARIANT = "bertfast"


class OwnBertConfig(BertConfig):
    """The configuration of a BERT with parts of ours.

    Args:
        bilstm: A BiLSTM of two layers, as wide as the model, reads what the encoder gives.
        pool_last: A sequence's last token is pooled, not its first.
        feature_layers: Layers that a feature-based model reads; None: it is none.
        lstm_size: Of each direction of a feature-based model's BiLSTM.
        lstm_layers: Of that BiLSTM.
        others: See `BertConfig`.
    """

    model_type = "bertfast_bert"
    parts = ("bilstm", "pool_last", "feature_layers")

    def __init__(
        self,
        bilstm: bool = False,
        pool_last: bool = False,
        feature_layers: str | None = None,
        lstm_size: int = 768,
        lstm_layers: int = 2,
        **others,
    ):
        super().__init__(**others)
        self.bilstm, self.pool_last, self.feature_layers = bilstm, pool_last, feature_layers
        self.lstm_size, self.lstm_layers = lstm_size, lstm_layers


class BiLSTM(nn.Module):
    """An LSTM in both directions over each of the sequences that lie end to end: [T, inputs] -> [T, 2 · size]."""

    def __init__(self, inputs: int, size: int, layers: int = 2):
        super().__init__()
        self.lstm = nn.LSTM(inputs, size, layers, bidirectional=True)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        present = [length for length in lengths if length]
        sequences = pack_sequence(x[: sum(present)].split(present), enforce_sorted=False)
        rows, _ = pad_packed_sequence(self.lstm(sequences)[0], batch_first=True)
        read = torch.cat([row[:length] for row, length in zip(rows, present, strict=True)])
        return torch.cat([read, read.new_zeros(len(x) - len(read), read.shape[1])])  # padding slots are in no sequence


class OwnParts:
    """What the classes below share. Their `forward` is not called: they are run by `bertfast.encoder`'s functions."""

    config_class = OwnBertConfig

    def __init__(self, config: OwnBertConfig, **options):
        super().__init__(config, **options)
        if config.bilstm:
            self.bilstm = BiLSTM(config.hidden_size, config.hidden_size // 2)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.LSTM):  # which transformers leaves as they were allocated
            module.reset_parameters()

    def forward(self, *args, **kwargs):
        raise TypeError(
            f"this {type(self).__name__} has parts of bertfast's own, which run on packed batches alone: use "
            "`bertfast predict`, or the functions of bertfast.encoder"
        )

    @classmethod
    def from_pretrained(cls, name, *args, **kwargs) -> PreTrainedModel:
        """Open a model, with or without weights of parts of ours; see transformers."""
        if Path(name, f"model.{VARIANT}.safetensors").is_file():
            kwargs.setdefault("variant", VARIANT)
        return super().from_pretrained(name, *args, **kwargs)

    def save_pretrained(self, folder: str | os.PathLike, *args, **kwargs) -> None:
        """Save a model; see transformers."""
        super().save_pretrained(folder, *args, **{"variant": VARIANT} | kwargs)


class BertModel(OwnParts, bert.BertModel):
    """An encoder whose last token is pooled."""


class BertForPreTraining(OwnParts, bert.BertForPreTraining):
    """A model that is pre-trained left to right."""


class BertForMaskedLM(OwnParts, bert.BertForMaskedLM):
    """A masked-LM head on a model with parts of ours."""


class BertForSequenceClassification(OwnParts, bert.BertForSequenceClassification):
    """Sequence classification with parts of ours."""


class BertForMultipleChoice(OwnParts, bert.BertForMultipleChoice):
    """Multiple choice with parts of ours."""


class BertForTokenClassification(OwnParts, bert.BertForTokenClassification):
    """Token classification with parts of ours."""


class BertForQuestionAnswering(OwnParts, bert.BertForQuestionAnswering):
    """Question answering with parts of ours."""


_CLASSES = (
    BertModel,
    BertForPreTraining,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForMultipleChoice,
    BertForTokenClassification,
    BertForQuestionAnswering,
)


def class_for(kind: type[PreTrainedModel], config: BertConfig) -> type[PreTrainedModel]:
    """Return the class of models like `kind` with the parts that a configuration asks for."""
    if not isinstance(config, OwnBertConfig) or issubclass(kind, OwnParts):
        return kind
    return next(own for own in _CLASSES if issubclass(own, kind))
