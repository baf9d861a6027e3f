"""BERT models with extensions that transformers does not have, for programs, which run them on packed batches.

A BiLSTM between the encoder and a head, pooling of a sequence's last token (as causal models need), and a BiLSTM on the
hidden states of a frozen encoder, as ELMo had it. Their configuration has a `model_type` that transformers refuses.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import BertConfig, PretrainedConfig, PreTrainedModel

from bertfast.encoder import encode
from bertfast.encoder.bilstm import BiLSTM
from bertfast.encoder.heads import in_fp32
from bertfast.encoder.unpadding import Packed
from bertfast.models import bert
from bertfast.models.families import class_like

logger = logging.getLogger("bertfast")

ModelT = TypeVar("ModelT", bound=PreTrainedModel)

# The weights' file is `model.bertfast.safetensors`, as transformers' classes that are named open any type of model.
VARIANT = "bertfast"

# Which hidden states to read (0: the embeddings, 1 …: the layers' outputs, -1: the last), and whether to concatenate
# them; None: the outputs of all layers.
LAYERS = {
    "embeddings": ([0], False),
    "second-to-last": ([-2], False),
    "last": ([-1], False),
    "mean-last-four": ([-4, -3, -2, -1], False),
    "concat-last-four": ([-4, -3, -2, -1], True),
    "mean-all": (None, False),
}


class ExtendedBertConfig(BertConfig):
    """The configuration of a BERT with extensions.

    Args:
        bilstm: Whether a BiLSTM of two layers, as wide as the model, reads the encoder's output.
        pool_last: Whether a sequence's last token is pooled, and not its first.
        feature_layers: Name in `LAYERS` of the hidden states that a feature-based model reads; None for other models.
        lstm_size: Width of each direction of a feature-based model's BiLSTM.
        lstm_layers: Number of layers of that BiLSTM.
        options: See `BertConfig`.
    """

    model_type = "bertfast_bert"
    extensions = ("bilstm", "pool_last", "feature_layers")

    def __init__(
        self,
        bilstm: bool = False,
        pool_last: bool = False,
        feature_layers: str | None = None,
        lstm_size: int = 768,
        lstm_layers: int = 2,
        **options: Any,
    ):
        super().__init__(**options)
        self.bilstm, self.pool_last, self.feature_layers = bilstm, pool_last, feature_layers
        self.lstm_size, self.lstm_layers = lstm_size, lstm_layers


class ExtendedModel(PreTrainedModel):
    """Mixin of models with extensions. Their `forward` is not called: the functions of `bertfast.encoder` run them."""

    config_class: type[PretrainedConfig] | None = ExtendedBertConfig

    def __init__(self, config: ExtendedBertConfig, **options: Any):
        super().__init__(config, **options)
        if config.bilstm:
            self.bilstm = BiLSTM(config.hidden_size, config.hidden_size // 2)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]  # transformers declares no types
        if isinstance(module, nn.LSTM):  # transformers does not initialise it
            module.reset_parameters()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"this {type(self).__name__} has extensions that run only on packed batches: use `bertfast predict`, or "
            "the functions of bertfast.encoder"
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Open a model, with or without weights of extensions; see transformers."""
        folder = pretrained_model_name_or_path
        if folder is not None and any(Path(folder).glob(f"model*.{VARIANT}*")):  # one file, shards, or their index
            kwargs.setdefault("variant", VARIANT)
        return super().from_pretrained(folder, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save a model; see transformers."""
        super().save_pretrained(save_directory, *args, **{"variant": VARIANT} | kwargs)


# The extended class of each fused class; a pickle finds it here by its name.
_EXTENDED: dict[type[PreTrainedModel], type[PreTrainedModel]] = {
    kind: type(kind.__name__, (ExtendedModel, kind), {"__module__": __name__, "__doc__": f"{kind.__name__}, extended."})
    for kind in (
        bert.BertModel,
        bert.BertForPreTraining,
        bert.BertForMaskedLM,
        bert.BertForSequenceClassification,
        bert.BertForMultipleChoice,
        bert.BertForTokenClassification,
        bert.BertForQuestionAnswering,
    )
}
globals().update({kind.__name__: kind for kind in _EXTENDED.values()})


def class_for(kind: type[ModelT], config: BertConfig) -> type[ModelT]:
    """Return the class of models like those of the fused class `kind`, of a configuration's family and with extensions.

    Raises:
        ValueError: There is no such class.
    """
    if issubclass(kind, ExtendedModel):
        return kind
    if not isinstance(config, ExtendedBertConfig):
        return class_like(kind, config)
    if kind not in _EXTENDED:
        raise ValueError(f"{kind.__name__} has no extensions: use one of {', '.join(x.__name__ for x in _EXTENDED)}")
    return cast(type[ModelT], _EXTENDED[kind])  # a subclass of `kind`


def select_layers(name: str, config: BertConfig) -> tuple[list[int], bool]:
    """Return the indices of the hidden states of features, and whether these are concatenated instead of summed.

    Args:
        name: Name of the features, a key of `LAYERS`.
        config: Configuration of the encoder; hidden state 0 is that of the embeddings.

    Raises:
        ValueError: There are no such features.
    """
    if name not in LAYERS:
        raise ValueError(f"there are no features {name!r}: use one of {', '.join(LAYERS)}")
    selected, concatenated = LAYERS[name]
    states = config.num_hidden_layers + 1
    indices = range(1, states) if selected is None else selected
    return sorted({max(index % states if index >= 0 else index + states, 0) for index in indices}), concatenated


def warn_of_few_layers(flag: str, name: str, config: BertConfig) -> None:
    """Warn if a model has fewer hidden states than the features that a flag names: then all of them are used."""
    selected, states = LAYERS[name][0] or [], config.num_hidden_layers + 1
    if len(selected) > states:
        logger.warning("%s %s: the model has %d hidden states, all of which are used", flag, name, states)


class BertFeaturesForTokenClassification(ExtendedModel, bert.BertPreTrainedModel):
    """Token classification on features of a frozen encoder (Devlin et al., 2019, section 5.3).

    Several hidden states are concatenated, or summed with learned weights, softmax(s) as in ELMo. A BiLSTM reads them,
    and a linear layer classifies each token.
    """

    def __init__(self, config: ExtendedBertConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]  # is the size of `id2label`
        self.bert = bert.BertModel(config, add_pooling_layer=False).requires_grad_(False)
        self.layer_indices, self.concatenated = select_layers(str(config.feature_layers), config)
        self.weights = nn.Parameter(torch.zeros(len(self.layer_indices)))
        size = config.hidden_size * (len(self.layer_indices) if self.concatenated else 1)
        self.reader = BiLSTM(size, config.lstm_size, config.lstm_layers)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(2 * config.lstm_size, self.num_labels)
        self.post_init()  # type: ignore[no-untyped-call]  # transformers declares no types

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Open a model, whose encoder is frozen; see `ExtendedModel`."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.bert.requires_grad_(False)  # transformers replaces the parameters
        return loaded

    @torch.no_grad()
    def features(self, packed: Packed) -> Tensor:
        """Compute the hidden states that the BiLSTM reads, without dropout: [T, layers, H]."""
        states: list[Tensor] = []
        encode(self.bert, replace(packed, rng=None), hidden_states=states)
        return torch.stack([states[index] for index in self.layer_indices], dim=1)

    def logits(self, packed: Packed, features: Tensor | None = None) -> Tensor:
        """Compute the logits of tokens [T, labels], from their `features` [T, layers, H] if they are known already."""
        states = self.features(packed) if features is None else features
        mixed = states.flatten(1) if self.concatenated else (self.weights.softmax(0)[:, None] * states).sum(1)
        rows: Tensor = self.dropout(self.reader(self.dropout(mixed), packed.sequences.lengths))
        logits: Tensor = self.classifier(rows) if self.training else in_fp32(self.classifier, rows)
        return logits
