"""bertfast: pre-train, fine-tune and run a BERT on packed tokens and fused kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bertfast.config import BertConfig
    from bertfast.models import (
        BertForMaskedLM,
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForPreTraining,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertLMHeadModel,
        BertModel,
    )
    from bertfast.patching import patch, unpatch

__version__ = "0.1.0"

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
    "patch",
    "unpatch",
]

_HOMES = {"BertConfig": "config", "patch": "patching", "unpatch": "patching"}


def __getattr__(name: str):
    # Worker processes that only read text, and `--help`, need not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module 'bertfast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bertfast.{_HOMES.get(name, 'models')}"), name)
