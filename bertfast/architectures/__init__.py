"""One adapter per model family: where the packed encoder finds the parts of its models, and what they run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import transformers

from bertfast.architectures import supported_versions  # noqa: F401  first: it raises if transformers is not supported
from bertfast.architectures.architecture import Architecture, activation_name, part_at
from bertfast.architectures.bert import BERT
from bertfast.architectures.supported_versions import IS_TRANSFORMERS_4

__all__ = [
    "BERT",
    "FAMILIES",
    "IS_TRANSFORMERS_4",
    "ROTARY_FAMILIES",
    "Architecture",
    "activation_name",
    "families",
    "family",
    "family_by_type",
    "family_of",
    "part_at",
    "version_unsupported_reason",
]


_OLDER = ("bert", "roberta", "xlm_roberta", "camembert", "electra", "distilbert")
ROTARY_FAMILIES = ("modernbert", "nomic_bert", "eurobert")
"""Families of transformers 5 alone; not each of its versions has all, and that of transformers 4 is another model."""
FAMILIES = _OLDER + tuple(
    name for name in ROTARY_FAMILIES if not IS_TRANSFORMERS_4 and find_spec(f"transformers.models.{name}") is not None
)
"""The families that are fused: names of the adapters' modules, and of the folders of transformers."""


@cache
def family(name: str) -> Architecture:
    """Return the adapter of a family, an element of `FAMILIES`; imports transformers' module of its classes."""
    architecture: Architecture = getattr(import_module(f"bertfast.architectures.{name}"), name.upper())
    return architecture


def family_by_type(model_type: str) -> Architecture | None:
    """Return the adapter of a configuration's `model_type`; None if there is none."""
    name = model_type.replace("-", "_")
    return family(name) if name in FAMILIES else None


def version_unsupported_reason(model_type: str) -> str | None:
    """Return why a family requires another version of transformers; None if it does not, or has no adapter."""
    name = model_type.replace("-", "_")
    if name not in ROTARY_FAMILIES or name in FAMILIES:
        return None
    needed = "transformers 5.2 or later" if name == "modernbert" else "a later version of transformers"
    return (
        f"bertfast requires {needed} for it, and {transformers.__version__} is installed: "
        'pip install --upgrade "transformers>=5.2,<6"'
    )


def families() -> Iterator[Architecture]:
    """Return the adapters of all families."""
    return map(family, FAMILIES)


def family_of(kind: type) -> Architecture | None:
    """Return the adapter of the family that a class of transformers belongs to; None if there is none."""
    package, _, name = kind.__module__.rpartition(".modeling_")
    is_family = name in FAMILIES and package == f"transformers.models.{name}"
    return family(name) if is_family else None
