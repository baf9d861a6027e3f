"""BERT as a source of features, as ELMo was: the encoder stays as it is, and a BiLSTM reads what its layers hold."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import BertConfig

from bertfast import encoder
from bertfast.inputs import Packed
from bertfast.models import bert
from bertfast.models.own_parts import BiLSTM, OwnBertConfig, OwnParts

# Which of the embeddings (0) and the layers' outputs (1 …; -1 is the last), and whether they are put side by side.
LAYERS = {
    "embeddings": ([0], False),
    "second-to-last": ([-2], False),
    "last": ([-1], False),
    "mean-last-four": ([-4, -3, -2, -1], False),
    "concat-last-four": ([-4, -3, -2, -1], True),
    "mean-all": (None, False),
}


def chosen_layers(name: str, config: BertConfig) -> tuple[list[int], bool]:
    """Return the indices of hidden states, the embeddings' being 0, and whether they are concatenated, not summed."""
    if name not in LAYERS:
        raise ValueError(f"there are no features {name!r}; there are {', '.join(LAYERS)}")
    indices, concatenated = LAYERS[name]
    states = config.num_hidden_layers + 1
    indices = range(1, states) if indices is None else indices
    return sorted({max(index % states if index >= 0 else index + states, 0) for index in indices}), concatenated


class BertFeaturesForTokenClassification(OwnParts, bert.BertPreTrainedModel):
    """Token classification by the features of an encoder that does not learn (Devlin et al., 2019, section 5.3).

    Several layers are concatenated, or summed with weights that are learned, softmax(s) as in ELMo. A BiLSTM reads
    them, and a linear layer classifies the token.
    """

    def __init__(self, config: OwnBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = bert.BertModel(config, add_pooling_layer=False).requires_grad_(False)
        self.layer_indices, self.concatenated = chosen_layers(config.feature_layers, config)
        self.weights = nn.Parameter(torch.zeros(len(self.layer_indices)))
        size = config.hidden_size * (len(self.layer_indices) if self.concatenated else 1)
        self.reader = BiLSTM(size, config.lstm_size, config.lstm_layers)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(2 * config.lstm_size, config.num_labels)
        self.post_init()

    @classmethod
    def from_pretrained(cls, name, *args, **kwargs):
        """Open a model, whose encoder does not learn; see `OwnParts`."""
        loaded = super().from_pretrained(name, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.bert.requires_grad_(False)  # transformers makes parameters anew
        return loaded

    @torch.no_grad()
    def features(self, packed: Packed) -> Tensor:
        """Compute what the encoder gives to learn from, without dropout: [T, layers, H]."""
        states: list[Tensor] = []
        encoder.encode(self.bert, replace(packed, identity=None), hidden_states=states)
        return torch.stack([states[index] for index in self.layer_indices], dim=1)

    def logits(self, packed: Packed, features: Tensor | None = None) -> Tensor:
        """Compute the logits of tokens [T, labels], from their `features` [T, layers, H] if they are known already."""
        states = self.features(packed) if features is None else features
        mixed = states.flatten(1) if self.concatenated else (self.weights.softmax(0)[:, None] * states).sum(1)
        return self.classifier(self.dropout(self.reader(self.dropout(mixed), packed.sequences.lengths)))
