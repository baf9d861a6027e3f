"""A pytest plugin that replaces transformers' classes by bertfast's: `pytest -p replace_classes`."""

import transformers

from bertfast.architectures import BERT, families
from bertfast.models import bert
from bertfast.models import families as fused_families
from bertfast.models.families import model_classes

for architecture in families():
    names = bert.__all__ if architecture is BERT else model_classes(architecture)
    fused = {name: getattr(bert if architecture is BERT else fused_families, name) for name in names}
    for name, kind in fused.items():
        if hasattr(architecture.modeling, name):
            setattr(architecture.modeling, name, kind)
            setattr(transformers, name, kind)
