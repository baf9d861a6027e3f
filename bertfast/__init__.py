"""bertfast: pre-train, fine-tune and run BERT-style encoders without padding, on fused kernels."""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bertfast import ops
    from bertfast.architectures.presets import preset_config
    from bertfast.data.collator import PaddingFreeCollator
    from bertfast.models.auto import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForMultipleChoice,
        AutoModelForNextSentencePrediction,
        AutoModelForPreTraining,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )
    from bertfast.models.bert import (
        BertConfig,
        BertForMaskedLM,
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForPreTraining,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertLMHeadModel,
        BertModel,
        BertPreTrainedModel,
        BertTokenizer,
    )
    from bertfast.models.freeze import freeze
    from bertfast.models.patch import patch, report, unpatch
    from bertfast.models.quantize import quantize

__version__ = "0.1.0"  # pyproject.toml reads the package's version from this line

__all__ = [
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForNextSentencePrediction",
    "AutoModelForPreTraining",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
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
    "PaddingFreeCollator",
    "freeze",
    "ops",
    "patch",
    "preset_config",
    "quantize",
    "report",
    "unpatch",
]

_MODULES = {
    "PaddingFreeCollator": "data.collator",
    "freeze": "models.freeze",
    "patch": "models.patch",
    "preset_config": "architectures.presets",
    "quantize": "models.quantize",
    "report": "models.patch",
    "unpatch": "models.patch",
}


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if re.fullmatch("__.+__", name))])


def __getattr__(name: str) -> object:
    # Public names are imported on first use, so that `bertfast --help` imports neither torch nor transformers.
    if name not in __all__:
        raise AttributeError(f"module 'bertfast' has no attribute {name!r}")
    if name == "ops":
        return importlib.import_module("bertfast.ops")
    module = _MODULES.get(name, "models.auto" if name.startswith("Auto") else "models.bert")
    if module == "models.bert":
        importlib.import_module("bertfast.models.open_quantised")  # has its classes open quantised models
    return getattr(importlib.import_module(f"bertfast.{module}"), name)
