"""Mixins that make a class of transformers run its encoder packed, for any model family.

Each call takes the fastest of three ways:

- padding is removed before the embeddings and restored after the last layer;
- transformers' own loop runs, and each layer that can be fused removes padding and restores it for itself: if another
  layer cannot be fused, because it has a hook, say, or if hidden states are recorded;
- transformers' own code runs: for attention weights, caches, masks between pairs of tokens, cross-attention and export,
  and for devices and dtypes without fast kernels (`bertfast.encoder.kernel_support`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import modeling_outputs
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils.generic import ModelOutput

from bertfast import encoder as functions
from bertfast.architectures import IS_TRANSFORMERS_4, methods, part_at
from bertfast.encoder import kernel_support
from bertfast.encoder.linear import apply_linear
from bertfast.encoder.packed_layer import PackedLayer
from bertfast.encoder.unpadding import Layout, Packed, pad_packed, require_same_packing, unpad
from bertfast.models import calls, eligibility
from bertfast.models.calls import INPUTS, PACKING, Arguments
from bertfast.models.registry import PACKED_LAYER, Fused, FusedModel
from bertfast.ops.index_checks import check_below
from bertfast.ops.reference import IGNORE_INDEX
from bertfast.runtime.torch_compat import call_inside

# The keyword of a call by which a head says what it reads: "pooled" or "first", the pooled output alone or the first
# token's; "first and others"; or "padding", which the packed encoder does not compute.
_READS = "_bertfast_reads"
_READS_FIRST = ("first", "first and others")

# While transformers' own loop runs: the packed tokens of the call, their layout, and the index of each layer that takes
# them.
_CALL: ContextVar[tuple[Packed, Layout, dict[nn.Module, int]] | None] = ContextVar("bertfast_call", default=None)
# While a head runs: keywords for its encoder, which heads of transformers 4 and of users would drop or refuse.
_KEYWORDS: ContextVar[Arguments | None] = ContextVar("bertfast_keywords", default=None)


class FusedEmbeddings(Fused, role="embeddings"):
    """Embeddings that also take packed tokens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Packed):
            return functions.embed(self.architecture.embedding_parts(self), args[0])
        return super().forward(*args, **kwargs)


class FusedLayer(Fused, role="layer"):
    """A layer that also takes packed tokens, or removes padding for itself in transformers' own loop."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Packed):
            whole: PackedLayer | None = vars(self).get(PACKED_LAYER)
            if whole is not None and whole.supports(hidden_states, args[0]):
                return whole(hidden_states, args[0], *args[2:3])
            return functions.layer(self.architecture.layer_parts(self), hidden_states, *args)
        call = None if torch.compiler.is_compiling() else _CALL.get()
        if call is None or self not in call[2]:
            return super().forward(hidden_states, *args, **kwargs)
        packed, layout, indices = call
        hidden = layout.unpad(hidden_states, "hidden_states")
        output = functions.layer(self.architecture.layer_parts(self), hidden, packed, indices[self])
        output = layout.pad(cast(Tensor, output))
        return (output,) if IS_TRANSFORMERS_4 else output


class FusedTransform(Fused, role="transform"):
    """The masked-LM head's transform, in one operation after its GEMM."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        device, dtype = hidden_states.device, kernel_support.gemm_dtype(hidden_states)
        shape = (1, hidden_states.shape[:-1].numel())  # without attention, rows and columns do not matter
        if (
            torch.compiler.is_compiling()
            or kernel_support.tracing_unsupported_reason(hidden_states) is not None
            or eligibility.transform_unsupported_reason(self) is not None
            or kernel_support.unsupported_reason(device, dtype, shape=shape) is not None
        ):
            return cast(Tensor, super().forward(hidden_states))
        dense, norm = attrgetter(self.architecture.transform["dense"], self.architecture.transform["norm"])(self)
        rows = functions.transform(dense, None, norm, hidden_states.flatten(0, -2))
        return torch.unflatten(rows, 0, hidden_states.shape[:-1])  # its width may be another


