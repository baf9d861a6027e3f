"""transformers' Auto classes, whose models come fused where their family is supported."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import transformers
from torch import nn
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _get_model_class

from bertfast.models.open_quantised import open_quantised, quantised_folder
from bertfast.models.patch import patch, unsupported_reason

logger = logging.getLogger("bertfast")

Model = TypeVar("Model", bound=nn.Module)


class _FusedAuto(_BaseAutoModelClass):
    """Mixin of the classes below: makes a model as the Auto class of transformers of the same name, and fuses it."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers' class does, with all its arguments, and fuse it.

        The folder or hub id of a model that `bertfast.quantize` quantised gives a quantised model.

        Returns:
            The model; with `output_loading_info=True` a pair of it and transformers' loading information.
        """
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        folder = quantised_folder(name, kwargs)
        if folder is not None:
            kwargs.pop("pretrained_model_name_or_path", None)
            return open_quantised(folder, transformers.AutoConfig, cls._class_of, _fused, *args[1:], **kwargs)
        loaded = super().from_pretrained(*args, **kwargs)
        return (_fused(loaded[0]), *loaded[1:]) if isinstance(loaded, tuple) else _fused(loaded)

    @classmethod
    def _class_of(cls, config: Any) -> Any:
        return _get_model_class(config, cls._model_mapping)

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a model from a configuration as transformers' class does, with random weights, and fuse it."""
        model: nn.Module = super().from_config(*args, **kwargs)  # type: ignore[no-untyped-call]  # transformers declares no types
        return _fused(model)


def _fused(model: Model) -> Model:
    reason = unsupported_reason(model)
    if reason is None:
        patch(model)
    else:
        name = type(model).__name__
        logger.warning("bertfast does not fuse %s, which runs transformers' own code, unchanged: %s", name, reason)
    return model


def _fused_auto(name: str) -> type[_FusedAuto]:
    attributes = {"__module__": __name__, "__doc__": f"`transformers.{name}`, whose models come fused."}
    return type(name, (_FusedAuto, getattr(transformers, name)), attributes)


AutoModel = _fused_auto("AutoModel")
AutoModelForPreTraining = _fused_auto("AutoModelForPreTraining")
AutoModelForMaskedLM = _fused_auto("AutoModelForMaskedLM")
AutoModelForCausalLM = _fused_auto("AutoModelForCausalLM")
AutoModelForNextSentencePrediction = _fused_auto("AutoModelForNextSentencePrediction")
AutoModelForSequenceClassification = _fused_auto("AutoModelForSequenceClassification")
AutoModelForMultipleChoice = _fused_auto("AutoModelForMultipleChoice")
AutoModelForTokenClassification = _fused_auto("AutoModelForTokenClassification")
AutoModelForQuestionAnswering = _fused_auto("AutoModelForQuestionAnswering")
