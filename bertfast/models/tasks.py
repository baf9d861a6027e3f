"""The classes that are fine-tuned: a sequence, a choice, every token, or an answer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertfast.config import BertConfig
from bertfast.inputs import Layout
from bertfast.models.base import BertModel, BertPreTrainedModel, cross_entropy, mean
from bertfast.outputs import HeadOutput, QuestionAnsweringOutput
from bertfast.reference import IGNORED


class BertForSequenceClassification(BertPreTrainedModel):
    """A linear layer on the pooled output: classification, multi-label classification or regression."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
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
        """labels [B] of classes or, to regress, of numbers, or [B, labels]; logits [B, labels].

        The loss follows `config.problem_type`, which the first labels decide where it is not set.
        """
        packed, layout = self._unpad((input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds), others)
        pooled, records = self._pooled_output(packed, layout, (output_attentions, output_hidden_states))
        logits = self._classify(pooled, packed.identity and packed.identity.at(packed.first))
        loss = None if labels is None else self._loss(logits, labels, others)
        return self._returned(HeadOutput(loss=loss, logits=logits, **records), return_dict)

    def _loss(self, logits: Tensor, labels: Tensor, others: dict) -> Tensor:
        if self.config.problem_type is None:
            if self.num_labels == 1:
                self.config.problem_type = "regression"
            elif labels.is_floating_point():
                self.config.problem_type = "multi_label_classification"
            else:
                self.config.problem_type = "single_label_classification"
        if self.config.problem_type == "single_label_classification":
            return cross_entropy(logits, labels, others)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = labels.view_as(logits).to(logits.dtype)
        if self.config.problem_type == "regression":
            total = F.mse_loss(logits, labels, reduction="sum")
        else:
            total = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        # A mean over rows and columns; `num_items_in_batch` counts rows.
        return mean(total / self.num_labels, labels.new_full((), len(logits)), others)


class BertForMultipleChoice(BertPreTrainedModel):
    """One score for each choice."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
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
        """Inputs [B, choices, L], labels [B]; logits [B, choices]. Packed input [1, T] wants `num_choices` besides."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        choices = others.get("num_choices")
        if others.get("cu_seq_lens_q") is None:
            given = input_ids if input_ids is not None else inputs_embeds
            if given is None or given.dim() < 3:
                raise ValueError("BertForMultipleChoice wants input_ids of shape [batch, choices, length]")
            choices = given.shape[1]
            inputs = tuple(None if values is None else values.flatten(0, 1) for values in inputs)
        elif choices is None:
            raise ValueError("packed input to BertForMultipleChoice wants num_choices, the number of sequences a row")
        packed, layout = self._unpad(inputs, others)
        pooled, records = self._pooled_output(packed, layout, (output_attentions, output_hidden_states))
        logits = self._classify(pooled, packed.identity and packed.identity.at(packed.first)).view(-1, choices)
        loss = None if labels is None else cross_entropy(logits, labels, others)
        return self._returned(HeadOutput(loss=loss, logits=logits, **records), return_dict)


class BertForTokenClassification(BertPreTrainedModel):
    """A linear layer on every token."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
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
        """labels [B, L] (-100: ignored); logits [B, L, labels]."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        packed, layout = self._unpad(inputs, others, pooled=False)
        hidden, records = self._encode(packed, layout, (output_attentions, output_hidden_states))
        logits = self._classify(hidden, packed.identity)
        loss = None if labels is None else cross_entropy(logits, layout.unpad(labels, "labels", fill=IGNORED), others)
        return self._returned(HeadOutput(loss=loss, logits=layout.pad(logits), **records), return_dict)


class BertForQuestionAnswering(BertPreTrainedModel):
    """Where the answer starts and ends."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self._initialise()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others,
    ) -> QuestionAnsweringOutput | tuple:
        """start_positions and end_positions [B], ignored where no token is; start_logits and end_logits [B, L].

        The softmax is over the tokens that are there; Hugging Face's counts padding in.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        packed, layout = self._unpad(inputs, others, pooled=False)
        hidden, records = self._encode(packed, layout, (output_attentions, output_hidden_states))
        logits = self.qa_outputs(hidden)
        lowest = torch.finfo(logits.dtype).min
        start, end = layout.pad(logits, fill=lowest).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            by_row = layout
            if layout.indices is None:
                by_row = Layout.of(packed.sequences, packed.sequences.max_seqlen_bound)
            rows = by_row.pad(logits, fill=lowest)
            answers = torch.stack([start_positions.flatten(), end_positions.flatten()], 1).clamp(min=0)
            length = rows.shape[1]
            pointed_at = rows.gather(1, answers.clamp(max=length - 1)[:, None]).squeeze(1)
            answers = answers.masked_fill((answers >= length) | (pointed_at == lowest), IGNORED)
            losses = [cross_entropy(rows[..., side], answers[:, side], others) for side in (0, 1)]
            loss = (losses[0] + losses[1]) / 2
        outputs = QuestionAnsweringOutput(loss=loss, start_logits=start, end_logits=end, **records)
        return self._returned(outputs, return_dict)
