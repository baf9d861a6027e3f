"""Mixins that make a class of transformers run its encoder packed, for any model family.

Each call takes the fastest of three ways:

- padding is removed before the embeddings and restored behind the last layer;
- transformers' own loop runs, and each layer that can be fused removes padding and restores it for itself: where a
  layer must be left alone, as one that a hook watches, or where hidden states are recorded;
- transformers' own code runs: attention weights, caches, masks between pairs of tokens, cross-attention, export; and
  all of it where the device and dtype of a call have no fast kernels (`bertfast.fast_kernels`).
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from operator import attrgetter
from typing import ClassVar

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import modeling_outputs
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from bertfast import encoder as functions
from bertfast.architectures import read
from bertfast.fast_kernels import gemm_dtype, why_left_to_transformers
from bertfast.inputs import Layout, Packed, unpad
from bertfast.models import eligibility, registry
from bertfast.models.eligibility import INPUTS, PACKING
from bertfast.reference import IGNORED
from bertfast.sequences import Sequences

_LAYERS_RETURN_TUPLES = int(transformers.__version__.split(".")[0]) < 5
_HEADS_DROP_KEYWORDS = _LAYERS_RETURN_TUPLES  # or refuse them, so that none reaches the encoder
_POOLED_ONLY = "_bertfast_pooled_only"  # of a call whose caller reads nothing but the pooled output


@dataclass(frozen=True, eq=False)
class _Call:
    """The packed tokens of a call that runs transformers' own loop, and which layer is which."""

    packed: Packed
    layout: Layout
    indices: dict[nn.Module, int]


_CALL: ContextVar[_Call | None] = ContextVar("bertfast_call", default=None)
_PACKING: ContextVar[dict | None] = ContextVar("bertfast_packing", default=None)


class FusedEmbeddings(registry.Fused):
    """Embeddings that also take packed tokens."""

    def forward(self, *args, **kwargs):
        if args and isinstance(args[0], Packed):
            return functions.embed(self.architecture.embedding_parts(self), args[0])
        return super().forward(*args, **kwargs)


class FusedLayer(registry.Fused):
    """A layer that also takes packed tokens, from our loop or from transformers'."""

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        if args and isinstance(args[0], Packed):
            return functions.layer(self.architecture.layer_parts(self), hidden_states, *args)
        # A compiler traces transformers' loop as it is, and no call of ours is under way then.
        call = None if torch.compiler.is_compiling() else _CALL.get()
        if call is None or self not in call.indices:
            return super().forward(hidden_states, *args, **kwargs)
        hidden = call.layout.unpad(hidden_states, "hidden_states")
        hidden = functions.layer(self.architecture.layer_parts(self), hidden, call.packed, call.indices[self])
        return (call.layout.pad(hidden),) if _LAYERS_RETURN_TUPLES else call.layout.pad(hidden)