class FusedEncoder(FusedModel, role="encoder"):
    """An encoder, which removes padding before its embeddings and restores it after its last layer."""

    def packed_modules(self) -> tuple[Callable[[Packed], Tensor], nn.ModuleList]:
        """Return the embeddings and the layers: see `bertfast.encoder.PackedModel`."""
        architecture = self.architecture
        embeddings, layers = (part_at(self, path) for path in (architecture.embeddings, architecture.layers))
        if not architecture.embedding:
            embeddings = partial(_look_up, embeddings)
        projection = architecture.projection_of(self)
        return embeddings if projection is None else partial(_project, embeddings, projection), layers

    def with_rotary(self, packed: Packed) -> Packed:
        """Add the rotary tables that the layers read: see `bertfast.encoder.PackedModel`."""
        if self.architecture.rotary is None or packed.rotary is not None:
            return packed
        return replace(packed, rotary=self.architecture.rotary_tables(self, packed.position_ids))

    def output_norm(self) -> nn.Module | None:
        """Return the norm after the last layer: see `bertfast.encoder.PackedModel`."""
        name = self.architecture.final_norm
        return None if name is None else getattr(self, name)

    def padding_index(self) -> int | None:
        """Return the token id that positions skip: see `bertfast.encoder.PackedModel`."""
        path = self.architecture.padding_index
        return None if path is None else part_at(self, path)

    def max_positions(self) -> int | None:
        """Return the number of rows of the position table: see `bertfast.encoder.PackedModel`."""
        return self.config.max_position_embeddings if self.architecture.rotary is None else None

    def forward(self, **arguments: Any) -> Any:
        if not torch.compiler.is_compiling():
            arguments |= _KEYWORDS.get() or {}
        reads = arguments.pop(_READS, None)
        is_packed = arguments.get("cu_seq_lens_q") is not None
        require_same_packing(arguments.get("cu_seq_lens_q"), arguments.get("cu_seq_lens_k"))
        reason = calls.call_unsupported_reason(self, arguments, self.reads_first(reads))
        if reads == "padding":
            reason = "its head reads padding"
        if reason is not None and is_packed:  # transformers ignores cu_seq_lens_q, so that sequences would mix
            raise ValueError(f"packed input (cu_seq_lens_q) is not supported here, because {reason}: pass it padded")
        if reason is None and not is_packed and calls.is_short(self, arguments):
            return super().forward(**arguments)
        layers = {}
        if reason is None and calls.kernels_unsupported_reason(self, arguments) is None:
            states = arguments.get("output_hidden_states")
            records = (self.config.output_hidden_states if states is None else states) is not False
            if not records and eligibility.whole_unsupported_reason(self) is None:
                return calls.as_requested(self, arguments, self._encode(arguments, reads))
            layers = self._layers_in_loop()
        if not layers and not is_packed:
            return super().forward(**arguments)
        outputs = self._run_loop(super().forward, arguments, layers, reads)
        return calls.as_requested(self, arguments, outputs)

    def _layers_in_loop(self) -> dict[nn.Module, int]:
        """Return the layers that remove padding for themselves in transformers' own loop, and their indices."""
        if torch.compiler.is_compiling():
            return {}
        reasons, path = eligibility.unsupported_reasons(self), self.architecture.layers
        if path in reasons or self.recomputes():  # recomputed layers run when this call is over
            return {}
        layers = enumerate(self.packed_modules()[1])
        return {layer: index for index, layer in layers if reasons[f"{path}.{index}"] is None}

    def recomputes(self) -> bool:
        """Return whether activations of layers are recomputed in the backward pass."""
        return self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def reads_first(self, reads: str | None = None) -> bool:
        """Return whether the first token of each row is read even where it is masked out; `reads`: see `_READS`."""
        # A compiled head of transformers 4 cannot say what it reads.
        is_unknown = IS_TRANSFORMERS_4 and torch.compiler.is_compiling() and bool(self.architecture.first_token_readers)
        return is_unknown or reads in _READS_FIRST or eligibility.pooler(self) is not None

    def unpadded(self, arguments: Arguments, reads: str | None = None) -> tuple[Packed, Layout]:
        """Remove padding from a call's inputs, of shapes that broadcast in transformers too; `reads`: see `_READS`."""
        infers = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return unpad(
            *(arguments.get(name) for name in INPUTS),
            cu_seq_lens_q=arguments.get("cu_seq_lens_q"),
            max_length_q=arguments.get("max_length_q"),
            positions=self.max_positions(),
            padding_index=self.padding_index(),
            training=self.training and eligibility.has_dropout(self),
            pooled=self.reads_first(reads),
            bucketed=infers and calls.caches_shapes(self),
        )

    def run_packed(self, packed: Packed, rows: Tensor | None = None) -> Tensor:
        """Run the embeddings and all layers on packed tokens: see `bertfast.encoder.encode`."""
        stack = part_at(self, self.architecture.stack)
        around = [] if stack is self else [stack]
        return cast(Tensor, call_inside(around, functions.encode, self, packed, rows))

    def _encode(self, arguments: Arguments, reads: str | None) -> ModelOutput:
        packed, layout = self.unpadded(arguments, reads)
        # transformers' pooler reads the first column alone, so it may be given a batch that has no other.
        reads_first_column = eligibility.pooler_unsupported_reason(self) is None
        if reads == "pooled" and reads_first_column:
            first = self.run_packed(packed, packed.first)
            unread = first.new_zeros(()).expand(*layout.shape, first.shape[1])
            return self._output(unread, functions.pooled(self, first))
        if reads == "first" or (reads == "first and others" and layout.indices is None):
            return self._output(self.run_packed(packed, packed.first)[:, None])
        hidden = self.run_packed(packed)
        pooled, pooler = None, eligibility.pooler(self)
        if reads_first_column:
            pooled = functions.pooled(self, hidden[packed.first])
        elif pooler is not None:
            sequences = packed.sequences
            by_row = Layout.of(sequences, sequences.max_seqlen_bound) if layout.indices is None else layout
            pooled = pooler(by_row.pad(hidden))
        return self._output(layout.pad(hidden), pooled)

    def _output(self, hidden: Tensor, pooled: Tensor | None = None) -> ModelOutput:
        kind = getattr(modeling_outputs, self.architecture.output)
        output: ModelOutput = kind(hidden) if pooled is None else kind(hidden, pooled)
        return output

    def _run_loop(
        self, forward: Callable[..., Any], arguments: Arguments, layers: dict[nn.Module, int], reads: str | None
    ) -> Any:
        """Run transformers' own loop on padded input, in which `layers` remove padding for themselves."""
        caller_layout = None
        cu_seq_lens = arguments.get("cu_seq_lens_q")
        arguments = {name: value for name, value in arguments.items() if name not in PACKING}
        if cu_seq_lens is not None:
            packed = {name: arguments[name] for name in INPUTS if arguments.get(name) is not None}
            padded, caller_layout = pad_packed(packed, cu_seq_lens)
            arguments |= padded
        call = None
        if layers:
            tokens, layout = self.unpadded(arguments, reads)
            call = self.with_rotary(tokens), layout, layers
        token = _CALL.set(call)
        try:
            outputs = forward(**arguments | {"return_dict": True})
        finally:
            _CALL.reset(token)
        if caller_layout is None:
            return outputs
        first = outputs.last_hidden_state[:, :1]
        outputs = calls.pack_outputs(outputs, caller_layout)
        if reads in _READS_FIRST:
            outputs.last_hidden_state = first
        return outputs


