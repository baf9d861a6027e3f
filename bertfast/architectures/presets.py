"""The published sizes of BERT."""

from __future__ import annotations

from typing import Any, Literal

from transformers import BertConfig

Preset = Literal["tiny", "mini", "small", "medium", "base", "large"]
# (layers, hidden size) of Turc et al. (2019) and of Devlin et al. (2019); heads are 64 wide.
_SIZES = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}


def preset_config(name: Preset, **changes: Any) -> BertConfig:
    """Return the configuration of a published size.

    Args:
        name: tiny, mini, small, medium, base or large.
        changes: Further arguments of `BertConfig`, or replacements of those of the size.

    Raises:
        ValueError: There is no such size.
    """
    if name not in _SIZES:
        raise ValueError(f"there is no preset {name!r}: use one of {', '.join(_SIZES)}")
    layers, hidden = _SIZES[name]
    sizes = {"num_attention_heads": hidden // 64, "intermediate_size": 4 * hidden}
    return BertConfig(**{"num_hidden_layers": layers, "hidden_size": hidden} | sizes | changes)