class FusedTransform(registry.Fused):
    """What stands before the vocabulary, in one operation behind its GEMM."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or eligibility.tracing_unsupported_reason(hidden_states) is not None:
            return super().forward(hidden_states)
        if eligibility.transform_unsupported_reason(self.architecture, self) is not None:
            return super().forward(hidden_states)
        shape = (1, hidden_states.shape[:-1].numel())  # there is no attention: rows do not matter
        if why_left_to_transformers(hidden_states.device, gemm_dtype(hidden_states), shape=shape) is not None:
            return super().forward(hidden_states)
        paths = self.architecture.transform
        dense, norm = attrgetter(paths["dense"], paths["norm"])(self)
        return functions.transform(dense, norm, hidden_states.flatten(0, -2), "gelu").view_as(hidden_states)


class FusedModel(registry.Fused):
    """A model whose inner modules are fused when it is made, and whose arguments are known by name.

    Attributes:
        arguments: The names of the arguments of the original's `forward`.
        passes_keywords: Whether that hands keywords that it does not know to the encoder.
    """

    arguments: ClassVar[tuple[str, ...]] = ()
    passes_keywords: ClassVar[bool] = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        registry.fuse(self)

    def _named(self, args: tuple, kwargs: dict) -> dict:
        return dict(zip(self.arguments, args, strict=False)) | kwargs


class FusedEncoder(FusedModel):
    """An encoder, which removes padding before its embeddings and restores it behind its last layer."""

    def packed_modules(self) -> tuple[nn.Module, nn.ModuleList]:
        """Return the embeddings and the layers: see `bertfast.encoder.PackedModel`."""
        paths = self.architecture.embeddings, self.architecture.layers
        return tuple(read(self, path.split(".")) for path in paths)

    def forward(self, *args, **kwargs):
        pooled_only = kwargs.pop(_POOLED_ONLY, False)
        if _HEADS_DROP_KEYWORDS and not torch.compiler.is_compiling():
            kwargs |= _PACKING.get() or {}
        arguments = self._named(args, kwargs)
        reason, whole = self._unsupported_reasons(arguments)
        if reason is not None:
            if arguments.get("cu_seq_lens_q") is not None:  # which transformers ignores, so that sequences would mix
                raise ValueError(f"packed input (cu_seq_lens_q) cannot be taken here, as {reason}: give it padded")
            return super().forward(*args, **kwargs)
        if eligibility.kernels_unsupported_reason(self, arguments) is not None:
            if arguments.get("cu_seq_lens_q") is None:
                return super().forward(*args, **kwargs)
            arguments, layout = _padded(arguments)
            outputs = _packed_again(super().forward(**arguments | {"return_dict": True}), layout)
        elif whole:
            outputs = self._encode(arguments, pooled_only)
        else:
            outputs = self._run_loop(super().forward, arguments)
        return_dict = arguments.get("return_dict")
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if as_dict else outputs.to_tuple()

    def _unsupported_reasons(self, arguments: dict) -> tuple[str | None, bool]:
        """Return why transformers' own code must run, and if it need not, whether all layers can run packed."""
        reason = eligibility.call_unsupported_reason(self, arguments)
        if reason is not None:
            return reason, False
        states = arguments.get("output_hidden_states")
        states = self.config.output_hidden_states if states is None else states
        broken = eligibility.whole_unsupported_reason(self)
        if broken is None and states is False:
            return None, True
        if torch.compiler.is_compiling():
            return broken or "hidden states are asked for", False
        checkpointed = any(getattr(layer, "gradient_checkpointing", False) for layer in self.packed_modules()[1])
        if self.training and checkpointed and broken is not None:
            return broken, False  # transformers' loop, recomputed in the backward pass, would not know its call
        return eligibility.encoder_unsupported_reason(self), False

    def unpadded(self, arguments: dict) -> tuple[Packed, Layout]:
        """Remove padding from a call's inputs, of shapes that broadcast in transformers too."""
        given = arguments.get("input_ids")
        given = arguments["inputs_embeds"] if given is None else given
        rows, columns = given.shape[:2]
        mask, positions, types = (arguments.get(name) for name in ("attention_mask", "position_ids", "token_type_ids"))
        if mask is not None and mask.shape != (rows, columns):
            mask = F.pad(mask, (0, columns - mask.shape[1])).expand(rows, columns)
        if positions is not None and positions.dim() == 1:
            positions = positions[None]
        return unpad(
            arguments.get("input_ids"),
            mask,
            types,
            positions,
            arguments.get("inputs_embeds"),
            cu_seq_lens_q=arguments.get("cu_seq_lens_q"),
            max_length_q=arguments.get("max_length_q"),
            positions=self.config.max_position_embeddings,
            training=self.training and eligibility.has_dropout(self),
            pooled=self.pooler is not None,
        )

    def _encode(self, arguments: dict, pooled_only: bool) -> BaseModelOutputWithPoolingAndCrossAttentions:
        packed, layout = self.unpadded(arguments)
        # transformers' pooler reads the first column alone, so it may be given a batch that has no other.
        of_first = self.pooler is not None and eligibility.pooler_unsupported_reason(self) is None
        if pooled_only and of_first:
            first = functions.encode(self, packed, packed.first)
            unread = first.new_zeros(()).expand(*layout.shape, first.shape[1])
            return BaseModelOutputWithPoolingAndCrossAttentions(unread, self.pooler(first[:, None]))
        hidden = functions.encode(self, packed)
        pooled = None
        if of_first:
            pooled = self.pooler(hidden[packed.first][:, None])
        elif self.pooler is not None:
            by_row = layout
            if layout.indices is None:
                by_row = Layout.of(packed.sequences, packed.sequences.max_seqlen_bound)
            pooled = self.pooler(by_row.pad(hidden))
        return BaseModelOutputWithPoolingAndCrossAttentions(layout.pad(hidden), pooled)

    def _run_loop(self, forward, arguments: dict) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Run transformers' loop, in which each layer that can be fused removes padding for itself."""
        restore = None
        if arguments.get("cu_seq_lens_q") is not None:
            arguments, restore = _padded(arguments)
        packed, layout = self.unpadded(arguments)
        supported = {
            layer: index
            for index, layer in enumerate(self.packed_modules()[1])
            if eligibility.layer_unsupported_reason(self.architecture, self.config, layer, self.training) is None
        }
        call = _CALL.set(_Call(packed, layout, supported))
        try:
            own = {name: value for name, value in arguments.items() if name not in PACKING}
            outputs = forward(**own | {"return_dict": True})
        finally:
            _CALL.reset(call)
        return outputs if restore is None else _packed_again(outputs, restore)


