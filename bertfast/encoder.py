"""BERT (Devlin et al., 2019) as functions on packed tokens.

Each takes a module that has BERT's attribute names and reads its parameters, so that our own classes and live
`transformers` models run the same code. T tokens, S sequences, R gathered rows, H hidden, A heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertfast import ops, products, reference
from bertfast.data.batches import Batch
from bertfast.dropout import TokenIdentity
from bertfast.inputs import Packed
from bertfast.memory import keep_freed_memory
from bertfast.reference import IGNORED
from bertfast.runtime.torch_compat import autocast_dtype

_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh")
_PLAIN_ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "swish": F.silu, "tanh": torch.tanh}


def embed(module: nn.Module, packed: Packed, config) -> Tensor:
    """The embeddings of packed tokens -> [T, H]."""
    norm = module.LayerNorm
    words = module.word_embeddings
    return ops.embed(
        packed.token_ids,
        packed.token_type_ids,
        packed.position_ids,
        words.weight if packed.embeddings is None else packed.embeddings,
        module.position_embeddings.weight,
        module.token_type_embeddings.weight,
        norm.weight,
        norm.bias,
        norm.eps,
        packed.identity and packed.identity.dropout(config.hidden_dropout_prob, "embeddings"),
        padding_index=words.padding_idx,
    )


def encode(
    model: nn.Module,
    packed: Packed,
    rows: Tensor | None = None,
    hidden_states: list[Tensor] | None = None,
    *,
    residual_dtype: torch.dtype | None = None,
) -> Tensor:
    """Run the embeddings and all layers of a `BertModel`.

    Args:
        model: A module with BERT's attribute names.
        packed: The tokens.
        rows: int64 [R]; the last layer computes its output at these alone.
        hidden_states: Receives what enters the first layer and what leaves each one, [T, H] of the residual stream.
        residual_dtype: The dtype of the residual stream; None: that of the embeddings.

    Returns:
        [T, H], or [R, H] with `rows`, in the dtype of the residual stream.
    """
    hidden = embed(model.embeddings, packed, model.config)
    if residual_dtype is not None:
        hidden = hidden.to(residual_dtype)
    if hidden.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        keep_freed_memory()
    layers = model.encoder.layer
    # Layers hand each other the copy of the stream that GEMMs read, where both neighbours take it.
    copies = gemm_dtype(hidden) is not None
    takes = [copies and _takes_copy(module) for module in layers]
    copy = None
    for index, module in enumerate(layers):
        if hidden_states is not None:
            hidden_states.append(hidden)
        last = index == len(layers) - 1
        arguments = (hidden, packed, index, rows if last else None)
        if not last and takes[index] and takes[index + 1]:
            hidden, copy = module(*arguments, copy, True)
        else:
            hidden = module(*arguments) if copy is None else module(*arguments, copy)
            copy = None
    if hidden_states is not None:
        hidden_states.append(hidden)
    return hidden if rows is None or len(layers) else ops.gather(rows, hidden)[0]


def layer(
    module: nn.Module,
    config,
    hidden: Tensor,
    packed: Packed,
    index: int,
    rows: Tensor | None = None,
    copy: Tensor | None = None,
    return_copy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run one layer: attention over all tokens, then all that follows.

    Under autocast the residual stream is fp32 and GEMMs read half precision. `add_layer_norm` writes both and its
    backward pass adds the gradients of both, so that no pass of its own casts or adds activations.

    Args:
        hidden: [T, H], the residual stream.
        index: The layer's number, of which dropout depends.
        rows: int64 [R]; all that follows attention is computed at these tokens alone.
        copy: [T, H], `hidden` in autocast's dtype, if the layer before has written it.
        return_copy: Whether to return such a copy of the output too; autocast must be on.

    Returns:
        [T, H], or [R, H] with `rows`, in the dtype of `hidden`; with `return_copy` a pair of that and its copy.
    """
    attention = module.attention
    identity = packed.identity
    dtype = gemm_dtype(hidden)
    if copy is None and dtype is not None:
        copy = hidden.to(dtype)
    inner = attention.self
    context = attend(inner, config, _gemm_input(hidden, copy, inner.query, inner.key, inner.value), packed, index)
    if rows is not None:
        context, hidden = ops.gather(rows, context, hidden)
        identity = identity and identity.at(rows)

    def dropout(site: str):
        return identity and identity.dropout(config.hidden_dropout_prob, site, index)

    hidden, copy = _add_layer_norm(attention.output, context, hidden, dropout("attention_output"), dtype)
    dense = module.intermediate.dense
    intermediate = activate(dense, _gemm_input(hidden, copy, dense), config.hidden_act)
    output = _add_layer_norm(module.output, intermediate, hidden, dropout("output"), dtype if return_copy else None)
    return output if return_copy else output[0]


