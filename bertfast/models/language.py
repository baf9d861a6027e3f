"""The classes with the heads of pre-training: masked LM, next word, next sentence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast import encoder, ops
from bertfast.config import BertConfig
from bertfast.encoder import cross_entropy_sum
from bertfast.inputs import Layout, Packed
from bertfast.models.base import BertModel, BertPreTrainedModel, cross_entropy, mean
from bertfast.modules import BertHeads
from bertfast.outputs import HeadOutput, PreTrainingOutput
from bertfast.reference import IGNORED


class _LanguageModel(BertPreTrainedModel):
    """What the three classes with a vocabulary head share."""

    def _predict(
        self,
        packed: Packed,
        layout: Layout,
        labels: Tensor | None,
        record: tuple[bool | None, bool | None],
        *,
        first: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, dict]:
        """(sum of the losses [], number of labels [], logits [T, V], hidden states of [CLS] [S, H], records).

        In training mode with labels the logits are never made, unless `config.return_logits` or a record is wanted,
        and the last layer runs only on the rows that are read.
        """
        head = self.cls.predictions
        whole = any(self._wants(record)) or self.config.return_logits or not encoder.is_plain(head.decoder)
        if labels is None or whole or not self.training:
            hidden, records = self._encode(packed, layout, record)
            logits = head(hidden)
            total = counted = None
            if labels is not None:
                total = cross_entropy_sum(logits, labels)
                counted = (labels != IGNORED).sum()
            return total, counted, logits, hidden[packed.first] if first else None, records
        rows = (labels != IGNORED).nonzero().squeeze(1)
        read = torch.cat([rows, packed.first]) if first else rows
        hidden, records = self._encode(packed, layout, record, read)
        x = head.transform(hidden[: len(rows)])
        total, _, counted = ops.linear_cross_entropy(x, None, head.decoder.weight, head.decoder.bias, labels[rows])
        return total, counted, None, hidden[len(rows) :] if first else None, records


class BertForPreTraining(_LanguageModel):
    """Masked LM and next-sentence prediction (Devlin et al., 2019, section 3.1)."""

    accepts_loss_kwargs = False  # two means, of tokens and of sequences: one number of items cannot serve both

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertHeads(config, predictions=True, next_sentence=True)
        self._initialise()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others,
    ) -> PreTrainingOutput | tuple:
        """labels [B, L] (-100: not masked) and next_sentence_label [B] (0: B follows A) together give the loss.

        prediction_logits [B, L, V], absent in training mode with both labels (see `config.return_logits`);
        seq_relationship_logits [B, 2].
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        packed, layout = self._unpad(inputs, others)
        labels = None if labels is None or next_sentence_label is None else layout.unpad(labels, "labels", fill=IGNORED)
        record = (output_attentions, output_hidden_states)
        total, counted, logits, first, records = self._predict(packed, layout, labels, record, first=True)
        next_sentence = self.cls.seq_relationship(self.bert.pooler(first[:, None]))
        loss = None
        if labels is not None:
            loss = mean(total, counted, {}) + cross_entropy(next_sentence, next_sentence_label, {})
        outputs = PreTrainingOutput(
            loss=loss,
            prediction_logits=None if logits is None else layout.pad(logits),
            seq_relationship_logits=next_sentence,
            **records,
        )
        return self._returned(outputs, return_dict)


class BertForMaskedLM(_LanguageModel):
    """The masked-LM head alone."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertHeads(config, predictions=True, next_sentence=False)
        self._initialise()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others,
    ) -> HeadOutput | tuple:
        """labels [B, L] (-100: ignored) give the loss; logits [B, L, V], absent in training mode with labels."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        packed, layout = self._unpad(inputs, others, pooled=False)
        if labels is not None:
            labels = layout.unpad(self._targets(labels, layout, packed), "labels", fill=IGNORED)
        record = (output_attentions, output_hidden_states)
        total, counted, logits, _, records = self._predict(packed, layout, labels, record)
        outputs = HeadOutput(
            loss=None if labels is None else mean(total, counted, others),
            logits=None if logits is None else layout.pad(logits),
            **records,
        )
        return self._returned(outputs, return_dict)

    @staticmethod
    def _targets(labels: Tensor, layout: Layout, packed: Packed) -> Tensor:
        return labels


class BertLMHeadModel(BertForMaskedLM):
    """Left to right, with `config.is_decoder`: each place predicts the label of the next one of its sequence."""

    @staticmethod
    def _targets(labels: Tensor, layout: Layout, packed: Packed) -> Tensor:
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if layout.indices is None:
            ends = packed.sequences.cu_seqlens[1:].long() - 1
            following = following.index_fill(1, ends.clamp(min=0), IGNORED)
        return following


class BertForNextSentencePrediction(BertPreTrainedModel):
    """The next-sentence head alone."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertHeads(config, predictions=False, next_sentence=True)
        self._initialise()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others,
    ) -> HeadOutput | tuple:
        """labels [B]: 0 where B follows A, 1 where it is random; logits [B, 2]."""
        packed, layout = self._unpad((input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds), others)
        pooled, records = self._pooled_output(packed, layout, (output_attentions, output_hidden_states))
        logits = self.cls.seq_relationship(pooled)
        loss = None if labels is None else cross_entropy(logits, labels, others)
        return self._returned(HeadOutput(loss=loss, logits=logits, **records), return_dict)
