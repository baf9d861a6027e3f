"""Which stretches of the corpus make a sample: sentence pairs as in BERT's paper, or runs of whole sentences.

An epoch is planned at once, as arrays, from the boundaries alone: all documents are walked side by side, one sample
a document a round, and no token is read. After section 3.1 and appendix A.2 of Devlin et al., "BERT: Pre-training of
Deep Bidirectional Transformers for Language Understanding", and the `create_pretraining_data` released with it; unlike
there, each sample (not each document) is deliberately short with the same probability.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from bertfast.data.shards import Shards

# A longer document is walked in stretches of this many sentences, so that one huge file cannot make endless rounds.
STRETCH_SENTENCES = 1024


@dataclass(frozen=True)
class Sampling:
    """How samples are cut from the corpus and masked.

    Attributes:
        max_seq_length: Longest sample in tokens, [CLS] and [SEP] included.
        objective: Sentence pairs for masked LM and next-sentence prediction; whole sentences for masked LM alone, or
            for a model that reads from left to right and predicts every next token (ltr).
        short_seq_probability: Share of the samples that aim at a random length from 2 tokens on.
        mlm_probability: Share of a sample's tokens that are to be predicted.
        mask_replace_prob: Share of those that [MASK] replaces.
        random_replace_prob: Share of those that a random token replaces; the rest stay as they are.
        whole_word: Mask all pieces of a word or none.
    """

    max_seq_length: int = 128
    objective: Literal["mlm+nsp", "mlm", "ltr"] = "mlm+nsp"
    short_seq_probability: float = 0.1
    mlm_probability: float = 0.15
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    whole_word: bool = False

    def __post_init__(self):
        if self.max_seq_length < 5:
            raise ValueError(f"max_seq_length must be at least 5 (a pair of tokens), got {self.max_seq_length}")
        if self.objective not in ("mlm+nsp", "mlm", "ltr"):
            raise ValueError(f'objective must be "mlm+nsp", "mlm" or "ltr", got {self.objective!r}')
        for name in ("short_seq_probability", "mlm_probability", "mask_replace_prob", "random_replace_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.mask_replace_prob + self.random_replace_prob > 1 + 1e-9:
            raise ValueError(
                "mask_replace_prob and random_replace_prob must add up to at most 1, "
                f"got {self.mask_replace_prob} and {self.random_replace_prob}"
            )

    @property
    def pairs(self) -> bool:
        """Whether a sample is a pair of segments, [CLS] A [SEP] B [SEP], and not one, [CLS] A [SEP]."""
        return self.objective == "mlm+nsp"

    @property
    def predicted_share(self) -> float:
        """Of a sample's tokens, how many are to be predicted at most."""
        return 1.0 if self.objective == "ltr" else self.mlm_probability

    @property
    def room(self) -> int:
        """Tokens of text that a sample has room for beside [CLS] and [SEP]."""
        return self.max_seq_length - (3 if self.pairs else 2)


class Outline(NamedTuple):
    """The corpus without its tokens; all parts count as laid end to end.

    Attributes:
        sentence_starts: int64 [sentences + 1], places of tokens.
        document_starts: int64 [documents + 1], sentences.
    """

    sentence_starts: np.ndarray
    document_starts: np.ndarray

    @classmethod
    def of(cls, shards: Shards) -> Outline:
        """The outline of all parts, in memory: 8 bytes a sentence."""
        parts = shards.parts
        return cls(
            _end_to_end([part.sentence_starts for part in parts]), _end_to_end([part.document_starts for part in parts])
        )


class Samples(NamedTuple):
    """Samples as places in the corpus, one a row: A is the first segment, B the second.

    Attributes:
        first_start: int64 [N], the place of A's first token.
        first_length: int32 [N], tokens.
        second_start: int64 [N], the same for B.
        second_length: int32 [N]; 0 where samples are not pairs.
        random_second: bool [N], whether B is from another document and does not follow A.
    """

    first_start: np.ndarray
    first_length: np.ndarray
    second_start: np.ndarray
    second_length: np.ndarray
    random_second: np.ndarray

    def take(self, rows) -> Samples:
        """The samples in `rows`, a slice or an array of indices."""
        return Samples(*(column[rows] for column in self))

    def lengths(self, sampling: Sampling) -> np.ndarray:
        """int64 [N]: tokens of each sample, [CLS] and [SEP] included."""
        special = sampling.max_seq_length - sampling.room
        return self.first_length.astype(np.int64) + self.second_length + special


