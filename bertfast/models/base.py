"""What all nine classes share, and `BertModel`, which eight of them stand on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from bertfast import checkpoint, encoder, reference
from bertfast.config import BertConfig
from bertfast.encoder import cross_entropy_sum
from bertfast.inputs import Layout, Packed, unpad
from bertfast.modules import BertEmbeddings, BertEncoder, BertPooler, BiLSTM
from bertfast.outputs import BaseModelOutput, ModelOutput
from bertfast.reference import IGNORED


class BertPreTrainedModel(nn.Module):
    """What all nine classes share: initialisation, ties, files, and the way into and out of packed tokens."""

    _no_split_modules = ("BertEmbeddings", "BertLayer")
    accepts_loss_kwargs = True  # every loss divides by `num_items_in_batch` where it is given

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.bilstm: BiLSTM | None = None  # between the encoder and a head, where `config.extra` asks for it

    def _initialise(self) -> None:
        if self.config.extra.get("bilstm") and hasattr(self, "bert"):
            self.bilstm = BiLSTM(self.config.hidden_size, self.config.hidden_size // 2)
        # The paper's released code: truncated normal, at two standard deviations.
        deviation = self.config.initializer_range
        fresh = [child for name, child in self.named_children() if name != "bert"]  # which has initialised itself
        for module in (module for child in fresh for module in child.modules()):
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

    @property
    def base_model(self) -> BertModel:
        """The encoder."""
        return getattr(self, "bert", self)

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

    @property
    def copies_lengths_to_host(self) -> bool:
        """Whether a pass needs the sequences' lengths on the host, and waits for the device: an LSTM does."""
        return any(isinstance(module, BiLSTM) for module in self.modules())

    @classmethod
    def from_pretrained(cls, name: str | Path, *, config: BertConfig | None = None, **changes) -> BertPreTrainedModel:
        """Read a model from a folder or a hub id, in evaluation mode. `changes` override entries of its config.

        Parameters that the checkpoint lacks are initialised, and named in a warning, as are weights left over.
        """
        folder = checkpoint.resolve(name)
        model = cls(config if config is not None else BertConfig.from_pretrained(folder, **changes))
        checkpoint.load_weights(model, checkpoint.read_weights(folder), str(name))
        return model.eval()

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write `config.json` and `model.safetensors`, which transformers opens, with `state_dict` if it is given."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_weights(self, folder, state_dict)
        self.config.save_pretrained(folder, type(self).__name__)

    def _unpad(self, inputs: tuple, others: dict, *, pooled: bool = True) -> tuple[Packed, Layout]:
        known = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch", "num_choices")
        unknown = [name for name, value in others.items() if name not in known and value not in (None, False)]
        if unknown:
            raise TypeError(
                f"{type(self).__name__} does not take {', '.join(unknown)}; it has no cross-attention and no cache"
            )
        return unpad(
            *inputs,
            cu_seq_lens_q=others.get("cu_seq_lens_q"),
            max_length_q=others.get("max_length_q"),
            positions=self.config.max_position_embeddings,
            training=self.training,
            pooled=pooled,
            pool_last=bool(self.config.extra.get("pool_last")),
        )

    def _encode(
        self, packed: Packed, layout: Layout, record: tuple[bool | None, bool | None], rows: Tensor | None = None
    ) -> tuple[Tensor, dict]:
        """Hidden states at `rows` [R, H] (None: all, [T, H]), and the records asked for in the caller's layout."""
        bert = getattr(self, "bert", self)
        if self.bilstm is not None:
            hidden = encoder.encode(bert, packed)
            read = self.bilstm(hidden, packed.sequences.lengths)  # which copies the lengths to the host
            hidden = torch.cat([read, hidden[len(read) :]])  # query-only tokens and padding slots are in no sequence
            return hidden if rows is None else hidden[rows], {}
        want_attentions, want_states = self._wants(record)
        if not (want_attentions or want_states):
            return encoder.encode(bert, packed, rows), {}
        states: list[Tensor] = []
        hidden = encoder.encode(bert, packed, hidden_states=states)
        records = {}
        if want_states:
            records["hidden_states"] = tuple(layout.pad(state) for state in states)
        if want_attentions:
            layers = enumerate(zip(bert.encoder.layer, states, strict=False))
            records["attentions"] = tuple(
                _attention_record(module, state, packed, layout, i) for i, (module, state) in layers
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
        return self.bert.pooler(first[:, None]), records

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

    def packed_modules(self) -> tuple[nn.Module, nn.ModuleList]:
        """Return the modules that `bertfast.encoder.encode` calls."""
        return self.embeddings, self.encoder.layer

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
        packed, layout = self._unpad(inputs, others, pooled=self.pooler is not None)
        hidden, records = self._encode(packed, layout, (output_attentions, output_hidden_states))
        outputs = BaseModelOutput(
            last_hidden_state=layout.pad(hidden),
            pooler_output=None if self.pooler is None else self.pooler(hidden[packed.first][:, None]),
            **records,
        )
        return self._returned(outputs, return_dict)


def cross_entropy(logits: Tensor, labels: Tensor, others: dict) -> Tensor:
    """The mean cross entropy of logits [R, classes] against labels [R], -100 ignored -> []; see `mean`."""
    return mean(cross_entropy_sum(logits, labels), (labels != IGNORED).sum(), others)


def mean(total: Tensor, counted: Tensor, others: dict) -> Tensor:
    """total / counted, 0 if nothing counts; or total over the items of the whole step, if the caller says how many."""
    items = others.get("num_items_in_batch")
    return total / (counted.clamp(min=1) if items is None else items)


def _attention_record(module: nn.Module, hidden: Tensor, packed: Packed, layout: Layout, index: int) -> Tensor:
    # Recomputed from the layer's input, dropout and all: masks are functions, so the values are the same.
    if layout.indices is None:
        raise ValueError("output_attentions wants padded input: packed sequences have no common [length, length]")
    sequences = packed.sequences
    parts = module.parts()
    qkv = encoder.project(parts, hidden)
    arguments = encoder.attention_arguments(parts, qkv.shape[3], packed, index)
    probabilities, _ = reference.attention_probabilities(qkv, sequences, **arguments)  # [B, A, L, L], by position
    # The position in its sequence, from 1, of each of the caller's columns [B, L]; 0 where there is no token.
    order = layout.pad(torch.where(sequences.is_token, sequences.position + 1, 0))
    attended, position = order > 0, (order - 1).clamp(min=0)
    record = probabilities.gather(2, position[:, None, :, None].expand_as(probabilities))
    record = record.gather(3, position[:, None, None, :].expand_as(probabilities))
    return torch.where(attended[:, None, :, None] & attended[:, None, None, :], record, 0).to(qkv.dtype)