def gemm_dtype(hidden: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast multiplies activations like `hidden`; None where it leaves theirs."""
    return None if hidden.dtype == torch.float64 else autocast_dtype(hidden.device)


def attend(module: nn.Module, config, hidden: Tensor, packed: Packed, index: int) -> Tensor:
    """A layer's self-attention, projections included but the last: [T, H] -> [T, H]."""
    qkv = project(module, config, hidden)
    arguments = attention_arguments(config, packed, index)
    context = ops.attention(qkv, packed.sequences, **arguments)
    if packed.query_only:
        slots = len(context) - packed.query_only
        own = reference.query_only_attention(qkv[slots:, 0], qkv, packed.sequences, **arguments)
        context = torch.cat([context[:slots], own])
    return context.flatten(1)


def attention_arguments(config, packed: Packed, index: int) -> dict:
    """What a layer's attention takes besides qkv and sequences."""
    dropout = packed.identity and packed.identity.dropout(config.attention_probs_dropout_prob, "attention", index)
    head_dimension = config.hidden_size // config.num_attention_heads
    return {"scale": head_dimension**-0.5, "causal": config.is_decoder, "window": None, "dropout": dropout}


def project(module: nn.Module, config, hidden: Tensor) -> Tensor:
    """Queries, keys and values of all heads, three parameters in one product: [T, H] -> [T, 3, A, D]."""
    three = (module.query, module.key, module.value)
    compiling = torch.compiler.is_compiling()
    # In half precision three products round apart from the one that a compiler is given.
    few = not compiling and hidden.dtype == torch.float32 and len(hidden) < config.hidden_size
    kept = torch.is_grad_enabled() or autocast_dtype(hidden.device) is not None or compiling
    kept = kept or products.goes_to_onednn(hidden, module.query.weight)  # which writes to no tensor that it is given
    # Whatever has to be copied for one tensor, the smaller is; and without a gradient nothing has to be.
    if not all(is_plain(linear) for linear in three):
        qkv = torch.cat([linear(hidden) for linear in three], dim=1)
    elif kept and few:
        qkv = torch.cat([products.linear(hidden, linear.weight, linear.bias) for linear in three], dim=1)
    elif kept:
        weights, biases = [linear.weight for linear in three], [linear.bias for linear in three]
        qkv = products.linear(hidden, torch.cat(weights), torch.cat(biases))
    else:
        qkv = hidden.new_empty(len(hidden), 3 * config.hidden_size)
        for linear, part in zip(three, qkv.chunk(3, dim=1), strict=True):
            torch.addmm(linear.bias, hidden, linear.weight.t(), out=part)
    return qkv.unflatten(1, (3, config.num_attention_heads, -1))


def activate(dense: nn.Module, x: Tensor, activation: str) -> Tensor:
    """activation(dense(x)), in one operation where it is a GELU of a plain linear layer."""
    approximate = "tanh" if activation in _TANH_GELUS else "none"
    if activation in _PLAIN_ACTIVATIONS:
        return _PLAIN_ACTIVATIONS[activation](dense(x))
    if is_plain(dense):
        return ops.linear_gelu(x, dense.weight, dense.bias, approximate)
    return F.gelu(dense(x), approximate=approximate)


def pool(module: nn.Module, first: Tensor) -> Tensor:
    """The pooler on the rows that speak for their sequences: [S, H] -> [S, H]."""
    return torch.tanh(module.dense(first))


def transform(module: nn.Module, hidden: Tensor, activation: str) -> Tensor:
    """What the masked-LM head does before the vocabulary: [R, H] -> [R, H]."""
    dense, norm = module.dense, module.LayerNorm
    if activation == "gelu" and is_plain(dense):
        product = products.linear(hidden, dense.weight)
        return ops.gelu_layer_norm(product, dense.bias, norm.weight, norm.bias, norm.eps)
    normalised = reference.layer_norm(activate(dense, hidden, activation), norm.weight, norm.bias, norm.eps)
    return normalised.to(norm.weight.dtype)


@dataclass(frozen=True, eq=False)
class PretrainingLoss:
    """Sums over a batch, and how many they run over; 0-dimensional tensors."""

    masked_lm: Tensor
    masked_correct: Tensor
    masked: Tensor
    next_sentence: Tensor
    next_sentence_correct: Tensor
    pairs: Tensor


def pretraining_loss(
    model: nn.Module, batch: Batch, seed: Tensor | None, *, residual_dtype: torch.dtype | None = None
) -> PretrainingLoss:
    """Compute the losses of a `BertForPreTraining`, or a `BertForMaskedLM`, on a packed batch.

    No logits are held, and the last layer runs only on the masked tokens and, where there are pairs, [CLS].

    Args:
        seed: int64 [], dropout's; None: no dropout.
        residual_dtype: See `encode`.
    """
    sequences = batch.sequences
    identity = None if seed is None else TokenIdentity(seed, sequences.token_sequence_ids, sequences.position)
    packed = Packed(
        batch.token_ids, None, batch.token_type_ids, batch.position_ids, sequences, sequences.first, identity=identity
    )
    rows, labels = batch.masked_rows, batch.next_sentence_labels
    read = rows if labels is None else torch.cat([rows, sequences.first])
    hidden = encode(model.bert, packed, read, residual_dtype=residual_dtype)
    head = model.cls.predictions
    masked_lm, masked_correct, masked = ops.linear_cross_entropy(
        head.transform(hidden[: len(rows)]),
        None,
        head.decoder.weight,
        head.decoder.bias,
        batch.labels,
    )
    if labels is None:
        zero, none = torch.zeros_like(masked_lm), torch.zeros_like(masked)
        return PretrainingLoss(masked_lm, masked_correct, masked, zero, none, none)
    logits = model.cls.seq_relationship(model.bert.pooler(hidden[len(rows) :]))
    next_sentence = cross_entropy_sum(logits, labels)
    correct, pairs = (logits.argmax(1) == labels).sum(), (labels >= 0).sum()
    return PretrainingLoss(masked_lm, masked_correct, masked, next_sentence, correct, pairs)


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of cross entropies, in fp32 at least: logits [R, classes], labels [R], inert where -100 -> []."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")