class FusedHead(FusedModel):
    """A model with a task's head, whose own code runs on a fused encoder."""

    def forward(self, *args, **kwargs):
        packing = {name: kwargs.pop(name) for name in PACKING if _HEADS_DROP_KEYWORDS and name in kwargs}
        if not packing:
            return super().forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            raise ValueError("packed input (cu_seq_lens_q) to a compiled head needs transformers 5: give it padded")
        call = _PACKING.set(packing)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _PACKING.reset(call)


class FusedMean(FusedHead):
    """A head whose loss is the mean over the labels that are there; over a whole step's, where it is told how many."""

    # transformers' heads take any keyword, so that Trainer believes that they divide by a step's items; they do not.
    accepts_loss_kwargs = True

    def forward(self, *args, num_items_in_batch: Tensor | int | None = None, **kwargs):
        outputs = super().forward(*args, **kwargs)
        labels = self._named(args, kwargs).get("labels")
        if num_items_in_batch is None or labels is None:
            return outputs
        counted = (labels != IGNORED).sum()
        loss = outputs[0] * counted / num_items_in_batch
        loss = torch.where(counted > 0, loss, torch.zeros_like(loss))  # the mean over no label is NaN
        if isinstance(outputs, tuple):
            return (loss, *outputs[1:])
        outputs.loss = loss
        return outputs


class FusedPooled(FusedMean):
    """A head that reads nothing of the encoder but its pooled output, so that the last layer runs on [CLS] alone."""

    def forward(self, *args, **kwargs):
        if eligibility.can_pool_alone(self):
            kwargs[_POOLED_ONLY] = True
        return super().forward(*args, **kwargs)


class FusedMaskedLM(FusedMean):
    """The masked-LM head: in training its loss is computed on labelled rows, and there are no logits."""

    def forward(self, *args, **kwargs):
        arguments = self._named(args, kwargs)
        if not _loss_needs_no_logits(self, arguments, ("labels",)):
            return super().forward(*args, **kwargs)
        loss, _ = _masked_lm_loss(self, arguments)
        return _returned(self, arguments, modeling_outputs.MaskedLMOutput(loss=loss))


