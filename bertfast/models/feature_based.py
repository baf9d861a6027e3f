"""BERT as a source of features, as ELMo was: the encoder stays as it is, and a BiLSTM reads what its layers hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bertfast.config import BertConfig
from bertfast.models.base import BertModel, BertPreTrainedModel, cross_entropy
from bertfast.modules import BiLSTM
from bertfast.outputs import HeadOutput

# Which of the embeddings (0) and the layers' outputs (1 …; -1 is the last), and whether they are put side by side.
LAYERS = {
    "embeddings": ([0], False),
    "second-to-last": ([-2], False),
    "last": ([-1], False),
    "sum-last-four": ([-4, -3, -2, -1], False),
    "concat-last-four": ([-4, -3, -2, -1], True),
    "sum-all": (None, False),
}


def chosen_layers(name: str, config: BertConfig) -> tuple[list[int], bool]:
    """(numbers of the hidden states from 0, the embeddings, on; whether they stand side by side, not summed up)."""
    if name not in LAYERS:
        raise ValueError(f"there are no features {name!r}; there are {', '.join(LAYERS)}")
    numbers, concatenated = LAYERS[name]
    states = config.num_hidden_layers + 1
    numbers = range(1, states) if numbers is None else numbers
    return sorted({max(number % states if number >= 0 else number + states, 0) for number in numbers}), concatenated


class BertFeaturesForTokenClassification(BertPreTrainedModel):
    """A tag for each token from features of an encoder that does not learn (Devlin et al., 2019, section 5.3).

    Several layers are put side by side, or summed up with weights that are learned, softmax(s) as in ELMo. Two layers
    of BiLSTM read them, and a linear layer names the tag. `config.extra` holds "feature_layers", "lstm_size" (of each
    direction) and "lstm_layers".
    """

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False).requires_grad_(False)
        options = {"feature_layers": "concat-last-four", "lstm_size": 768, "lstm_layers": 2} | config.extra
        self.numbers, self.concatenated = chosen_layers(options["feature_layers"], config)
        self.weights = nn.Parameter(torch.zeros(len(self.numbers)))
        size = config.hidden_size * (len(self.numbers) if self.concatenated else 1)
        self.reader = BiLSTM(size, options["lstm_size"], options["lstm_layers"])
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(2 * options["lstm_size"], config.num_labels)
        self._initialise()

    @torch.no_grad()
    def features(self, **inputs) -> Tensor:
        """What the encoder, without dropout, gives to learn from: packed input [1, T] -> [1, T, layers, H]."""
        training = self.bert.training
        self.bert.eval()
        states = self.bert(**inputs, output_hidden_states=True).hidden_states
        self.bert.train(training)
        return torch.stack([states[number] for number in self.numbers], dim=2)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        labels: Tensor | None = None,
        features: Tensor | None = None,
        **others,
    ) -> HeadOutput:
        """Packed input [1, T], with `features` [1, T, layers, H] if they are known already; logits [1, T, labels]."""
        if cu_seq_lens_q is None:
            raise ValueError("this model takes packed input alone: input_ids [1, tokens] with cu_seq_lens_q")
        if features is None:
            features = self.features(input_ids=input_ids, token_type_ids=token_type_ids, cu_seq_lens_q=cu_seq_lens_q)
        states = features[0]
        mixed = states.flatten(1) if self.concatenated else (self.weights.softmax(0)[:, None] * states).sum(1)
        hidden = self.reader(self.dropout(mixed), cu_seq_lens_q.diff().tolist())
        logits = self.classifier(self.dropout(hidden))[None]
        loss = None if labels is None else cross_entropy(logits[0], labels[0], others)
        return HeadOutput(loss=loss, logits=logits)
