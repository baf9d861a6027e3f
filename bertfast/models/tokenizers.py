"""Tokenizers of models of any family: opening them, the special tokens around texts, and keeping their files."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PretrainedConfig

from bertfast.architectures.presets import PUBLISHED
from bertfast.data.special_tokens import special_tokens
from bertfast.data.text_files import read_json
from bertfast.data.tokenizer import GENERIC_CLASS, TOKENIZER_FILES, load_tokenizer, save_tokenizer
from bertfast.data.truncation import max_length_in, set_truncation_side
from bertfast.encoder import has_token_types
from bertfast.models.families import architecture_of
from bertfast.runtime.atomic_write import atomic_path


@dataclass(frozen=True)
class Template:
    """The special tokens of a sequence: start text end, or start text middle other_text end_of_pair.

    Attributes:
        start, end, middle, end_of_pair: Token ids.
    """

    start: list[int]
    end: list[int]
    middle: list[int]
    end_of_pair: list[int]


def load_any_tokenizer(folder: Path | str) -> Tokenizer:
    """Load the tokenizer in the folder of a model of any family: as `load_tokenizer` if it has BERT's vocabulary.

    Raises:
        FileNotFoundError: There is none.
        ValueError: transformers cannot open it, or has no fast tokenizer for it.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    # Without a vocabulary transformers would make one that has only special tokens.
    has_other = (folder / "vocab.json").exists() or any(folder.glob("*.model"))
    has_wordpieces = (folder / "vocab.txt").exists() or not has_other
    if path.exists():
        model = read_json(path).get("model")
        has_wordpieces = not isinstance(model, dict) or model.get("type", "WordPiece") == "WordPiece"
    if has_wordpieces:
        return load_tokenizer(folder)
    try:
        opened = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of many classes
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers cannot open the tokenizer in {folder}: {reason:.300}") from error
    if not opened.is_fast:
        raise ValueError(f"the tokenizer in {folder} is not a fast one: save it as tokenizer.json")
    tokenizer: Tokenizer = opened.backend_tokenizer
    set_truncation_side(tokenizer, opened.truncation_side)
    tokenizer.no_padding()
    return tokenizer


def template(tokenizer: Tokenizer) -> Template:
    """Return the special tokens that a tokenizer puts around texts.

    Raises:
        ValueError: It cannot be found out, as the tokenizer leaves nothing of a letter.
    """
    if isinstance(tokenizer.model, models.WordPiece):
        special = special_tokens(tokenizer)
        return Template([special.cls], [special.sep], [special.sep], [special.sep])
    pair, single = tokenizer.encode("a", "a"), tokenizer.encode("a")
    first, second = ([i for i, text in enumerate(pair.sequence_ids) if text == side] for side in (0, 1))
    if not first or not second:
        raise ValueError("the tokenizer has no token for the letter a")
    end = single.ids[first[-1] + 1 :]
    middle = pair.ids[first[-1] + 1 : second[0]]
    return Template(pair.ids[: first[0]], end, middle, pair.ids[second[-1] + 1 :])


def mark_words(tokenizer: Tokenizer) -> None:
    """Have a byte-level tokenizer treat each word of a list as one after a space, as transformers requires it."""
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        tokenizer.pre_tokenizer.add_prefix_space = True


def copy_tokenizer(tokenizer: Tokenizer, source: Path, folder: Path) -> None:
    """Write a tokenizer from the folder `source` into another, as BERT's if it is one, else by copying its files."""
    config = source / "tokenizer_config.json"
    options = read_json(config) if config.exists() else {}
    kind = str(options.get("tokenizer_class", "BertTokenizer"))
    if isinstance(tokenizer.model, models.WordPiece) and kind.startswith("Bert"):
        save_tokenizer(tokenizer, folder, max_length=max_length_in(options))
        return
    for path in (path for pattern in TOKENIZER_FILES for path in source.glob(pattern)):
        with atomic_path(folder / path.name) as temporary:
            shutil.copyfile(path, temporary)


def save_model_tokenizer(tokenizer: Tokenizer, folder: Path, config: PretrainedConfig) -> None:
    """Write a tokenizer into the folder of a model, whose configuration decides its class, token types and length."""
    architecture = architecture_of(config)
    # transformers' classes of the other families do not read vocabularies of WordPiece, or there are none.
    published = PUBLISHED.get(architecture.model_type)
    reads_wordpiece = published is not None and published.tokenizer_type == "wordpiece"
    wordpiece_class = f"{architecture.prefix}Tokenizer" if reads_wordpiece else GENERIC_CLASS
    save_tokenizer(
        tokenizer,
        folder,
        wordpiece_class=wordpiece_class,
        token_types=has_token_types(config),
        max_length=architecture.max_positions(config),
    )


def without_spaces(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Return the start and end of tokens, int64 [n, 2], without the spaces before a word that some tokens include."""
    spans = np.array(offsets, np.int64).reshape(-1, 2)
    is_space = np.array([*map(str.isspace, text), False])
    while (moved := is_space[spans[:, 0]] & (spans[:, 0] < spans[:, 1])).any():
        spans[:, 0] += moved
    return spans
