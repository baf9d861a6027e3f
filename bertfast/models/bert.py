"""transformers' BERT classes, fused: the same constructors, files, arguments and outputs, on the packed encoder.

Each is a subclass of the class of the same name in transformers, from which it inherits everything but its forward
pass. `patch` changes the modules of a live model to these classes.
"""

from __future__ import annotations

from transformers import BertConfig, BertPreTrainedModel, BertTokenizer, GenerationMixin
from transformers.models.bert import modeling_bert as original

from bertfast.architectures import BERT
from bertfast.models import fused

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


class BertEmbeddings(fused.FusedEmbeddings, original.BertEmbeddings, architecture=BERT):
    """Word, position and token-type embeddings."""


class BertLayer(fused.FusedLayer, original.BertLayer, architecture=BERT):
    """One transformer layer."""


class BertPredictionHeadTransform(fused.FusedTransform, original.BertPredictionHeadTransform, architecture=BERT):
    """The masked-LM head's transform, between the encoder and the vocabulary."""


class BertModel(fused.FusedEncoder, original.BertModel, architecture=BERT):
    """`transformers.BertModel`, fused."""


class BertForPreTraining(fused.FusedPreTraining, original.BertForPreTraining, architecture=BERT):
    """`transformers.BertForPreTraining`, fused; in training with labels, `prediction_logits` is None."""


class BertForMaskedLM(fused.FusedMaskedLM, original.BertForMaskedLM, architecture=BERT):
    """`transformers.BertForMaskedLM`, fused; in training with labels, `logits` is None."""


class BertLMHeadModel(fused.FusedHead, original.BertLMHeadModel, GenerationMixin, architecture=BERT):
    """`transformers.BertLMHeadModel`, fused."""


class BertForNextSentencePrediction(fused.FusedPooled, original.BertForNextSentencePrediction, architecture=BERT):
    """`transformers.BertForNextSentencePrediction`, fused."""


class BertForSequenceClassification(fused.FusedPooled, original.BertForSequenceClassification, architecture=BERT):
    """`transformers.BertForSequenceClassification`, fused."""


class BertForMultipleChoice(fused.FusedPooled, original.BertForMultipleChoice, architecture=BERT):
    """`transformers.BertForMultipleChoice`, fused."""


class BertForTokenClassification(fused.FusedMeanLoss, original.BertForTokenClassification, architecture=BERT):
    """`transformers.BertForTokenClassification`, fused."""


class BertForQuestionAnswering(fused.FusedHead, original.BertForQuestionAnswering, architecture=BERT):
    """`transformers.BertForQuestionAnswering`, fused."""
