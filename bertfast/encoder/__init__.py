"""The packed encoder: plain functions on packed tokens, which read parameters from modules and know no model family.

`layer` is one transformer layer, `encode` the whole encoder, `heads` the outputs and losses of tasks.
"""

from bertfast.encoder.encode import embed, encode, transform
from bertfast.encoder.feed_forward import ACTIVATIONS
from bertfast.encoder.heads import (
    PretrainingLoss,
    cross_entropy_sum,
    masked_lm_logits,
    masked_lm_loss,
    multiple_choice_loss,
    pack,
    pooled,
    pretraining_loss,
    question_answering_loss,
    sequence_classification_loss,
    sequence_logits,
    span_logits,
    token_classification_loss,
    token_logits,
)
from bertfast.encoder.layer import copy_dtype, layer
from bertfast.encoder.linear import is_linear, is_plain, is_watched
from bertfast.encoder.parts import (
    EmbeddingParts,
    LayerParts,
    MaskedLMParts,
    PackedHead,
    PackedMaskedLM,
    PackedModel,
    has_token_types,
)

__all__ = [
    "ACTIVATIONS",
    "EmbeddingParts",
    "LayerParts",
    "MaskedLMParts",
    "PackedHead",
    "PackedMaskedLM",
    "PackedModel",
    "PretrainingLoss",
    "copy_dtype",
    "cross_entropy_sum",
    "embed",
    "encode",
    "has_token_types",
    "is_linear",
    "is_plain",
    "is_watched",
    "layer",
    "masked_lm_logits",
    "masked_lm_loss",
    "multiple_choice_loss",
    "pack",
    "pooled",
    "pretraining_loss",
    "question_answering_loss",
    "sequence_classification_loss",
    "sequence_logits",
    "span_logits",
    "token_classification_loss",
    "token_logits",
    "transform",
]
