"""The nine BERT classes, with Hugging Face's constructors, arguments, outputs and parameter names.

B rows, L columns, T packed tokens, S sequences, H hidden, V vocabulary. Padded input [B, L] is packed once, before the
embeddings, and unpacked once, at the end; packed input is [1, T] with `cu_seq_lens_q` int32 [S + 1], and then token
outputs are [1, T, ...] and sequence outputs [S, ...]. What is returned at padding is zero (the least number for the
logits of answers), and what labels say there is not read. Column 0 is no padding to a pooler, though masked out.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertfast import checkpoint, encoder, ops, reference
from bertfast.config import BertConfig
from bertfast.encoder import IGNORED, cross_entropy_sum
from bertfast.inputs import Layout, Packed, pack
from bertfast.modules import BertEmbeddings, BertEncoder, BertHeads, BertPooler
from bertfast.outputs import BaseModelOutput, HeadOutput, ModelOutput, PreTrainingOutput, QuestionAnsweringOutput


class BertPreTrainedModel(nn.Module):
    """What all nine classes share: initialisation, ties, files, and the way into and out of packed tokens."""

    _no_split_modules = ("BertEmbeddings", "BertLayer")
    _pooled = False
    accepts_loss_kwargs = True  # every loss divides by `num_items_in_batch` where it is given

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config

    def _initialise(self) -> None:
        # The paper's released code: truncated normal, at two standard deviations.
        deviation = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx].detach())
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the vocabulary's output weights the word embeddings, where there are both and the config says so."""
        predictions = getattr(getattr(self, "cls", None), "predictions", None)
        if predictions is not None and self.config.tie_word_embeddings:
            predictions.decoder.weight = self.get_input_embeddings().weight
            predictions.bias = predictions.decoder.bias

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embeddings."""
        return getattr(self, "bert", self).embeddings.word_embeddings

    def get_output_embeddings(self) -> nn.Linear | None:
        """The product with the vocabulary, if this model has one."""
        predictions = getattr(getattr(self, "cls", None), "predictions", None)
        return None if predictions is None else predictions.decoder

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the parameters are."""
        return next(self.parameters()).dtype

    @classmethod
    def from_pretrained(cls, name: str | Path, *, config: BertConfig | None = None, **changes) -> BertPreTrainedModel:
        """Read a model from a folder or a hub id, in evaluation mode. `changes` override entries of its config.

        Parameters that the checkpoint lacks are initialised, and named in a warning, as are weights left over.
        """
        folder = checkpoint.resolve(name)
        model = cls(config if config is not None else BertConfig.from_pretrained(folder, **changes))
        checkpoint.load_weights(model, checkpoint.read_weights(folder), str(name))
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, which transformers opens."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_weights(self, folder)
        self.config.save_pretrained(folder, type(self).__name__)

    def _pack(self, inputs: tuple, others: dict, *, pooled: bool = True) -> tuple[Packed, Layout]:
        known = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch", "num_choices")
        unknown = [name for name, value in others.items() if name not in known and value not in (None, False)]
        if unknown:
            raise TypeError(
                f"{type(self).__name__} does not take {', '.join(unknown)}; it has no cross-attention and no cache"
            )
        return pack(
            *inputs,
            cu_seq_lens_q=others.get("cu_seq_lens_q"),
            positions=self.config.max_position_embeddings,
            training=self.training,
            pooled=pooled,
        )

    def _encode(
        self, packed: Packed, layout: Layout, record: tuple[bool | None, bool | None], rows: Tensor | None = None
    ) -> tuple[Tensor, dict]:
        """Hidden states at `rows` [R, H] (None: all, [T, H]), and the records asked for in the caller's layout."""
        bert = getattr(self, "bert", self)
        want_attentions, want_states = self._wants(record)
        if not (want_attentions or want_states):
            return encoder.encode(bert, packed, rows), {}
        states: list[Tensor] = []
        hidden = encoder.encode(bert, packed, hidden_states=states)
        records = {}
        if want_states:
            records["hidden_states"] = tuple(layout.unpack(state) for state in states)
        if want_attentions:
            layers = enumerate(zip(bert.encoder.layer, states, strict=False))
            records["attentions"] = tuple(
                _attention_record(module.attention.self, state, packed, layout, i) for i, (module, state) in layers
            )
        return hidden if rows is None else hidden[rows], records

    def _wants(self, record: tuple[bool | None, bool | None]) -> tuple[bool, bool]:
        defaults = (self.config.output_attentions, self.config.output_hidden_states)
        attentions, states = (d if given is None else given for given, d in zip(record, defaults, strict=True))
        return attentions, states

    def _pooled_output(
        self, packed: Packed, layout: Layout, record: tuple[bool | None, bool | None]
    ) -> tuple[Tensor, dict]:
        """What the pooler says of every sequence [S, H]; the last layer then runs on [CLS] alone."""
        first, records = self._encode(packed, layout, record, packed.first)
        return self.bert.pooler(first), records

    def _classify(self, x: Tensor, identity) -> Tensor:
        """dropout and the task's linear layer: [R, H] -> [R, labels]."""
        p = self.config.classifier_dropout
        p = self.config.hidden_dropout_prob if p is None else p
        return self.classifier(reference.drop_hidden(x, identity and identity.dropout(p, "classifier")))

    def _returned(self, outputs: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        return outputs if (self.config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()


class BertModel(BertPreTrainedModel):
    """The encoder, with the pooler on top unless told otherwise."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self._initialise()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others,
    ) -> BaseModelOutput | tuple:
        """last_hidden_state [B, L, H] and pooler_output [B, H]."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        packed, layout = self._pack(inputs, others, pooled=self.pooler is not None)
        hidden, records = self._encode(packed, layout, (output_attentions, output_hidden_states))
        outputs = BaseModelOutput(
            last_hidden_state=layout.unpack(hidden),
            pooler_output=None if self.pooler is None else self.pooler(hidden[packed.first]),
            **records,
        )
        return self._returned(outputs, return_dict)


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
        every = torch.arange(len(rows), device=rows.device)
        total, _, counted = ops.linear_cross_entropy(x, every, head.decoder.weight, head.decoder.bias, labels[rows])
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
        packed, layout = self._pack(inputs, others)
        labels = None if labels is None or next_sentence_label is None else layout.pack(labels, "labels")
        record = (output_attentions, output_hidden_states)
        total, counted, logits, first, records = self._predict(packed, layout, labels, record, first=True)
        next_sentence = self.cls.seq_relationship(self.bert.pooler(first))
        loss = None
        if labels is not None:
            loss = _mean(total, counted, {}) + _cross_entropy(next_sentence, next_sentence_label, {})
        outputs = PreTrainingOutput(
            loss=loss,
            prediction_logits=None if logits is None else layout.unpack(logits),
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
        packed, layout = self._pack(inputs, others, pooled=False)
        if labels is not None:
            labels = layout.pack(self._targets(labels, layout, packed), "labels")
        record = (output_attentions, output_hidden_states)
        total, counted, logits, _, records = self._predict(packed, layout, labels, record)
        outputs = HeadOutput(
            loss=None if labels is None else _mean(total, counted, others),
            logits=None if logits is None else layout.unpack(logits),
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
        if layout.places is None:
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
        packed, layout = self._pack((input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds), others)
        pooled, records = self._pooled_output(packed, layout, (output_attentions, output_hidden_states))
        logits = self.cls.seq_relationship(pooled)
        loss = None if labels is None else _cross_entropy(logits, labels, others)
        return self._returned(HeadOutput(loss=loss, logits=logits, **records), return_dict)


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
        packed, layout = self._pack((input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds), others)
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
            return _cross_entropy(logits, labels, others)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = labels.view_as(logits).to(logits.dtype)
        if self.config.problem_type == "regression":
            total = F.mse_loss(logits, labels, reduction="sum")
        else:
            total = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        # A mean over rows and columns; `num_items_in_batch` counts rows.
        return _mean(total / self.num_labels, torch.tensor(len(logits), device=logits.device), others)


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
        packed, layout = self._pack(inputs, others)
        pooled, records = self._pooled_output(packed, layout, (output_attentions, output_hidden_states))
        logits = self._classify(pooled, packed.identity and packed.identity.at(packed.first)).view(-1, choices)
        loss = None if labels is None else _cross_entropy(logits, labels, others)
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
        packed, layout = self._pack(inputs, others, pooled=False)
        hidden, records = self._encode(packed, layout, (output_attentions, output_hidden_states))
        logits = self._classify(hidden, packed.identity)
        loss = None if labels is None else _cross_entropy(logits, layout.pack(labels, "labels"), others)
        return self._returned(HeadOutput(loss=loss, logits=layout.unpack(logits), **records), return_dict)


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
        packed, layout = self._pack(inputs, others, pooled=False)
        hidden, records = self._encode(packed, layout, (output_attentions, output_hidden_states))
        logits = self.qa_outputs(hidden)
        lowest = torch.finfo(logits.dtype).min
        start, end = layout.unpack(logits, fill=lowest).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            rows = (layout if layout.places is not None else Layout.of(packed.sequences)).unpack(logits, fill=lowest)
            answers = torch.stack([start_positions.flatten(), end_positions.flatten()], 1).clamp(min=0)
            length = rows.shape[1]
            pointed_at = rows.gather(1, answers.clamp(max=length - 1)[:, None]).squeeze(1)
            answers = answers.masked_fill((answers >= length) | (pointed_at == lowest), IGNORED)
            losses = [_cross_entropy(rows[..., side], answers[:, side], others) for side in (0, 1)]
            loss = (losses[0] + losses[1]) / 2
        outputs = QuestionAnsweringOutput(loss=loss, start_logits=start, end_logits=end, **records)
        return self._returned(outputs, return_dict)


def _cross_entropy(logits: Tensor, labels: Tensor, others: dict) -> Tensor:
    return _mean(cross_entropy_sum(logits, labels), (labels != IGNORED).sum(), others)


def _mean(total: Tensor, counted: Tensor, others: dict) -> Tensor:
    """total / counted, or over the items of the whole step where the caller says how many; 0 if there are none."""
    items = others.get("num_items_in_batch")
    return total / (counted.clamp(min=1) if items is None else items)


def _attention_record(module: nn.Module, hidden: Tensor, packed: Packed, layout: Layout, index: int) -> Tensor:
    # Computed again from the layer's input, dropout and all: masks are functions, so the numbers are the same.
    if layout.places is None:
        raise ValueError("output_attentions wants padded input: packed sequences have no common [length, length]")
    qkv = encoder.project(module, hidden)
    arguments = encoder.attention_arguments(module, packed, index)
    rows, columns = layout.shape
    record = qkv.new_zeros(rows, qkv.shape[2], columns, columns)
    lengths, used = list(packed.sequences.lengths), packed.sequences.used
    places = layout.places[:used].split(lengths)
    occupied = [(row, place % columns) for row, place in enumerate(places) if len(place)]
    parts = qkv[:used].split(lengths)
    each = reference.attention_probabilities(parts, packed.sequences.numbers, **arguments)
    for (row, place), (probabilities, _) in zip(occupied, each, strict=True):
        record[row, :, place[:, None], place] = probabilities.to(record.dtype)
    return record
