"""The fused classes of families other than BERT, by the names of transformers' classes; pickles find them here.

They are derived from the families' declarations (`bertfast.architectures`) when they are first asked for.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

from transformers import PretrainedConfig, PreTrainedModel

from bertfast.architectures import BERT, Architecture, families, family_by_type
from bertfast.models import bert  # importing it registers the mixins, too
from bertfast.models.registry import FusedModel, fused_class

ModelT = TypeVar("ModelT", bound=PreTrainedModel)

# The ends of the names of classes that are alike in all families.
_ALIKE = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForTokenClassification",
    "ForQuestionAnswering",
)


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Return the adapter of a configuration's family, of which those with extensions are BERT's."""
    return family_by_type(config.model_type) or BERT


def config_entry(config: PretrainedConfig, name: str) -> Any:
    """Return the entry of a configuration that BERT calls `name`."""
    return getattr(config, architecture_of(config).config_name(name))


def pretraining_class(config: PretrainedConfig) -> type[FusedModel]:
    """Return the fused class that is pre-trained: with both heads if the family has them, else the masked-LM model."""
    has_both = architecture_of(config).has_next_sentence
    kind: type[FusedModel] = bert.BertForPreTraining if has_both else bert.BertForMaskedLM
    return class_like(kind, config)


def class_like(kind: type[ModelT], config: PretrainedConfig) -> type[ModelT]:
    """Return the class of a configuration's family that is like a fused class of BERT; others are returned as they are.

    Raises:
        ValueError: There is none.
    """
    architecture, task = architecture_of(config), kind.__name__.removeprefix(BERT.prefix)
    if architecture is BERT or getattr(kind, "architecture", BERT) is not BERT:
        return kind
    if task not in _ALIKE:
        raise ValueError(f"there is no {kind.__name__} of a {architecture.model_type} model: name a BERT model")
    if not has_class_like(kind, config):
        raise ValueError(
            f"transformers has no {architecture.prefix}{task}, so this task requires a model of another type than "
            f"{architecture.model_type}"
        )
    return cast(type[ModelT], __getattr__(architecture.prefix + task))  # it has the same methods


def has_class_like(kind: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    """Return whether a configuration's family has a class for the task of a fused class of BERT."""
    architecture = architecture_of(config)
    return hasattr(architecture.modeling, architecture.prefix + kind.__name__.removeprefix(BERT.prefix))


def model_classes(architecture: Architecture) -> list[str]:
    """Return the names of a family's models."""
    names = [name for names in architecture.classes.values() for name in names]
    return [name for name in names if issubclass(getattr(architecture.modeling, name), PreTrainedModel)]


def __getattr__(name: str) -> Any:
    for architecture in () if name.startswith("_") else families():
        if any(name in names for names in architecture.classes.values()):
            return fused_class(getattr(architecture.modeling, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
