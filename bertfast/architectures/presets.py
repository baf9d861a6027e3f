"""The published sizes of the families, and the kind of their tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import CONFIG_MAPPING, BertConfig

from bertfast.architectures import family_by_type, version_unsupported_reason
from bertfast.data.tokenizer import TokenizerType

ArchitectureName = Literal["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "modernbert"]
Preset = Literal["tiny", "mini", "small", "medium", "base", "large"]
Entries = Mapping[str, Any]
"""Entries of a configuration, under the names that BERT has for them."""


@dataclass(frozen=True)
class Published:
    """What is published of a family.

    Attributes:
        sizes: Entries of a configuration by the name of a preset.
        entries: Further entries, the same for all presets.
        tokenizer_type: Kind of the family's tokenizer.
        bert_special_tokens: Whether a bpe or unigram tokenizer of the family has BERT's special tokens.
    """

    sizes: Mapping[str, Entries]
    entries: Entries = field(default_factory=dict)
    tokenizer_type: TokenizerType = "wordpiece"
    bert_special_tokens: bool = False


def _size(layers: int, hidden: int, **others: int) -> dict[str, int]:
    """Return the entries of a size; heads are 64 wide."""
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden}
    return sizes | {"num_attention_heads": hidden // 64, "intermediate_size": 4 * hidden} | others


# Of Turc et al. (2019) and of Devlin et al. (2019). Other families have published base and, but for DistilBERT, large;
# their smaller ones here are as small as BERT's.
_BERT = {
    "tiny": _size(2, 128),
    "mini": _size(4, 256),
    "small": _size(4, 512),
    "medium": _size(8, 512),
    "base": _size(12, 768),
    "large": _size(24, 1024),
}
_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}

PUBLISHED: dict[str, Published] = {
    "bert": Published(_BERT),
    "roberta": Published(_BERT, _ROBERTA | {"vocab_size": 50265}, "bpe"),
    "xlm-roberta": Published(_BERT, _ROBERTA | {"vocab_size": 250002}, "unigram"),
    "camembert": Published(_BERT, _ROBERTA | {"vocab_size": 32005}, "unigram"),
    # The published small model is a narrow one of twelve layers.
    "electra": Published(
        {name: size | {"embedding_size": size["hidden_size"]} for name, size in _BERT.items()}
        | {"small": _size(12, 256, embedding_size=128)}
    ),
    # Half of BERT's layers; only base was published.
    "distilbert": Published(
        {name: size | {"num_hidden_layers": size["num_hidden_layers"] // 2} for name, size in _BERT.items()}
    ),
    # Base and large are those of Warner et al. (2024), the smaller ones of Weller et al. (2025): 17, 32 and 68 million.
    "modernbert": Published(
        {
            "tiny": _size(7, 256, intermediate_size=384),
            "mini": _size(10, 384, intermediate_size=576),
            "small": _size(19, 512, intermediate_size=768),
            "base": _size(22, 768, intermediate_size=1152),
            "large": _size(28, 1024, intermediate_size=2624),
        },
        tokenizer_type="bpe",
        bert_special_tokens=True,
    ),
}
"""By `model_type`: one row per family that is pre-trained."""


def preset_config(name: Preset, *, architecture: ArchitectureName = "bert", **changes: Any) -> BertConfig:
    """Return the configuration of a published size.

    Args:
        name: tiny, mini, small, medium, base or large.
        architecture: Family of the model.
        changes: Further arguments of the family's configuration, or replacements of those of the size, under BERT's
            names or the family's.

    Returns:
        A configuration of the family: one of BERT, or one whose entries have the same names or other ones for the same.

    Raises:
        ValueError: There is no such family or size, or the installed transformers does not have the family.
    """
    if (reason := version_unsupported_reason(architecture)) is not None:
        raise ValueError(f"--architecture {architecture}: {reason}")
    published, adapter = PUBLISHED.get(architecture), family_by_type(architecture)
    if published is None or adapter is None:
        raise ValueError(f"there are no presets of {architecture!r}: use one of {', '.join(PUBLISHED)}")
    if name not in published.sizes:
        raise ValueError(f"there is no preset {name!r}: use one of {', '.join(published.sizes)}")
    entries = {**published.sizes[name], **published.entries, **changes}
    kind: Any = CONFIG_MAPPING[architecture]
    config: BertConfig = kind(**{adapter.config_name(key): value for key, value in entries.items()})
    return config
