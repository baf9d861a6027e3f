"""A pytest plugin that replaces transformers' classes by bertfast's: `pytest -p replace_classes`."""

import transformers

from bertfast.architectures import BERT, families
from bertfast.encoder import kernel_support
from bertfast.models import bert
from bertfast.models import families as fused_families
from bertfast.models.families import model_classes

# The models and batches of these tests are so small that they would be left to transformers.
kernel_support.MIN_SLOTS = kernel_support.MIN_COLUMNS = kernel_support.MIN_SLOTS_WITHOUT_PADDING = 0

for architecture in families():
    names = bert.__all__ if architecture is BERT else model_classes(architecture)
    fused = {name: getattr(bert if architecture is BERT else fused_families, name) for name in names}
    for name, kind in fused.items():
        if hasattr(architecture.modeling, name):
            setattr(architecture.modeling, name, kind)
            setattr(transformers, name, kind)
