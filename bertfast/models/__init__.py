"""The nine BERT classes, with Hugging Face's constructors, arguments, outputs and parameter names.

B rows, L columns, T packed tokens, S sequences, H hidden, V vocabulary. Padded input [B, L] is packed once, before the
embeddings, and unpacked once, at the end; packed input is [1, T] with `cu_seq_lens_q` int32 [S + 1], and then token
outputs are [1, T, ...] and sequence outputs [S, ...]. What is returned at padding is zero (the least number for the
logits of answers), and what labels say there is not read. Column 0 is no padding to a pooler, though masked out.
"""

from bertfast.config import BertConfig
from bertfast.models.base import (
    BertModel,
    BertPreTrainedModel,
)
from bertfast.models.language import (
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertLMHeadModel,
)
from bertfast.models.tasks import (
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

__all__ = [
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
]


def class_of(config: BertConfig) -> type[BertPreTrainedModel]:
    """The class that a folder's configuration names, `BertModel` where it names none; ValueError if it is not ours."""
    name = next(iter(config.extra.get("architectures") or ["BertModel"]))
    if name not in __all__:
        raise ValueError(f"its config names {name}, which is none of {', '.join(__all__)}")
    return globals()[name]
