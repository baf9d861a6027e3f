"""Calls of a fused encoder: what they ask for that it does not have, and their packed input and outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from bertfast.architectures import IS_TRANSFORMERS_4
from bertfast.encoder import kernel_support
from bertfast.encoder.packed_linear import has_onednn_weights
from bertfast.encoder.unpadding import Layout
from bertfast.models.registry import IS_FROZEN, FusedModel
from bertfast.ops import matmul
from bertfast.ops.sequences import bucket
from bertfast.runtime import torch_compat

Arguments = dict[str, Any]  # of a model's `forward`, by name

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_KNOWN = {*INPUTS, *PACKING, "return_dict", "use_cache", "output_hidden_states", "num_items_in_batch"}


def main_input(arguments: Arguments) -> Tensor | None:
    """Return the token ids of a call, or the embeddings that it has instead."""
    embeddings: Tensor | None = arguments.get("inputs_embeds")
    return arguments.get("input_ids") if embeddings is None else embeddings


def call_unsupported_reason(encoder: FusedModel, arguments: Arguments, pooled: bool) -> str | None:
    """Return why a call asks for something that the packed encoder does not compute.

    Args:
        encoder: The encoder.
        arguments: Of its `forward`.
        pooled: Whether the first token of each row is read even where it is masked out.
    """
    known = _KNOWN if "token_type_embeddings" in encoder.architecture.embedding else _KNOWN - {"token_type_ids"}
    unknown = [name for name, x in arguments.items() if x is not None and x is not False and name not in known]
    if unknown:
        return f"the packed encoder does not support {', '.join(unknown)}"
    ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    tokens = main_input(arguments)
    has_both = ids is not None and embeddings is not None
    if tokens is None or has_both or tokens.dim() != (2 if embeddings is None else 3) or 0 in tokens.shape:
        return "the input does not have the shape [batch, length]"
    mask: Any = arguments.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        return f"the attention mask is a {type(mask).__name__}, not a tensor"
    if mask is not None and mask.dim() != 2:
        return "the attention mask is one between pairs of tokens"
    if mask is not None and mask.shape != tokens.shape[:2]:
        return "the attention mask has another shape than the input"
    reason = config_unsupported_reason(encoder, arguments.get("use_cache"))
    reason = reason or kernel_support.tracing_unsupported_reason(tokens)
    if reason is None and mask is not None:
        reason = _window_unsupported_reason(encoder, mask, pooled)
    if reason is None and pooled and _pools_padding(encoder, arguments):
        return "a row of the batch contains only padding"
    return reason


def _window_unsupported_reason(encoder: FusedModel, mask: Tensor, pooled: bool) -> str | None:
    """Return why windows, which count columns in transformers, do not count the same tokens without padding."""
    kind, window = encoder.architecture.layer_type, getattr(encoder.config, "sliding_window", None)
    columns = mask.shape[1]
    if kind is None or window is None or columns <= window + 1:
        return None
    if torch.compiler.is_compiling():
        return "a compiler cannot tell whether padding lies between tokens"
    attended = mask != 0
    first = attended.int().argmax(1)
    last = columns - 1 - attended.flip(1).int().argmax(1)
    lengths = attended.sum(1)
    has_holes, starts_masked = torch.stack(
        [((last - first + 1 != lengths) & (lengths > 0)).any(), (~attended[:, 0]).any()]
    ).tolist()
    if has_holes:
        return "padding between tokens counts for windows"
    return "a masked first token is read in layers with windows" if pooled and starts_masked else None


def config_unsupported_reason(encoder: FusedModel, use_cache: bool | None = None) -> str | None:
    """Return why the configuration asks for something that the packed encoder does not compute."""
    config = encoder.config
    if getattr(config, "is_decoder", False) and (config.use_cache if use_cache is None else use_cache):
        return "the model is a decoder: pass use_cache=False"
    return "the configuration asks for attention weights" if config.output_attentions else None


def _pools_padding(encoder: FusedModel, arguments: Arguments) -> bool:
    """Return whether a call pools a row without tokens in an attention that adds a finite number to masked scores.

    Such a row attends to all of its padding; with a boolean mask, and packed, it attends to nothing.
    """
    mask = arguments.get("attention_mask")
    adds_to_scores = IS_TRANSFORMERS_4 or encoder.config._attn_implementation == "eager"
    if mask is None or not adds_to_scores or torch.compiler.is_compiling():
        return False
    return kernels_unsupported_reason(encoder, arguments) is None and not bool(mask.any(1).all())


def kernels_unsupported_reason(encoder: FusedModel, arguments: Arguments) -> str | None:
    """Return why a call has no fast kernels on the model's device and in its dtype."""
    tokens, shape = main_input(arguments), None
    # A compiler would compile again for sizes on the other side of a bound, so that shapes do not matter to it.
    if tokens is not None and arguments.get("cu_seq_lens_q") is None and not torch.compiler.is_compiling():
        shape = (tokens.shape[0], tokens.shape[1])
    return _kernels_unsupported_reason(encoder, shape)


@torch_compat.constant_result
def _kernels_unsupported_reason(encoder: FusedModel, shape: tuple[int, int] | None) -> str | None:
    config = encoder.config
    head_dimension = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return kernel_support.module_unsupported_reason(torch_compat.any_parameter(encoder), head_dimension, shape)


def is_short(encoder: FusedModel, arguments: Arguments) -> bool:
    """Return whether a call has so few tokens, and no padding, that transformers' own code is at least as fast.

    Where oneDNN keeps code for each number of tokens, it must also be one to which others are padded: see
    `matmul.caches_shapes`.
    """
    if IS_FROZEN in vars(encoder):  # whose packed weights are as fast with few tokens
        return False
    tokens, mask = main_input(arguments), arguments.get("attention_mask")
    if tokens is None or torch.compiler.is_compiling() or torch.is_grad_enabled() or tokens.device.type != "cpu":
        return False
    slots = tokens.shape[0] * tokens.shape[1]
    if slots >= kernel_support.MIN_SLOTS_WITHOUT_PADDING:
        return False
    if caches_shapes(encoder) and bucket(slots) != slots:
        return False
    return mask is None or bool(mask.all())


def caches_shapes(encoder: FusedModel) -> bool:
    """Return whether code is kept for each number of tokens that an encoder gets: see `matmul.caches_shapes`.

    None is kept for packed weights, but for those in bf16 that oneDNN multiplies where a CPU has AMX.
    """
    if IS_FROZEN in vars(encoder):
        return torch_compat.cpu_has_amx() and has_onednn_weights(encoder)
    weight = torch_compat.any_parameter(encoder)
    return weight is not None and matmul.caches_shapes(weight.device, kernel_support.gemm_dtype(weight))


def pack_outputs(outputs: Any, layout: Layout) -> Any:
    """Turn the encoder's outputs for a padded batch, each [rows, columns, H], into [1, T, H], in place."""
    outputs.last_hidden_state = layout.unpad(outputs.last_hidden_state, "outputs")[None]
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(layout.unpad(x, "outputs")[None] for x in outputs.hidden_states)
    return outputs


def as_requested(model: FusedModel, arguments: Arguments, outputs: ModelOutput) -> ModelOutput | tuple[Any, ...]:
    """Return outputs as a tuple if the call or the configuration asks for one."""
    return_dict = arguments.get("return_dict")
    return_dict = model.config.return_dict if return_dict is None else return_dict
    return outputs if return_dict else outputs.to_tuple()