def _look_up(table: nn.Module, packed: Packed) -> Tensor:
    """Call a table of token embeddings, or return the embeddings that the call has instead."""
    return table(packed.token_ids) if packed.embeddings is None else packed.embeddings


def _project(embeddings: nn.Module, projection: nn.Module, packed: Packed) -> Tensor:
    """Compute the embeddings and the layer after them, in the dtype of the embeddings."""
    embedded: Tensor = embeddings(packed)
    return apply_linear(projection, embedded).to(embedded.dtype)


class FusedHead(FusedModel, role="head"):
    """A model with a task's head, which runs transformers' own code on a fused encoder."""

    def forward(self, **arguments: Any) -> Any:
        names = (*PACKING, _READS) if IS_TRANSFORMERS_4 else (_READS,)
        keywords = {name: arguments.pop(name) for name in names if name in arguments}
        if torch.compiler.is_compiling():  # which does not trace a context variable
            if "cu_seq_lens_q" in keywords:
                raise ValueError(
                    "packed input (cu_seq_lens_q) to a compiled head requires transformers 5: pass it padded"
                )
            if not IS_TRANSFORMERS_4 and eligibility.runs_family_forward(self):
                arguments |= keywords  # which the family's forward passes on
            keywords = {}
        if not keywords:
            return super().forward(**arguments)
        call = _KEYWORDS.set(keywords)
        try:
            return super().forward(**arguments)
        finally:
            _KEYWORDS.reset(call)


class FusedMeanLoss(FusedHead, role="mean_loss"):
    """A head whose loss is the mean over a batch's labels, or over a whole step's if `num_items_in_batch` is passed."""

    # Trainer then passes `num_items_in_batch`, by which transformers' own heads do not divide. That of transformers 4
    # would also pass it to calls without labels, and leave a user's own loss undivided.
    accepts_loss_kwargs = not IS_TRANSFORMERS_4

    def forward(self, **arguments: Any) -> Any:
        labels, num_items_in_batch = arguments.get("labels"), arguments.get("num_items_in_batch")
        if labels is None or num_items_in_batch is None or not methods.runs_family_loss(self.architecture, self):
            return super().forward(**arguments)
        del arguments["num_items_in_batch"]
        outputs = super().forward(**arguments)
        counted = torch.stack([labels != ignored for ignored in eligibility.ignored_labels(self)]).all(0).sum()
        loss = (outputs[0] if isinstance(outputs, tuple) else outputs.loss) * counted / num_items_in_batch
        loss = torch.where(counted > 0, loss, torch.zeros_like(loss))  # the mean over no label is NaN
        if isinstance(outputs, tuple):
            return (loss, *outputs[1:])
        outputs.loss = loss
        return outputs


