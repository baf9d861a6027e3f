"""Corpora in which a token's id gives its position in the corpus."""

from pathlib import Path

import numpy as np
import pytest

from bertfast.data.shards import Part, Shards
from bertfast.data.special_tokens import SpecialTokens

SPECIAL = SpecialTokens(pad=0, unk=1, cls=2, sep=3, mask=4)
FIRST_ORDINARY = 5


def numbered_shards(*parts: list[list[int]]) -> Shards:
    """Make shards in memory from sentence lengths per document and part; the token at corpus position i is i + 5."""
    opened, position = [], 0
    for documents in parts:
        sentence_starts = np.cumsum([0, *(length for document in documents for length in document)])
        document_starts = np.cumsum([0, *(len(document) for document in documents)])
        tokens = np.arange(position, position + sentence_starts[-1], dtype=np.uint32) + FIRST_ORDINARY
        opened.append(Part(tokens, sentence_starts, document_starts))
        position += tokens.size
    return Shards(
        folder=Path("numbered"),
        parts=opened,
        documents=sum(map(len, parts)),
        sentences=sum(len(document) for documents in parts for document in documents),
        tokens=position,
        vocab_size=position + FIRST_ORDINARY,
        tokenizer_hash="",
        content_hash="",
    )


@pytest.fixture(scope="session")
def special() -> SpecialTokens:
    """The special tokens of numbered shards."""
    return SPECIAL


@pytest.fixture(scope="session")
def make_shards():
    """The function `numbered_shards`."""
    return numbered_shards


@pytest.fixture(scope="session")
def prose() -> Shards:
    """About 100,000 tokens in three parts, with sentence and document lengths distributed as in an encyclopedia."""
    generator = np.random.default_rng(7)
    return numbered_shards(
        *(
            [
                np.ceil(generator.lognormal(3, 0.6, int(np.ceil(generator.lognormal(3, 1))))).astype(int).tolist()
                for _ in range(documents)
            ]
            for documents in (90, 1, 40)
        )
    )
