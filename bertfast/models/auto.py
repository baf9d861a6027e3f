"""transformers' Auto classes, whose models come fused where their family is supported."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, TypeVar

import transformers
from torch import nn
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _get_model_class

from bertfast.data.text_files import read_json
from bertfast.models.patch import patch, unsupported_reason
from bertfast.models.quantised_files import is_quantised, read_dequantised, restore_quantised, unmark

logger = logging.getLogger("bertfast")

Model = TypeVar("Model", bound=nn.Module)


class _FusedAuto(_BaseAutoModelClass):
    """Mixin of the classes below: makes a model as the Auto class of transformers of the same name, and fuses it."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers' class does, with all its arguments, and fuse it.

        The folder of a model that `bertfast.quantize` quantised gives a quantised model.

        Returns:
            The model; with `output_loading_info=True` a pair of it and transformers' loading information.
        """
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        path = None if name is None else Path(name, "config.json")
        if path is not None and path.is_file() and is_quantised(read_json(path)):
            kwargs.pop("pretrained_model_name_or_path", None)
            return cls._open_quantised(path.parent, *args[1:], **kwargs)
        loaded = super().from_pretrained(*args, **kwargs)
        return (_fused(loaded[0]), *loaded[1:]) if isinstance(loaded, tuple) else _fused(loaded)

    @classmethod
    def _open_quantised(cls, folder: Path, *args: Any, **kwargs: Any) -> Any:
        """Open the folder of a quantised model; what it holds in floating point keeps its dtype."""
        config = kwargs.pop("config", None)
        if config is None:
            config, kwargs = transformers.AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
        unmark(config)
        weights, quantised = read_dequantised(folder, str(folder))
        kind: Any = _get_model_class(config, cls._model_mapping)
        kwargs = {"dtype": "auto"} | kwargs | {"config": config, "state_dict": weights}
        loaded = kind.from_pretrained(None, *args, **kwargs)
        model = _fused(loaded[0] if isinstance(loaded, tuple) else loaded)
        model.name_or_path = model.config.name_or_path = str(folder)
        restore_quantised(model, quantised)
        return (model, *loaded[1:]) if isinstance(loaded, tuple) else model

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
