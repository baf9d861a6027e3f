"""A pytest plugin that replaces transformers' classes by bertfast's: `pytest -p replace_classes`."""

import transformers
from transformers.models.bert import modeling_bert

from bertfast.models import bert

for name in bert.__all__:
    if hasattr(modeling_bert, name):
        setattr(modeling_bert, name, getattr(bert, name))
        setattr(transformers, name, getattr(bert, name))
