"""WordPiece vocabularies: train one, take an existing one, keep it where `transformers` finds it too.

A tokenizer is a `tokenizers.Tokenizer`; nothing here wraps it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class SpecialTokens:
    """The ids of BERT's five special tokens."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, *, cased: bool = False) -> Tokenizer:
    """Train WordPiece on `texts`; `vocabulary_size` is rounded up to a multiple of 64, which matrix units like.

    Where the texts do not yield so many pieces, [unused] tokens fill the vocabulary. Ids do not depend on the order of
    the texts.
    """
    vocabulary_size = -(-vocabulary_size // 64) * 64
    # Every character also has a continuation; more than a quarter of the vocabulary for single characters is a waste.
    alphabet = min(1000, vocabulary_size // 8)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_size, limit_alphabet=alphabet, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    trained = _wordpiece({}, cased)  # which knows no special token, so that "[MASK]" in a text is text
    trained.train_from_iterator(texts, trainer)
    # The trainer numbers pieces differently at each run, so the order is made here.
    pieces = sorted(set(trained.get_vocab()) - set(SPECIAL_TOKENS))
    if not pieces:
        raise ValueError("there is no text to train a vocabulary on")
    unused = [f"[unused{i}]" for i in range(vocabulary_size - len(SPECIAL_TOKENS) - len(pieces))]
    return _wordpiece({token: i for i, token in enumerate([*SPECIAL_TOKENS, *unused, *pieces])}, cased)


def load_tokenizer(path: Path | str, *, cased: bool | None = None) -> Tokenizer:
    """Open a `vocab.txt`, a `tokenizer.json`, or a folder with either, as `transformers.BertTokenizer` would.

    `tokenizer_config.json` in the same folder says whether the vocabulary is cased, unless `cased` does. For a bare
    vocabulary that nothing says it of, one with capital letters in it is cased.
    """
    path = Path(path)
    if path.is_dir():
        names = [name for name in ("tokenizer.json", "vocab.txt") if (path / name).exists()]
        if not names:
            raise FileNotFoundError(f"the folder {path} holds neither a tokenizer.json nor a vocab.txt")
        path = path / names[0]
    if not path.exists():
        raise FileNotFoundError(f"there is no tokenizer at {path}: give a vocab.txt, a tokenizer.json or their folder")
    try:
        tokenizer = Tokenizer.from_file(str(path)) if path.suffix == ".json" else _from_vocabulary(path)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{path} is no tokenizer: {error}") from error
    if not isinstance(tokenizer.model, models.WordPiece):
        raise ValueError(f"{path} holds a {type(tokenizer.model).__name__} model where BERT wants WordPiece")
    if len(tokenizer.get_vocab()) != 1 + max(tokenizer.get_vocab().values(), default=-1):
        raise ValueError(f"the ids in {path} have gaps; number its tokens 0, 1, …")
    _configure(tokenizer, path.with_name("tokenizer_config.json"), cased)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special_tokens(tokenizer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path | str) -> None:
    """Write `tokenizer.json`, `vocab.txt` and `tokenizer_config.json`, which `transformers.BertTokenizer` opens."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in _tokens(tokenizer)), encoding="utf-8")
    options = {"tokenizer_class": "BertTokenizer"}
    if isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        options |= {key: getattr(tokenizer.normalizer, name) for key, name in NORMALIZER_OPTIONS.items()}
    options |= {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(options, indent=1))


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """The ids of the special tokens; ValueError for a vocabulary that lacks one."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    missing = [token for token, i in ids.items() if i is None]
    if missing:
        raise ValueError(f"the vocabulary has no {' and no '.join(missing)}, which BERT needs")
    return SpecialTokens(**{token[1:-1].lower(): i for token, i in ids.items()})


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Hexadecimal SHA-256 of all that decides which ids a text gets."""
    state = json.loads(tokenizer.to_str())
    state["model"].pop("vocab")
    decisive = [_tokens(tokenizer), state["model"], state["normalizer"], state["pre_tokenizer"]]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def continuation_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """bool [vocabulary]: True for the tokens that continue a word ("##…")."""
    prefix = tokenizer.model.continuing_subword_prefix
    return np.array([token.startswith(prefix) for token in _tokens(tokenizer)])


NORMALIZER_OPTIONS = {  # tokenizer_config.json's names: the normalizer's
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


def _tokens(tokenizer: Tokenizer) -> list[str]:
    """Every token in the order of its id."""
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.get)


def _wordpiece(vocabulary: dict[str, int], cased: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([token for token in SPECIAL_TOKENS if token in vocabulary])
    if {"[SEP]", "[CLS]"} <= vocabulary.keys():
        tokenizer.post_processor = processors.BertProcessing(*((t, vocabulary[t]) for t in ("[SEP]", "[CLS]")))
    return tokenizer


def _from_vocabulary(path: Path) -> Tokenizer:
    with path.open(encoding="utf-8") as file:  # a token may hold characters that str.splitlines splits at
        lines = [line.rstrip("\n") for line in file]
    vocabulary = {token: i for i, token in enumerate(lines)}
    if len(vocabulary) != len(lines):
        raise ValueError(f"{len(lines) - len(vocabulary)} of its lines are repeated")
    cased = any(token != token.lower() for token in vocabulary if not token.startswith("["))
    return _wordpiece(vocabulary, cased)


def _configure(tokenizer: Tokenizer, config: Path, cased: bool | None) -> None:
    """Set the normalizer's options as `config` and `cased` have them."""
    options = json.loads(config.read_text()) if config.exists() else {}
    if cased is not None:
        options["do_lower_case"] = not cased
    if isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        for key, name in NORMALIZER_OPTIONS.items():
            if key in options:
                setattr(tokenizer.normalizer, name, options[key])
