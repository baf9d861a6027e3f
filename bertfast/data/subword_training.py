"""Training of byte-level BPE and Unigram vocabularies, and the blocks of words that trainers of every kind get."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import RobertaProcessing, TemplateProcessing

_BLOCK = 2**16  # characters that a trainer gets at a time
_REPEATED = 2**12  # occurrences of a word in one string
_LONGEST_WORD = 100  # characters; longer words are cut, as training may take time quadratic in the length of a word


def train_bpe(texts: Iterable[str], vocab_size: int, special: Mapping[str, str]) -> Tokenizer:
    """Train a byte-level BPE vocabulary, as RoBERTa and ModernBERT have it; every text begins with a space.

    Args:
        texts: The training texts, read once.
        vocab_size: Number of tokens.
        special: The special tokens in the order of their ids, by "cls", "pad", "sep", "unk" and "mask".

    Raises:
        ValueError: The texts are empty.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_added_tokens(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    return _trained(tokenizer, trainer, _count_words(texts), vocab_size, special)


def train_unigram(texts: Iterable[str], vocab_size: int, special: Mapping[str, str]) -> Tokenizer:
    """Train a Unigram vocabulary, as XLM-RoBERTa and CamemBERT have it; see `train_bpe`.

    Words with rare characters are left out if there are more characters than half of the vocabulary. The scores of the
    pieces, and with them their order, also depend on the process: the trainer reads words in the order of a hash table.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=_added_tokens(special),
        # The names of special tokens in a text can then be divided into characters.
        initial_alphabet=sorted(set("".join(special.values()))),
        unk_token=special["unk"],
        show_progress=False,
    )
    counts = _without_rare_characters(_count_words(texts), tokenizer.normalizer, vocab_size // 2)
    return _trained(tokenizer, trainer, counts, vocab_size, special)


def repeat_words(counts: Mapping[str, int]) -> Iterator[str]:
    """Yield each word as often as it was counted, in strings of a bounded number of words."""
    for word, count in counts.items():
        for start in range(0, count, _REPEATED):
            yield f"{word} " * min(_REPEATED, count - start)


def in_blocks(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts joined by spaces, in blocks of about `_BLOCK` characters."""
    block, size = [], 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size > _BLOCK:
            yield " ".join(block)
            block, size = [], 0
    yield " ".join(block)


def _added_tokens(special: Mapping[str, str]) -> list[AddedToken]:
    """Return special tokens for a trainer; that for masked tokens includes the space before it, as in RoBERTa."""
    return [AddedToken(token, lstrip=role == "mask", special=True) for role, token in special.items()]


def _count_words(texts: Iterable[str]) -> Counter[str]:
    """Count words, separated by spaces; long ones are cut into pieces of `_LONGEST_WORD` characters."""
    counts = Counter(word for text in texts for word in text.split())
    for word in [word for word in counts if len(word) > _LONGEST_WORD]:
        count = counts.pop(word)
        for start in range(0, len(word), _LONGEST_WORD):
            counts[word[start : start + _LONGEST_WORD]] += count
    return counts


def _without_rare_characters(counts: Counter[str], normalizer: Any, limit: int) -> Counter[str]:
    """Return the words whose normalized characters are all among the `limit` most frequent ones."""
    normalized = {word: set(normalizer.normalize_str(word)) for word in counts}
    characters: Counter[str] = Counter()
    for word, found in normalized.items():
        for character in found:
            characters[character] += counts[word]
    ranked = sorted(characters, key=lambda character: (-characters[character], character))
    rare = {*ranked[limit:]}
    return Counter({word: count for word, count in counts.items() if normalized[word] and not normalized[word] & rare})


def _trained(
    tokenizer: Tokenizer, trainer: Any, counts: Mapping[str, int], vocab_size: int, special: Mapping[str, str]
) -> Tokenizer:
    """Train a tokenizer on counted words, fill up its vocabulary, and add the special tokens around texts."""
    if not counts:
        raise ValueError("there is no text to train a vocabulary on")
    tokenizer.train_from_iterator(in_blocks(repeat_words(counts)), trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, list):  # the special tokens are first, and pieces of their names may follow
        vocabulary = vocabulary[: len(special)] + [
            x for x in vocabulary[len(special) :] if x[0] not in special.values()
        ]
    # No text has these tokens: BPE has no merges for them, and the input of Unigram has no spaces.
    unused = [f"[unused {i}]" for i in range(vocab_size - len(vocabulary))]
    if isinstance(vocabulary, dict):
        vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(unused)}
    else:
        # The name of a special token in a text is cheaper as characters than as that token.
        lowest = 10 * min(score for _, score in vocabulary) - 100
        pieces = [(piece, lowest if piece in special.values() else score) for piece, score in vocabulary]
        state["model"]["vocab"] = pieces + [(token, lowest) for token in unused]
    trained = Tokenizer.from_str(json.dumps(state))
    trained.post_processor = _post_processor(trained, special)
    return trained


def _post_processor(tokenizer: Tokenizer, special: Mapping[str, str]) -> Any:
    vocabulary = tokenizer.get_vocab()
    cls, sep = ((special[role], vocabulary[special[role]]) for role in ("cls", "sep"))
    if special["cls"].startswith("["):  # BERT's names, and its form of pairs
        pair = f"{cls[0]} $A {sep[0]} $B:1 {sep[0]}:1"
    elif isinstance(tokenizer.model, models.BPE):
        return RobertaProcessing(sep, cls, trim_offsets=True, add_prefix_space=True)
    else:
        pair = f"{cls[0]} $A {sep[0]} {sep[0]} $B {sep[0]}"
    return TemplateProcessing(single=f"{cls[0]} $A {sep[0]}", pair=pair, special_tokens=[cls, sep])