def plan_samples(outline: Outline, sampling: Sampling, generator: np.random.Generator) -> Samples:
    """One epoch of samples in a random order; each document is in it from its first sentence to its last."""
    if outline.document_starts.size < 2:
        raise ValueError("the shards hold no text: there is nothing to make samples from")
    samples = (_pairs if sampling.pairs else _runs)(outline, sampling, generator)
    return samples.take(generator.permutation(samples.first_start.size))


def _pairs(outline: Outline, sampling: Sampling, generator: np.random.Generator) -> Samples:
    starts, document_starts = outline
    documents = document_starts.size - 1
    if documents < 2:
        raise ValueError(
            "next-sentence prediction wants at least two documents and the shards hold one: "
            "separate documents by a blank line, or choose the objective mlm"
        )
    document, sentence, stop = _stretches(document_starts)
    rounds = []
    while sentence.size:
        target = _targets(sentence.size, sampling, generator)
        end = np.minimum(np.searchsorted(starts, starts[sentence] + target), stop)
        split = sentence + 1 + generator.integers(0, np.maximum(end - sentence - 1, 1))

        # B of another document: from a random sentence on, as much as A leaves of the target, a sentence at least.
        random = (split == end) | (generator.random(sentence.size) < 0.5)
        other = generator.integers(0, documents - 1, sentence.size)
        other += other >= document
        other_sentence = generator.integers(document_starts[other], document_starts[other + 1])
        wanted = np.maximum(target - (starts[split] - starts[sentence]), 1)
        other_end = np.searchsorted(starts, starts[other_sentence] + wanted)
        other_end = np.minimum(other_end, document_starts[other + 1])

        first = starts[sentence]
        second = starts[np.where(random, other_sentence, split)]
        second_end = starts[np.where(random, other_end, end)]
        rounds.append((first, starts[split] - first, second, second_end - second, random))
        # What the true B would have been is put back, to be used next.
        sentence = np.where(random, split, end)
        left = sentence < stop
        document, sentence, stop = document[left], sentence[left], stop[left]
    return _cut_pairs(*map(np.concatenate, zip(*rounds, strict=True)), sampling.room, generator)


def _cut_pairs(first_start, first_length, second_start, second_length, random, room: int, generator) -> Samples:
    """Cut the longer segment, token by token at a random end, until both fit into `room` (here in closed form)."""
    first_kept = np.minimum(first_length, np.maximum((room + 1) // 2, room - second_length))
    second_kept = np.minimum(second_length, room - first_kept)
    first_start = first_start + generator.binomial(first_length - first_kept, 0.5)
    second_start = second_start + generator.binomial(second_length - second_kept, 0.5)
    return Samples(first_start, first_kept.astype(np.int32), second_start, second_kept.astype(np.int32), random)


def _runs(outline: Outline, sampling: Sampling, generator: np.random.Generator) -> Samples:
    """As many whole sentences of one document as the target holds; one that is too long goes on in the next sample."""
    starts, document_starts = outline
    _, sentence, stop = _stretches(document_starts)
    place, stop = starts[sentence], starts[stop]
    rounds = []
    while place.size:
        target = place + _targets(place.size, sampling, generator)
        last_whole = starts[np.searchsorted(starts, target, side="right") - 1]
        one_sentence = starts[np.searchsorted(starts, place, side="right")]
        end = np.minimum(np.maximum(last_whole, one_sentence), np.minimum(place + sampling.room, stop))
        rounds.append((place, end - place))
        left = end < stop
        place, stop = end[left], stop[left]
    start, length = map(np.concatenate, zip(*rounds, strict=True))
    nothing = np.zeros_like(length, np.int32)
    return Samples(start, length.astype(np.int32), start, nothing, nothing.astype(bool))


def _targets(count: int, sampling: Sampling, generator: np.random.Generator) -> np.ndarray:
    """int64 [count]: how many tokens of text each sample aims at."""
    short = generator.random(count) < sampling.short_seq_probability
    return np.where(short, generator.integers(2, sampling.room + 1, count), sampling.room)


def _stretches(document_starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, first sentence, sentence behind the last) of every stretch to be walked, all int64."""
    counts = -(-np.diff(document_starts) // STRETCH_SENTENCES)
    document = np.repeat(np.arange(counts.size), counts)
    within = np.arange(document.size) - np.repeat(np.cumsum(counts) - counts, counts)
    sentence = document_starts[document] + within * STRETCH_SENTENCES
    return document, sentence, np.minimum(sentence + STRETCH_SENTENCES, document_starts[document + 1])


def _end_to_end(starts: list[np.ndarray]) -> np.ndarray:
    """One array of starts from those of each part: the last entry of one is where the next begins."""
    ends = np.cumsum([0, *(int(part[-1]) for part in starts)])
    return np.concatenate([*(part[:-1] + end for part, end in zip(starts, ends, strict=False)), ends[-1:]])
