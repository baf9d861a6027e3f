"""transformers' Auto classes, whose models come fused where their family is supported."""

from __future__ import annotations

import logging
from typing import ClassVar

import transformers
from torch import nn

from bertfast.models.patch import is_supported, patch

logger = logging.getLogger("bertfast")


class _Auto:
    """Make a model with transformers' class of the same name, and fuse it."""

    def __init__(self):
        raise OSError(f"use {type(self).__name__}.from_pretrained(name) or {type(self).__name__}.from_config(config)")

    original: ClassVar[type]

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> nn.Module:
        """Load a model as transformers' class does, with all its arguments, and fuse it."""
        loaded = cls.original.from_pretrained(*args, **kwargs)
        if isinstance(loaded, tuple):  # with output_loading_info
            return (_fused(loaded[0]), *loaded[1:])
        return _fused(loaded)

    @classmethod
    def from_config(cls, *args, **kwargs) -> nn.Module:
        """Make a model from a configuration, with random weights, and fuse it."""
        return _fused(cls.original.from_config(*args, **kwargs))


def _fused(model: nn.Module) -> nn.Module:
    if is_supported(model):
        patch(model)
    else:
        logger.warning("bertfast does not fuse %s: it runs transformers' own code, unchanged", type(model).__name__)
    return model


class AutoModel(_Auto):
    """`transformers.AutoModel`, fused."""

    original = transformers.AutoModel


class AutoModelForPreTraining(_Auto):
    """`transformers.AutoModelForPreTraining`, fused."""

    original = transformers.AutoModelForPreTraining


class AutoModelForMaskedLM(_Auto):
    """`transformers.AutoModelForMaskedLM`, fused."""

    original = transformers.AutoModelForMaskedLM


class AutoModelForCausalLM(_Auto):
    """`transformers.AutoModelForCausalLM`, fused."""

    original = transformers.AutoModelForCausalLM


class AutoModelForNextSentencePrediction(_Auto):
    """`transformers.AutoModelForNextSentencePrediction`, fused."""

    original = transformers.AutoModelForNextSentencePrediction


class AutoModelForSequenceClassification(_Auto):
    """`transformers.AutoModelForSequenceClassification`, fused."""

    original = transformers.AutoModelForSequenceClassification


class AutoModelForMultipleChoice(_Auto):
    """`transformers.AutoModelForMultipleChoice`, fused."""

    original = transformers.AutoModelForMultipleChoice


class AutoModelForTokenClassification(_Auto):
    """`transformers.AutoModelForTokenClassification`, fused."""

    original = transformers.AutoModelForTokenClassification


class AutoModelForQuestionAnswering(_Auto):
    """`transformers.AutoModelForQuestionAnswering`, fused."""

    original = transformers.AutoModelForQuestionAnswering