class FusedPooled(FusedMeanLoss, role="pooled"):
    """A head that reads only the pooled output of the encoder, so that the last layer runs on [CLS] alone."""

    def forward(self, **arguments: Any) -> Any:
        if eligibility.can_pool_alone(self):
            arguments[_READS] = "pooled"
        return super().forward(**arguments)


class FusedFirstToken(FusedMeanLoss, role="first_token"):
    """A head that reads the encoder's output at the first token, so that the last layer runs on that alone."""

    def forward(self, **arguments: Any) -> Any:
        reads = eligibility.reads_of_first_token(self)
        is_packed = arguments.get("cu_seq_lens_q") is not None
        if reads in (None, "tokens") and is_packed and isinstance(self.base_model, FusedEncoder):
            mean = f"this {type(self).__name__} reads the mean of a row's tokens"
            replaced = "its forward, or that of the module that reads the first token, was replaced"
            reason = replaced if reads is None else mean
            raise ValueError(f"packed input (cu_seq_lens_q) is not supported here, because {reason}: pass it padded")
        if reads != "tokens":
            arguments[_READS] = reads or "first and others"
        return super().forward(**arguments)


class FusedMaskedLM(FusedMeanLoss, role="masked_lm"):
    """The masked-LM head: in training its loss is computed on labelled rows, and there are no logits."""

    def forward(self, **arguments: Any) -> Any:
        if not _loss_needs_no_logits(self, arguments, ("labels",)):
            return super().forward(**arguments)
        loss, _ = _masked_lm_loss(self, arguments)
        return calls.as_requested(self, arguments, MaskedLMOutput(loss=loss))


class FusedPreTraining(FusedHead, role="pretraining"):
    """Both heads of pre-training: in training the masked-LM loss is computed on labelled rows, without logits."""

    accepts_loss_kwargs = False  # means of tokens and of pairs: one number of items cannot serve both

    def forward(self, **arguments: Any) -> Any:
        if not _loss_needs_no_logits(self, arguments, ("labels", "next_sentence_label")):
            return super().forward(**arguments)
        loss, logits = _masked_lm_loss(self, arguments, self.masked_lm_parts().next_sentence)
        loss = loss + F.cross_entropy(logits, arguments["next_sentence_label"].view(-1))
        kind = getattr(self.architecture.modeling, str(self.architecture.pretraining_output))
        return calls.as_requested(self, arguments, kind(loss=loss, seq_relationship_logits=logits))


def _loss_needs_no_logits(model: FusedModel, arguments: Arguments, labels: tuple[str, ...]) -> bool:
    """Return whether a call asks only for a training loss that can be computed on labelled rows."""
    encoder = model.base_model
    if not model.training or any(arguments.get(name) is None for name in labels):
        return False
    if arguments.get("output_hidden_states"):
        return False
    inputs = {name: x for name, x in arguments.items() if name not in labels}
    tokens = calls.main_input(inputs)
    return (
        isinstance(encoder, FusedEncoder)
        and tokens is not None
        and arguments["labels"].numel() == tokens.shape[:2].numel()  # transformers refuses others
        and calls.call_unsupported_reason(encoder, inputs, encoder.reads_first()) is None
        and calls.kernels_unsupported_reason(encoder, inputs) is None
        and eligibility.loss_unsupported_reason(model) is None
    )


def _masked_lm_loss(
    model: FusedModel, arguments: Arguments, next_sentence: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the loss on labelled rows, and the logits of `next_sentence` if it is given."""
    encoder = cast(FusedEncoder, model.base_model)
    packed, layout = encoder.unpadded(arguments)
    labels = arguments["labels"].reshape(-1)
    labelled = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    rows = labelled if layout.indices is None else layout.slots()[labelled]
    gathered = rows.clamp(min=0)
    check_below(type(model).__name__, "labels", labels[labelled], model.config.vocab_size, "the vocabulary")

    def run_encoder() -> tuple[Tensor, Tensor]:
        hidden = encoder.run_packed(packed, torch.cat([gathered, packed.first]) if next_sentence else gathered)
        at_labels = hidden[: len(rows)].masked_fill((rows < 0)[:, None], 0)  # hidden states are zero at padding
        first = hidden[len(rows) :]
        return at_labels, functions.pooled(model, first) if next_sentence else first

    def run_head(hidden: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, _, counted = functions.masked_lm_loss(model, hidden, labels[labelled])
        return total, counted, next_sentence(pooled) if next_sentence else pooled

    head = [part_at(model, path) for path in (*model.architecture.head_containers, model.architecture.head["decoder"])]
    total, counted, logits = call_inside(reversed(head), run_head, *call_inside([encoder], run_encoder))
    items = arguments.get("num_items_in_batch")
    return total / (counted.clamp(min=1) if items is None else items), logits
