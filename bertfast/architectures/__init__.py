"""One adapter per model family: where the packed encoder finds the parts of its models, and what they run."""

from bertfast.architectures import supported_versions  # noqa: F401  first: it raises if transformers is not supported
from bertfast.architectures.architecture import Architecture, activation_name, read
from bertfast.architectures.bert import BERT
from bertfast.architectures.supported_versions import IS_TRANSFORMERS_4

__all__ = ["BERT", "IS_TRANSFORMERS_4", "Architecture", "activation_name", "read"]
