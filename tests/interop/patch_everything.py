"""A pytest plugin that patches each BERT model of transformers on construction: `pytest -p patch_everything`."""

import functools

from transformers.models.bert import modeling_bert

import bertfast

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
        if not _UNDER_CONSTRUCTION:  # a head constructs a BertModel, and both are patched together
            bertfast.patch(self)

    kind.__init__ = __init__


for name in modeling_bert.__all__:
    if name.startswith("Bert") and name not in ("BertLayer", "BertPreTrainedModel"):
        patch_at_construction(getattr(modeling_bert, name))
