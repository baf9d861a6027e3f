"""A pytest plugin that patches each model of a fused family on construction: `pytest -p patch_everything`."""

import functools

import bertfast
from bertfast.architectures import families
from bertfast.encoder import kernel_support
from bertfast.models.families import model_classes

# The models and batches of these tests are so small that they would be left to transformers.
kernel_support.MIN_SLOTS = kernel_support.MIN_COLUMNS = kernel_support.MIN_SLOTS_WITHOUT_PADDING = 0

_UNDER_CONSTRUCTION: list[type] = []


def patch_at_construction(kind: type) -> None:
    construct = kind.__init__

    @functools.wraps(construct)
    def __init__(self, *arguments, **options):
        _UNDER_CONSTRUCTION.append(kind)
        try:
            construct(self, *arguments, **options)
        finally:
            _UNDER_CONSTRUCTION.pop()
        if not _UNDER_CONSTRUCTION:  # a head constructs an encoder, and both are patched together
            bertfast.patch(self)

    kind.__init__ = __init__


for architecture in families():
    for name in model_classes(architecture):
        patch_at_construction(getattr(architecture.modeling, name))
