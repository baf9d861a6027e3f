"""transformers' BERT classes, fused: the same constructors, files, arguments and outputs, on the packed encoder.

Each is a subclass of the class of the same name in transformers, from which it inherits all that is not its forward
pass. The classes of inner modules are what those of a live model become when it is patched.
"""

from __future__ import annotations

from transformers import BertConfig, BertPreTrainedModel, BertTokenizer, GenerationMixin
from transformers.models.bert import modeling_bert as original

from bertfast.architectures import BERT
from bertfast.models import fused
from bertfast.models.registry import register

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertLMHeadModel",
    "BertModel",
    "BertPreTrainedModel",
    "BertTokenizer",
]


@register(BERT)
class BertEmbeddings(fused.FusedEmbeddings, original.BertEmbeddings):
    """Word, position and token-type embeddings."""


@register(BERT)
class BertLayer(fused.FusedLayer, original.BertLayer):
    """One transformer layer."""


@register(BERT)
class BertPredictionHeadTransform(fused.FusedTransform, original.BertPredictionHeadTransform):
    """What stands between the encoder and the vocabulary."""


@register(BERT)
class BertModel(fused.FusedEncoder, original.BertModel):
    """`transformers.BertModel`, fused."""


@register(BERT)
class BertForPreTraining(fused.FusedPreTraining, original.BertForPreTraining):
    """`transformers.BertForPreTraining`, fused; in training with labels, `prediction_logits` is None."""


@register(BERT)
class BertForMaskedLM(fused.FusedMaskedLM, original.BertForMaskedLM):
    """`transformers.BertForMaskedLM`, fused; in training with labels, `logits` is None."""


@register(BERT)
class BertLMHeadModel(fused.FusedHead, original.BertLMHeadModel, GenerationMixin):
    """`transformers.BertLMHeadModel`, fused."""


@register(BERT)
class BertForNextSentencePrediction(fused.FusedPooled, original.BertForNextSentencePrediction):
    """`transformers.BertForNextSentencePrediction`, fused."""


@register(BERT)
class BertForSequenceClassification(fused.FusedPooled, original.BertForSequenceClassification):
    """`transformers.BertForSequenceClassification`, fused."""


@register(BERT)
class BertForMultipleChoice(fused.FusedPooled, original.BertForMultipleChoice):
    """`transformers.BertForMultipleChoice`, fused."""


@register(BERT)
class BertForTokenClassification(fused.FusedMean, original.BertForTokenClassification):
    """`transformers.BertForTokenClassification`, fused."""


@register(BERT)
class BertForQuestionAnswering(fused.FusedHead, original.BertForQuestionAnswering):
    """`transformers.BertForQuestionAnswering`, fused."""