class FusedPreTraining(FusedHead):
    """Both heads of pre-training: in training the masked-LM loss is computed on labelled rows, without logits."""

    accepts_loss_kwargs = False  # means of tokens and of pairs: one number of items cannot serve both

    def forward(self, *args, **kwargs):
        arguments = self._named(args, kwargs)
        if not _loss_needs_no_logits(self, arguments, ("labels", "next_sentence_label")):
            return super().forward(*args, **kwargs)
        loss, first = _masked_lm_loss(self, arguments, first=True)
        logits = read(self, self.architecture.head["next_sentence"].split("."))(functions.pooled(self, first))
        loss = loss + F.cross_entropy(logits, arguments["next_sentence_label"].view(-1))
        kind = getattr(self.architecture.modeling, self.architecture.pretraining_output)
        return _returned(self, arguments, kind(loss=loss, seq_relationship_logits=logits))


def _loss_needs_no_logits(model: FusedHead, arguments: dict, labels: tuple[str, ...]) -> bool:
    """Whether a call asks for a training loss that can be computed on labelled rows, and for nothing else."""
    config, base = model.config, model.base_model
    if not model.training or any(arguments.get(name) is None for name in labels):
        return False
    if arguments.get("output_hidden_states") or config.output_hidden_states or getattr(config, "return_logits", False):
        return False
    own = {name: x for name, x in arguments.items() if name not in labels}
    return (
        isinstance(base, FusedEncoder)
        and eligibility.call_unsupported_reason(base, own) is None
        and eligibility.kernels_unsupported_reason(base, own) is None
        and eligibility.whole_unsupported_reason(base) is None
        and eligibility.head_unsupported_reason(model) is None
        and (len(labels) == 1 or eligibility.pooler_unsupported_reason(base) is None)
    )


def _masked_lm_loss(model: FusedHead, arguments: dict, first: bool = False) -> tuple[Tensor, Tensor | None]:
    """Compute the loss on labelled rows, and the last layer's output at each sequence's first token if asked for."""
    base = model.base_model
    packed, layout = base.unpadded(arguments)
    labels = arguments["labels"].reshape(-1)
    labelled = (labels != IGNORED).nonzero().squeeze(1)
    rows = labelled if layout.indices is None else layout.slots()[labelled]
    read = rows.clamp(min=0)
    hidden = functions.encode(base, packed, torch.cat([read, packed.first]) if first else read)
    read = hidden[: len(rows)].masked_fill((rows < 0)[:, None], 0)  # hidden states are zero at padding
    total, _, counted = functions.masked_lm_loss(model, read, labels[labelled])
    items = arguments.get("num_items_in_batch")
    loss = total / (counted.clamp(min=1) if items is None else items)
    return loss, hidden[len(rows) :] if first else None


def _returned(model: nn.Module, arguments: dict, outputs):
    return_dict = arguments.get("return_dict")
    return_dict = model.config.return_dict if return_dict is None else return_dict
    return outputs if return_dict else outputs.to_tuple()


def _packed_again(outputs, layout: Layout):
    """Turn the outputs of a padded batch, each [rows, columns, H], into [1, T, H]."""
    outputs.last_hidden_state = layout.unpad(outputs.last_hidden_state, "outputs")[None]
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(layout.unpad(x, "outputs")[None] for x in outputs.hidden_states)
    return outputs


def _padded(arguments: dict) -> tuple[dict, Layout]:
    """Turn packed input [1, T] into a padded batch, one sequence per row, and the layout that unpads its outputs."""
    given = arguments.get("input_ids") if arguments.get("inputs_embeds") is None else arguments["inputs_embeds"]
    cu_seqlens = arguments["cu_seq_lens_q"].to(given.device)
    sequences = Sequences.from_cu_seqlens(cu_seqlens, capacity=given.shape[1])
    layout = Layout.of(sequences, sequences.max_seqlen)  # transformers' loop needs the lengths: this waits for a GPU
    own = {name: value for name, value in arguments.items() if name not in PACKING}
    for name in INPUTS:
        if own.get(name) is not None:
            own[name] = layout.pad(own[name][0])
    return own | {"attention_mask": layout.pad(sequences.is_token.long())}, layout
