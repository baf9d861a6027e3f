"""One adapter per model family: where the packed encoder finds the parts of its models, and what they run."""

from bertfast.architectures import supported_versions  # noqa: F401  first: it raises if transformers is not supported
from bertfast.architectures.architecture import Architecture, activation_name, read
from bertfast.architectures.bert import BERT

__all__ = ["BERT", "Architecture", "activation_name", "read"]
