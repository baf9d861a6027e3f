"""How a tokenizer truncates texts that are too long: `truncation_side` and `model_max_length` of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bertfast.data.text_files import read_json

_NO_MAXIMUM = 2**31  # tokens


def truncation_side(tokenizer: Tokenizer) -> str:
    """Return the side at which texts that are too long lose tokens: left or right."""
    truncation = tokenizer.truncation
    return "right" if truncation is None else str(truncation["direction"])


def set_truncation_side(tokenizer: Tokenizer, side: str) -> None:
    """Have a tokenizer truncate nothing, and keep the side, left or right, that `truncation_side` returns."""
    tokenizer.no_truncation()
    if side != "right":  # a tokenizer has a side only with a maximum length
        tokenizer.enable_truncation(_NO_MAXIMUM, direction=side)


def read_truncation_side(tokenizer: Tokenizer, config: Path) -> str:
    """Return the side in the file `config`, a tokenizer_config.json, else that of the tokenizer.json.

    Raises:
        ValueError: It is neither left nor right.
    """
    options = read_json(config) if config.exists() else {}
    side = options.get("truncation_side", truncation_side(tokenizer))
    if side not in ("left", "right"):
        raise ValueError(f"{config}: truncation_side must be left or right, got {json.dumps(side):.40}")
    return str(side)


def read_max_length(config: Path) -> int | None:
    """Return the maximum length in tokens in the file `config`, a tokenizer_config.json, if it has one."""
    return max_length_in(read_json(config) if config.exists() else {})


def max_length_in(options: Mapping[str, Any]) -> int | None:
    """Return the maximum length in tokens in the content of a tokenizer_config.json, if it has one."""
    length = options.get("model_max_length")
    return int(length) if isinstance(length, int | float) and 1 <= length < _NO_MAXIMUM else None


def json_without_truncation(tokenizer: Tokenizer) -> str:
    """Return the content of a tokenizer.json, without a length that transformers would take for the model's maximum."""
    truncation = tokenizer.truncation
    tokenizer.no_truncation()
    content: str = tokenizer.to_str(pretty=True)
    if truncation is not None:
        tokenizer.enable_truncation(**truncation)
    return content
