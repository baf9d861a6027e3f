"""The special tokens of a vocabulary, by their roles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models

# In the order of their ids in trained vocabularies.
BERT_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ROBERTA_TOKENS = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
SPECIAL_TOKENS = tuple(BERT_TOKENS.values())


@dataclass(frozen=True)
class SpecialTokens:
    """The ids of the special tokens.

    Attributes:
        pad: In padding slots, which nothing reads; may be the same as `sep`.
        unk: For what is not in the vocabulary; None: nothing is, as in some byte-level vocabularies.
        cls: Before a text; RoBERTa calls it <s>.
        sep: After a text; RoBERTa calls it </s>.
        mask: In place of a token to predict.
    """

    pad: int
    unk: int | None
    cls: int
    sep: int
    mask: int


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """Return the ids of the special tokens.

    Raises:
        ValueError: The vocabulary lacks one.
    """
    ids: dict[str, Any] = {"unk": None}
    ids |= {role: tokenizer.token_to_id(token) for role, token in special_names(tokenizer).items()}
    return SpecialTokens(**ids)


def special_names(tokenizer: Tokenizer) -> Mapping[str, str]:
    """Return the special tokens of a vocabulary by their roles: those of BERT, those of RoBERTa, or others.

    Others are found for BPE and Unigram, as in EuroBERT: `cls` and `sep` are what the tokenizer puts before and after a
    text, `mask`, `pad` and `unk` the special tokens that are named so, as `<|mask|>`. Without one named pad, `sep` is
    the padding; there may be no `unk`.

    Raises:
        ValueError: The vocabulary lacks one.
    """
    lacking = [
        (names, [token for token in names.values() if tokenizer.token_to_id(token) is None])
        for names in (BERT_TOKENS, ROBERTA_TOKENS)
    ]
    names, missing = min(lacking, key=lambda entry: len(entry[1]))
    if not missing:
        return names
    others = _other_names(tokenizer)
    if {"cls", "sep", "mask"} <= others.keys():
        return {"pad": others["sep"]} | others
    if others and len(missing) > 2:
        where = {"cls": "before a text", "sep": "after a text", "mask": "named mask"}
        absent = [missing_one for role, missing_one in where.items() if role not in others]
        raise ValueError(
            "the vocabulary has the special tokens neither of BERT nor of RoBERTa, and no special token "
            f"{' and none '.join(absent)}"
        )
    family = "BERT" if names is BERT_TOKENS else "RoBERTa"
    raise ValueError(f"the vocabulary has no {' and no '.join(missing)}, which {family} requires")


def mask_token(tokenizer: Tokenizer) -> str:
    """Return the token that stands for one to predict, whichever other special tokens the vocabulary has.

    Raises:
        ValueError: There is none.
    """
    mask = _present(tokenizer, "mask")
    if mask is None:
        raise ValueError("the vocabulary has no [MASK] and no <mask>, and no other special token named mask")
    return mask


def unknown_token(tokenizer: Tokenizer) -> str:
    """Return the token of what is not in the vocabulary, else the mask; ValueError if there is neither."""
    return _present(tokenizer, "unk") or mask_token(tokenizer)


def _present(tokenizer: Tokenizer, role: str) -> str | None:
    """Return the vocabulary's token of one role, None if it has none."""
    usual = [names[role] for names in (BERT_TOKENS, ROBERTA_TOKENS)]
    known = next((token for token in usual if tokenizer.token_to_id(token) is not None), None)
    return known or _other_names(tokenizer).get(role)


def _other_names(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the special tokens of a BPE or Unigram tokenizer by the roles that show; see `special_names`."""
    if isinstance(tokenizer.model, models.WordPiece):
        return {}
    encoding = tokenizer.encode("a")
    tokens = [*zip(encoding.tokens, encoding.special_tokens_mask, strict=True)]
    ends = {"cls": tokens[:1], "sep": tokens[1:][-1:]}
    names = {role: token for role, end in ends.items() for token, is_special in end if is_special}
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    for role in ("mask", "pad", "unk"):
        named = [token for token in special if role in token.lower()]
        if named:
            names[role] = min(named, key=len)  # the first of <mask>, <mask_1>, …
    return names
