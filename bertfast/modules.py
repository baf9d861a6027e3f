"""The parts of a BERT, with Hugging Face's attribute names.

They hold parameters; a layer, called as a module so that hooks, sharding and activation checkpointing see it, hands
itself to `bertfast/encoder.py`, which computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from bertfast import encoder
from bertfast.config import BertConfig
from bertfast.inputs import Packed


class BertEmbeddings(nn.Module):
    """Word, position and token-type embeddings and their LayerNorm."""

    def __init__(self, config: BertConfig):
        super().__init__()
        hidden = config.hidden_size
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)

    def forward(self, packed: Packed) -> Tensor:
        tables = (self.word_embeddings, self.position_embeddings, self.token_type_embeddings)
        return encoder.embed(encoder.EmbeddingParts(*tables, self.LayerNorm, self.config.hidden_dropout_prob), packed)


class BertSelfAttention(nn.Module):
    """The projections to queries, keys and values."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)


class DenseLayerNorm(nn.Module):
    """A projection back to the residual stream, and the LayerNorm behind it."""

    def __init__(self, columns: int, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(columns, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class BertAttention(nn.Module):
    """Self-attention and its output projection."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = DenseLayerNorm(config.hidden_size, config)


class BertIntermediate(nn.Module):
    """The feed-forward layer's widening product."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)


class BertLayer(nn.Module):
    """One transformer layer."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = DenseLayerNorm(config.intermediate_size, config)

    def forward(
        self,
        hidden: Tensor,
        packed: Packed,
        index: int,
        rows: Tensor | None = None,
        copy: Tensor | None = None,
        return_copy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return encoder.layer(self.parts(), hidden, packed, index, rows, copy, return_copy)

    def parts(self) -> encoder.LayerParts:
        """Return the layer's modules and options."""
        config, attention = self.config, self.attention
        return encoder.LayerParts(
            query=attention.self.query,
            key=attention.self.key,
            value=attention.self.value,
            attention_dense=attention.output.dense,
            attention_norm=attention.output.LayerNorm,
            intermediate_dense=self.intermediate.dense,
            output_dense=self.output.dense,
            output_norm=self.output.LayerNorm,
            activation=config.hidden_act,
            heads=config.num_attention_heads,
            scale=None,
            causal=config.is_decoder,
            attention_dropout=config.attention_probs_dropout_prob,
            attention_output_dropout=config.hidden_dropout_prob,
            output_dropout=config.hidden_dropout_prob,
        )


class BertEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))


class BertPooler(nn.Module):
    """A dense layer and tanh on [CLS]."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        return encoder.pool(self, first[:, 0])


class BiLSTM(nn.Module):
    """An LSTM in both directions over each of the sequences that lie end to end: [T, inputs] -> [T, 2 · size]."""

    def __init__(self, inputs: int, size: int, layers: int = 2):
        super().__init__()
        self.lstm = nn.LSTM(inputs, size, layers, bidirectional=True)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        present = [length for length in lengths if length]
        sequences = pack_sequence(x[: sum(present)].split(present), enforce_sorted=False)
        rows, _ = pad_packed_sequence(self.lstm(sequences)[0], batch_first=True)
        return torch.cat([row[:length] for row, length in zip(rows, present, strict=True)])


class BertPredictionHeadTransform(nn.Module):
    """What stands between the encoder and the vocabulary."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        return encoder.transform(self.dense, self.LayerNorm, hidden, self.config.hidden_act)


class BertLMPredictionHead(nn.Module):
    """The transform and the product with the vocabulary."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = self.decoder.bias  # one parameter, two names

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden))


class BertHeads(nn.Module):
    """`cls`: the masked-LM head, the next-sentence head, or both."""

    def __init__(self, config: BertConfig, *, predictions: bool, next_sentence: bool):
        super().__init__()
        if predictions:
            self.predictions = BertLMPredictionHead(config)
        if next_sentence:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)
