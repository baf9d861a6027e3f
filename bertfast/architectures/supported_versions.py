"""Versions of transformers that fused models run with."""

from __future__ import annotations

import transformers

# Before version 5 layers return tuples, and heads drop or refuse keywords that are for the encoder.
IS_TRANSFORMERS_4 = int(transformers.__version__.split(".")[0]) < 5


def require_supported_version(version: str) -> None:
    """Raise ImportError for a version of transformers that fused models cannot run with.

    transformers 5.0 and 5.1 replace the `forward` of a model's modules while they record hidden states and attentions,
    and leave it replaced: patched models would return neither, and later run unfused.
    """
    major, minor = (int(number) for number in version.split(".")[:2])
    if (major, minor) < (4, 57) or (5, 0) <= (major, minor) < (5, 2) or major > 5:
        raise ImportError(
            f"bertfast requires transformers 4.57, or 5.2 or later and below 6, and {version} is installed: "
            'pip install "transformers>=5.2,<6"'
        )


require_supported_version(transformers.__version__)
