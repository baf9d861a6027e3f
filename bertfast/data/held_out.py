"""Which part of the training text is held out for validation."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from bertfast.data.sentences import split_sentences
from bertfast.runtime.settings import counted

MIN_SENTENCES = 2  # in each split: a pair of sentences
_HASHES = 2**64


@dataclass(frozen=True)
class HeldOut:
    """A rule that divides each document on its own, so that files can be processed in any order and on any machine.

    Attributes:
        below: Documents with a smaller hash are held out whole: of a large corpus, a random share. Equal documents
            stay together.
        document: Hash of a document of which only the end is held out; None: there is none.
        sentences: Number of the last sentences of that document that are held out.
    """

    below: int
    document: int | None = None
    sentences: int = 0

    @classmethod
    def share(cls, percentage: float) -> HeldOut:
        """Return the rule that holds out a percentage of the documents, decided by their hashes alone."""
        return cls(int(percentage / 100 * _HASHES))

    @classmethod
    def of_corpus(cls, percentage: float, documents: Callable[[], Iterator[list[str]]]) -> HeldOut:
        """Return the rule that holds out a percentage of a corpus, and at least two sentences.

        Where the hashes hold out less, because the documents are few, it is the end of the longest document, or, if all
        documents are short, a few whole documents.

        Args:
            percentage: Percentage of the documents to hold out.
            documents: Returns the documents of the corpus, which are read until it is clear that the hashes suffice.

        Raises:
            ValueError: The corpus is too small to be divided.
        """
        by_hash = cls.share(percentage)
        if not percentage:
            return by_hash
        found = {True: 0, False: 0}  # sentences that are held out, and that are not
        for document in documents():
            held_out = by_hash.holds(document)
            if found[held_out] < MIN_SENTENCES:
                found[held_out] += _sentences(document)
            if min(found.values()) >= MIN_SENTENCES:
                return by_hash
        lengths = [(_sentences(document), document_hash(document)) for document in documents()]
        total = sum(length for length, _ in lengths)
        if 0 < total < 2 * MIN_SENTENCES:
            raise ValueError(
                f"the text has {counted(total, 'sentence')} and at least {2 * MIN_SENTENCES} "
                f"are required, of which {MIN_SENTENCES} are held out for validation: use more text, or hold out "
                "nothing with --validation-split-percentage 0"
            )
        number = max(MIN_SENTENCES, round(percentage / 100 * total))
        longest, key = max(lengths, default=(0, 0))
        if longest >= 2 * MIN_SENTENCES:
            return cls(0, key, min(number, longest // 2))
        return cls(_threshold(lengths, number))

    def is_divided(self, paragraphs: list[str]) -> bool:
        """Return whether the end of a document is held out, but not the rest."""
        return document_hash(paragraphs) == self.document

    def holds(self, paragraphs: list[str]) -> bool:
        """Return whether a document is held out whole."""
        return document_hash(paragraphs) < self.below

    def divide(self, paragraphs: list[str]) -> tuple[list[str], list[str]]:
        """Return the sentences of a document that are for training, and those that are held out."""
        sentences = [sentence for paragraph in paragraphs for sentence in split_sentences(paragraph)]
        first = 0 if self.holds(paragraphs) else len(sentences)
        if self.is_divided(paragraphs):
            first = max(0, len(sentences) - self.sentences)
        return sentences[:first], sentences[first:]

    def description(self) -> dict[str, int | None]:
        """Return the rule as a value that JSON can hold."""
        return dataclasses.asdict(self)


def document_hash(paragraphs: list[str]) -> int:
    """Return a hash of a document's text, from 0 to 2**64 - 1."""
    digest = hashlib.blake2b("\n".join(paragraphs).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _sentences(document: list[str]) -> int:
    return sum(len(split_sentences(paragraph)) for paragraph in document)


def _threshold(lengths: Iterable[tuple[int, int]], number: int) -> int:
    """Return the hash below which documents together have a number of sentences; lengths are (sentences, hash)."""
    found = 0
    for length, key in sorted(lengths, key=lambda entry: entry[1]):
        found += length
        if found >= number:
            return key + 1
    return 0
