"""Tokenizers of three kinds, WordPiece, BPE and Unigram: training, loading and saving, in the files of `transformers`.

A tokenizer is a plain `tokenizers.Tokenizer`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import BertProcessing

from bertfast.data.special_tokens import (
    BERT_TOKENS,
    ROBERTA_TOKENS,
    SPECIAL_TOKENS,
    special_names,
    special_tokens,
)
from bertfast.data.subword_training import in_blocks, repeat_words, train_bpe, train_unigram
from bertfast.data.text_files import read_json, read_lines
from bertfast.data.truncation import (
    json_without_truncation,
    read_truncation_side,
    set_truncation_side,
    truncation_side,
)
from bertfast.runtime.atomic_write import write_atomically

TOKENIZER_FILES = ("tokenizer*.json", "vocab.txt", "special_tokens_map.json", "vocab.json", "merges.txt", "*.model")
"""Patterns of the files of a model's tokenizer."""

GENERIC_CLASS = "PreTrainedTokenizerFast"
"""Class of transformers that opens any tokenizer.json as it is."""

TokenizerType = Literal["wordpiece", "bpe", "unigram"]

MIN_BPE_SIZE = 257  # rounded up, it holds all bytes and the special tokens
_LONGEST_WORD = 100  # characters; the tokenizer replaces longer words by [UNK], as BERT's does


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    cased: bool = False,
    kind: TokenizerType = "wordpiece",
    bert_special_tokens: bool = False,
) -> Tokenizer:
    """Train a vocabulary; except for unigram, token ids depend on nothing but the words of the texts and their counts.

    Args:
        texts: The training texts, read once.
        vocab_size: Rounded up to a multiple of 64, for efficient GEMMs; [unused] tokens fill up the vocabulary if the
            texts yield fewer pieces. That of bpe must be at least `MIN_BPE_SIZE`.
        cased: Whether a WordPiece vocabulary keeps upper case and accents; others always do.
        kind: wordpiece, bpe (byte-level) or unigram.
        bert_special_tokens: Whether a bpe or unigram vocabulary has BERT's special tokens and not RoBERTa's.

    Raises:
        ValueError: The texts are empty.
    """
    vocab_size = -(-vocab_size // 64) * 64
    if kind != "wordpiece":
        train = train_bpe if kind == "bpe" else train_unigram
        return train(texts, vocab_size, BERT_TOKENS if bert_special_tokens else ROBERTA_TOKENS)
    counts = _count_words(texts, _wordpiece({}, cased))
    # Every character takes two entries, one of them as a continuation; a quarter of the vocabulary is the limit.
    alphabet = _alphabet(counts, _wordpiece({}, cased).normalizer, min(1000, vocab_size // 8))
    # The trainer merges pairs of equal counts in the order of their ids, and would number continuations in the order of
    # a hash table. They get fixed ids as special tokens.
    continuations = sorted(piece for piece in _train(counts.keys(), 0, alphabet, [], cased) if piece.startswith("##"))
    pieces = sorted(_train(repeat_words(counts), vocab_size, alphabet, [*SPECIAL_TOKENS, *continuations], cased))
    if not pieces:
        raise ValueError("there is no text to train a vocabulary on")
    unused = [f"[unused{i}]" for i in range(vocab_size - len(SPECIAL_TOKENS) - len(pieces))]
    return _wordpiece({token: i for i, token in enumerate([*SPECIAL_TOKENS, *unused, *pieces])}, cased)


def _count_words(texts: Iterable[str], tokenizer: Tokenizer) -> Counter[str]:
    """Count the words of texts, separated by spaces.

    Long ones are divided as the tokenizer does it, and left out if they stay too long for it: training takes time
    quadratic in the length of a word.
    """
    counts = Counter(word for text in texts for word in text.split())
    for long_word in [word for word in counts if len(word) > _LONGEST_WORD]:
        count = counts.pop(long_word)
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(long_word)):
            if len(word) <= _LONGEST_WORD:
                counts[word] += count
    return counts


def _alphabet(counts: Mapping[str, int], normalizer: normalizers.Normalizer, limit: int) -> list[str]:
    """Return the most frequent characters of normalized words, at most `limit`; of equally frequent ones the first."""
    characters: Counter[str] = Counter()
    for word, count in counts.items():
        for character in word:
            characters[character] += count
    normalized: Counter[str] = Counter()
    for character, count in characters.items():
        for part in normalizer.normalize_str(character).strip():
            normalized[part] += count
    return sorted(normalized, key=lambda character: (-normalized[character], character))[:limit]


def _train(texts: Iterable[str], vocab_size: int, alphabet: list[str], first: list[str], cased: bool) -> set[str]:
    """Return the pieces of a vocabulary, without special tokens; those in `first` get the first ids in training."""
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
        special_tokens=first,
        show_progress=False,
    )
    trained = _wordpiece({}, cased)  # without special tokens, so that "[MASK]" in a text is treated as text
    trained.train_from_iterator(in_blocks(texts), trainer)
    return set(trained.get_vocab()) - set(SPECIAL_TOKENS)


def load_tokenizer(path: Path | str, *, cased: bool | None = None) -> Tokenizer:
    """Load a tokenizer: one of WordPiece as `transformers.BertTokenizer` would, one of BPE or Unigram as it is.

    Args:
        path: A `vocab.txt`, a `tokenizer.json`, or a folder with either.
        cased: Whether a WordPiece vocabulary is cased; None: as `tokenizer_config.json` in the same folder says, else
            whether the vocabulary contains upper-case letters.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a tokenizer of one of these kinds with the special tokens of an encoder.
    """
    path = tokenizer_files(path)[0]
    tokenizer = _from_json(path) if path.suffix == ".json" else _from_vocabulary(path)
    if not isinstance(tokenizer.model, models.WordPiece | models.BPE | models.Unigram):
        name = type(tokenizer.model).__name__
        raise ValueError(f"{path} holds a {name} model: use a tokenizer of WordPiece, BPE or Unigram")
    require_all_ids(tokenizer, str(path))
    if isinstance(tokenizer.model, models.WordPiece):
        _configure(tokenizer, path.with_name("tokenizer_config.json"), cased)
    set_truncation_side(tokenizer, read_truncation_side(tokenizer, path.with_name("tokenizer_config.json")))
    tokenizer.no_padding()
    try:
        special_tokens(tokenizer)
    except ValueError as error:
        raise ValueError(f"{path} is not the vocabulary of an encoder: {error}") from None
    return tokenizer


def require_all_ids(tokenizer: Tokenizer, source: str) -> None:
    """Raise ValueError, naming the source of a tokenizer, if its token ids are not 0, 1, 2, …."""
    ids = sorted(tokenizer.get_vocab().values())
    if ids != list(range(len(ids))):
        raise ValueError(f"the token ids in {source} have gaps: they must be 0, 1, 2, …")


def tokenizer_files(path: Path | str) -> list[Path]:
    """Return the file that `load_tokenizer` reads the vocabulary from and, if there is one, that of the options.

    Raises:
        FileNotFoundError: There is no vocabulary.
    """
    path = Path(path)
    if path.is_dir():
        names = [name for name in ("tokenizer.json", "vocab.txt") if (path / name).exists()]
        if not names:
            message = f"the folder {path} holds neither a tokenizer.json nor a vocab.txt"
            if (path / "vocab.json").exists() or any(path.glob("*.model")):
                message += (
                    f': transformers writes one, AutoTokenizer.from_pretrained("{path}").save_pretrained("{path}")'
                )
            raise FileNotFoundError(message)
        path = path / names[0]
    if not path.exists():
        raise FileNotFoundError(f"there is no tokenizer at {path}: name a vocab.txt, a tokenizer.json or their folder")
    options = path.with_name("tokenizer_config.json")
    return [path, options] if options.exists() else [path]


def save_tokenizer(
    tokenizer: Tokenizer,
    folder: Path | str,
    *,
    wordpiece_class: str = "BertTokenizer",
    token_types: bool = False,
    max_length: int | None = None,
) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` opens.

    Args:
        tokenizer: The tokenizer; of WordPiece, `vocab.txt` is written, too.
        folder: The folder.
        wordpiece_class: Class of transformers for a WordPiece tokenizer.
        token_types: Whether `PreTrainedTokenizerFast`, which opens all others, returns token types.
        max_length: Tokens that the model of the folder accepts, to which transformers truncates; None: unlimited.
    """
    folder = Path(folder)
    names = special_names(tokenizer)
    is_wordpiece = isinstance(tokenizer.model, models.WordPiece)
    options: dict[str, object] = {"tokenizer_class": wordpiece_class if is_wordpiece else GENERIC_CLASS}
    if is_wordpiece and isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        options |= {key: getattr(tokenizer.normalizer, name) for key, name in NORMALIZER_OPTIONS.items()}
    options |= {f"{role}_token": token for role, token in names.items()}
    if (side := truncation_side(tokenizer)) != "right":
        options["truncation_side"] = side
    if max_length is not None:
        options["model_max_length"] = max_length
    if names is not BERT_TOKENS:
        options |= {"bos_token": names["cls"], "eos_token": names["sep"]}
    if "add_prefix_space" in (splits := _pre_tokenizer(tokenizer)):  # which transformers 4 sets to False by default
        options["add_prefix_space"] = splits["add_prefix_space"]
    if options["tokenizer_class"] == GENERIC_CLASS:
        options["model_input_names"] = ["input_ids", *["token_type_ids"] * token_types, "attention_mask"]
    write_atomically(folder / "tokenizer_config.json", json.dumps(options, indent=1))
    if is_wordpiece:
        write_atomically(folder / "vocab.txt", "".join(f"{token}\n" for token in _tokens(tokenizer)))
    else:
        (folder / "vocab.txt").unlink(missing_ok=True)  # of an earlier tokenizer
    content = json_without_truncation(tokenizer)
    write_atomically(folder / "tokenizer.json", content)  # last: the others are there if it is


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Return the hexadecimal SHA-256 of everything that determines the token ids of a text."""
    state = json.loads(tokenizer.to_str())
    if isinstance(state["model"]["vocab"], dict):  # else a list with the scores of Unigram
        state["model"].pop("vocab")
    state_parts = [_tokens(tokenizer), state["model"], state["normalizer"], state["pre_tokenizer"]]
    return hashlib.sha256(json.dumps(state_parts, sort_keys=True).encode()).hexdigest()


def continuation_tokens(tokenizer: Tokenizer, *, whole_word: bool = True) -> np.ndarray:
    """Return bool [V], True for the tokens that continue a word.

    In WordPiece these begin with "##", in byte-level BPE and Unigram without the mark of a space, "Ġ" or "▁": there a
    word includes the punctuation after it.

    Args:
        tokenizer: The tokenizer.
        whole_word: Whether words are masked whole. If not, any tokenizer is accepted.

    Raises:
        ValueError: Its tokens do not show where words begin.
    """
    tokens, mark = _tokens(tokenizer), _space_mark(tokenizer)
    if isinstance(tokenizer.model, models.WordPiece):
        prefix = tokenizer.model.continuing_subword_prefix
        return np.array([token.startswith(prefix) for token in tokens])
    if mark is None and whole_word:
        raise ValueError(
            "--whole-word requires a tokenizer whose tokens show where words begin: WordPiece (##), byte-level BPE (Ġ) "
            f"or Unigram (▁); this {type(tokenizer.model).__name__} tokenizer has no such mark: leave it out"
        )
    return np.array([mark is not None and not token.startswith(mark) for token in tokens])


def _pre_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the options of a tokenizer's pre-tokenizer, as in tokenizer.json."""
    options: dict[str, Any] | None = json.loads(tokenizer.to_str())["pre_tokenizer"]
    return options or {}


def _space_mark(tokenizer: Tokenizer) -> str | None:
    """Return the character for a space in the tokens of BPE and Unigram; None: there is none."""
    whole = _pre_tokenizer(tokenizer)
    for part in whole.get("pretokenizers", [whole]):
        if part.get("type") == "ByteLevel":
            return "Ġ"
        if part.get("type") == "Metaspace":
            return str(part["replacement"])
    return None


def encode_sentences(tokenizer: Tokenizer, sentences: Sequence[str]) -> Iterator[list[int]]:
    """Yield the token ids of sentences of running text; names of special tokens in a text are text.

    Other tokenizers than WordPiece see a space before each sentence, which marks its first word.
    """
    tokenizer.encode_special_tokens = True
    before = "" if isinstance(tokenizer.model, models.WordPiece) else " "
    encoded = tokenizer.encode_batch_fast([before + sentence for sentence in sentences], add_special_tokens=False)
    names = special_names(tokenizer)
    special = {tokenizer.token_to_id(token): token for token in names.values()}
    unknown = tokenizer.token_to_id(names["unk"]) if "unk" in names else None
    # Published Unigram vocabularies have these names among their pieces.
    reads_names = isinstance(tokenizer.model, models.Unigram)
    for sentence, encoding in zip(sentences, encoded, strict=True):
        if reads_names and unknown is not None and any(token in sentence for token in special.values()):
            yield [unknown if token in special else token for token in encoding.ids]
        else:
            yield encoding.ids


NORMALIZER_OPTIONS = {  # name in tokenizer_config.json: attribute of the normalizer
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


def _tokens(tokenizer: Tokenizer) -> list[str]:
    """Return all tokens in the order of their ids."""
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _wordpiece(vocabulary: dict[str, int], cased: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=_LONGEST_WORD))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([token for token in SPECIAL_TOKENS if token in vocabulary])
    if {"[SEP]", "[CLS]"} <= vocabulary.keys():
        tokenizer.post_processor = BertProcessing(*((t, vocabulary[t]) for t in ("[SEP]", "[CLS]")))
    return tokenizer


def _from_json(path: Path) -> Tokenizer:
    content = json.dumps(read_json(path))
    try:
        return Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


def _from_vocabulary(path: Path) -> Tokenizer:
    # Lines end at line feeds only: tokens may contain other characters at which str.splitlines splits.
    tokens = [line.removesuffix("\n").removesuffix("\r") for _, line in read_lines(path)]
    while tokens and not tokens[-1]:
        tokens.pop()
    vocabulary: dict[str, int] = {}
    for token_id, token in enumerate(tokens):
        line = f"{path}, line {token_id + 1}"
        if token in vocabulary:
            raise ValueError(
                f"{line}: {token!r} is repeated, first on line {vocabulary[token] + 1}; remove one of them"
            )
        if " " in token.strip(" ") or "\t" in token:
            raise ValueError(f"{line}: {token!r:.80} is more than one token; a vocab.txt has one token per line")
        vocabulary[token] = token_id
    cased = any(token != token.lower() for token in vocabulary if not token.startswith("["))
    return _wordpiece(vocabulary, cased)


def _configure(tokenizer: Tokenizer, config: Path, cased: bool | None) -> None:
    """Set the normalizer's options from the file `config`, if it exists, and `cased`, if it is given."""
    options = read_json(config) if config.exists() else {}
    if cased is not None:
        options["do_lower_case"] = not cased
    if isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        for key, name in NORMALIZER_OPTIONS.items():
            if key in options:
                if not isinstance(options[key], bool | None):
                    raise ValueError(f"{config}: {key} must be true or false, got {json.dumps(options[key]):.40}")
                if options[key] is not None or name == "strip_accents":  # of other options, null is the default
                    setattr(tokenizer.normalizer, name, options[key])