def is_plain(module: nn.Module) -> bool:
    """Whether reading `weight` and `bias` is what calling the module does: a linear layer with nothing around it.

    A LoRA-wrapped, quantised, parametrised or hooked one is another type, or has hooks, and must be called.
    """
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and not is_watched(module)


def is_watched(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says: it has hooks, or a `forward` of its own."""
    return any(hooks(module)) or "forward" in vars(module)


def hooks(module: nn.Module) -> tuple[dict, ...]:
    """A module's hooks by kind."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def _takes_copy(module: nn.Module) -> bool:
    """Return whether a layer is called with, and for, a copy of the residual stream.

    One that is watched is not, so that hooks see the stream alone, nor one whose activations are recomputed, which
    would keep the copy besides the stream.
    """
    return not is_watched(module) and not getattr(module, "gradient_checkpointing", False)


def _gemm_input(hidden: Tensor, copy: Tensor | None, *linears: nn.Module) -> Tensor:
    """Return what these linear layers read: the copy, or the stream itself where one of them is not plain."""
    return copy if copy is not None and all(map(is_plain, linears)) else hidden


def _add_layer_norm(
    module: nn.Module, x: Tensor, residual: Tensor, dropout, compute_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Return the residual stream behind a projection, and its copy in `compute_dtype` if that is given."""
    dense, norm = module.dense, module.LayerNorm
    product, bias = (products.linear(x, dense.weight), dense.bias) if is_plain(dense) else (dense(x), None)
    output = ops.add_layer_norm(
        product, residual, bias, norm.weight, norm.bias, norm.eps, dropout, compute_dtype=compute_dtype
    )
    return output if isinstance(output, tuple) else (output, None)
