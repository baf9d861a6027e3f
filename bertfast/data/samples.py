"""Samples for pre-training: sentence pairs as in the BERT paper, or runs of whole sentences.

An epoch is planned at once with arrays, from the sentence and document boundaries alone: all documents are processed in
parallel, one sample per document and round, and no token is read. Follows section 3.1 and appendix A.2 of Devlin et
al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", and the script
`create_pretraining_data.py` released with it, except that short samples are drawn per sample, not per document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np

from bertfast.data.shards import Shards
from bertfast.runtime.settings import Fraction, Range, Settings, given, refuse_without_effect

# A longer document is processed in chunks of this many sentences, which bounds the number of rounds.
CHUNK_SENTENCES = 1024


@dataclass(frozen=True, kw_only=True)
class Sampling(Settings):
    """How samples are cut from the corpus and masked.

    Attributes:
        max_seq_length: Maximum sequence length in tokens, including [CLS] and [SEP]; a pair of one-token texts has 5.
        objective: mlm+nsp: masked LM and next-sentence prediction on sentence pairs; mlm: masked LM on runs of whole
            sentences; ltr: causal (left-to-right) LM on runs of whole sentences; auto: mlm+nsp for BERT, and mlm for
            families without a next-sentence head.
        short_seq_probability: Fraction of samples with a random target length of at least 2 tokens.
        mlm_probability: Fraction of a sample's tokens to predict.
        mask_replace_prob: Fraction of the tokens to predict that are replaced by [MASK].
        random_replace_prob: Fraction of the tokens to predict that are replaced by a random token; the rest are kept.
        whole_word: Mask either all pieces of a word or none.
    """

    max_seq_length: Annotated[int, Range(5)] = 128
    objective: Literal["auto", "mlm+nsp", "mlm", "ltr"] = "auto"
    short_seq_probability: Fraction = 0.1
    mlm_probability: Fraction = 0.15
    mask_replace_prob: Fraction = 0.8
    random_replace_prob: Fraction = 0.1
    whole_word: bool = False

    def validate(self) -> None:
        if self.objective == "ltr":
            masking = {"--mlm-probability", "--mask-replace-prob", "--random-replace-prob", "--whole-word"}
            refuse_without_effect(sorted(masking.intersection(given(self))), "--objective ltr masks no tokens")
        if self.mask_replace_prob + self.random_replace_prob > 1 + 1e-9:
            raise ValueError(
                "--mask-replace-prob and --random-replace-prob must add up to at most 1, "
                f"got {self.mask_replace_prob} and {self.random_replace_prob}"
            )

    @property
    def pairs(self) -> bool:
        """Whether samples are pairs of segments, [CLS] A [SEP] B [SEP], not single ones, [CLS] A [SEP]."""
        return self.objective in ("auto", "mlm+nsp")

    @property
    def max_predicted_share(self) -> float:
        """Largest fraction of a sample's tokens to predict."""
        return 1.0 if self.objective == "ltr" else self.mlm_probability

    @property
    def max_text_tokens(self) -> int:
        """Maximum number of a sample's tokens that are not [CLS] or [SEP]."""
        return self.max_seq_length - (3 if self.pairs else 2)


class CorpusBoundaries(NamedTuple):
    """Where sentences and documents start in the corpus, which is all parts of the shards end to end.

    Attributes:
        sentence_starts: int64 [sentences + 1], token positions; the last entry is the number of tokens.
        document_starts: int64 [documents + 1], sentence indices; the last entry is the number of sentences.
    """

    sentence_starts: np.ndarray
    document_starts: np.ndarray

    @classmethod
    def of(cls, shards: Shards) -> CorpusBoundaries:
        """Read the boundaries of all parts into memory, 8 bytes per sentence."""
        parts = shards.parts
        return cls(
            _end_to_end([part.sentence_starts for part in parts]), _end_to_end([part.document_starts for part in parts])
        )


class Samples(NamedTuple):
    """Samples as token ranges of the corpus, one per row: A is the first segment, B the second.

    Attributes:
        first_start: int64 [N], position of A's first token in the corpus.
        first_length: int32 [N], tokens of A.
        second_start: int64 [N], position of B's first token.
        second_length: int32 [N], tokens of B; 0 if samples are not pairs.
        random_second: bool [N], whether B is from another document or, if there is none, elsewhere; else B follows A.
    """

    first_start: np.ndarray
    first_length: np.ndarray
    second_start: np.ndarray
    second_length: np.ndarray
    random_second: np.ndarray

    def take(self, rows: slice | np.ndarray) -> Samples:
        """Return the samples in `rows`, a slice or an array of indices."""
        return Samples(*(column[rows] for column in self))

    def lengths(self, sampling: Sampling) -> np.ndarray:
        """Return the tokens of each sample, including [CLS] and [SEP], as int64 [N]."""
        special = sampling.max_seq_length - sampling.max_text_tokens
        lengths: np.ndarray = self.first_length.astype(np.int64) + self.second_length + special
        return lengths


def plan_samples(boundaries: CorpusBoundaries, sampling: Sampling, generator: np.random.Generator) -> Samples:
    """Plan one epoch: samples in random order that cover every document from its first sentence to its last.

    Args:
        boundaries: The sentences and documents of the corpus.
        sampling: How samples are cut.
        generator: Source of all randomness.

    Raises:
        ValueError: There is no text, or only one sentence for next-sentence prediction.
    """
    if boundaries.document_starts.size < 2:
        raise ValueError("the shards hold no text: run `bertfast prepare` on files with text")
    samples = (_pairs if sampling.pairs else _runs)(boundaries, sampling, generator)
    return samples.take(generator.permutation(samples.first_start.size))


def _pairs(boundaries: CorpusBoundaries, sampling: Sampling, generator: np.random.Generator) -> Samples:
    """Return sentence pairs, half of them with a random B; see `plan_samples`."""
    starts, document_starts = boundaries
    documents = document_starts.size - 1
    if starts.size < 3:
        raise ValueError(
            "next-sentence prediction requires at least two sentences and the shards hold one: use more text, or pass "
            "--objective mlm"
        )
    # One entry per chunk that is not used up: its document, its next sentence, and the sentence after its last.
    document, sentence, stop = _chunks(document_starts)
    rounds = []
    while sentence.size:
        # A pair takes sentences [sentence, end), as many as the target needs, and A ends before sentence `split`.
        target = _targets(sentence.size, sampling, generator)
        end = np.minimum(np.searchsorted(starts, starts[sentence] + target), stop)
        split = sentence + 1 + generator.integers(0, np.maximum(end - sentence - 1, 1))

        # Random B: starts at a random sentence of another document; as long as A leaves of the target, at least one
        # sentence. If there is no other document, at any sentence but the one that follows A.
        random = (split == end) | (generator.random(sentence.size) < 0.5)
        if documents == 1:
            other = document
            other_sentence = generator.integers(0, document_starts[1] - 1, sentence.size)
            other_sentence += other_sentence >= split
        else:
            other = generator.integers(0, documents - 1, sentence.size)
            other += other >= document  # uniform over all documents but `document`
            other_sentence = generator.integers(document_starts[other], document_starts[other + 1])
        remaining = np.maximum(target - (starts[split] - starts[sentence]), 1)
        other_end = np.searchsorted(starts, starts[other_sentence] + remaining)
        other_end = np.minimum(other_end, document_starts[other + 1])

        first = starts[sentence]
        second = starts[np.where(random, other_sentence, split)]
        second_end = starts[np.where(random, other_end, end)]
        rounds.append((first, starts[split] - first, second, second_end - second, random))
        # The sentences that a random B displaced are put back and start the next pair.
        sentence = np.where(random, split, end)
        unfinished = sentence < stop
        document, sentence, stop = document[unfinished], sentence[unfinished], stop[unfinished]
    pairs = map(np.concatenate, zip(*rounds, strict=True))
    return _cut_pairs(*pairs, max_tokens=sampling.max_text_tokens, generator=generator)


def _cut_pairs(
    first_start: np.ndarray,
    first_length: np.ndarray,
    second_start: np.ndarray,
    second_length: np.ndarray,
    random: np.ndarray,
    *,
    max_tokens: int,
    generator: np.random.Generator,
) -> Samples:
    """Truncate pairs to `max_tokens`: the longer segment loses one token at a random end until both fit.

    In closed form: the kept lengths are those of that loop, and the tokens cut at the front are binomially distributed.
    """
    first_kept = np.minimum(first_length, np.maximum((max_tokens + 1) // 2, max_tokens - second_length))
    second_kept = np.minimum(second_length, max_tokens - first_kept)
    first_start = first_start + generator.binomial(first_length - first_kept, 0.5)
    second_start = second_start + generator.binomial(second_length - second_kept, 0.5)
    return Samples(first_start, first_kept.astype(np.int32), second_start, second_kept.astype(np.int32), random)


def _runs(boundaries: CorpusBoundaries, sampling: Sampling, generator: np.random.Generator) -> Samples:
    """Return runs of whole sentences of one document up to the target; longer sentences continue in the next sample."""
    starts, document_starts = boundaries
    _, sentence, stop = _chunks(document_starts)
    # One entry per chunk that is not used up: the positions of its next token and of the token after its last.
    position, stop = starts[sentence], starts[stop]
    rounds = []
    while position.size:
        # `end` is the last sentence boundary up to the target, else that of the first sentence, cut to the maximum.
        target = position + _targets(position.size, sampling, generator)
        last_whole = starts[np.searchsorted(starts, target, side="right") - 1]
        one_sentence = starts[np.searchsorted(starts, position, side="right")]
        end = np.minimum(np.maximum(last_whole, one_sentence), np.minimum(position + sampling.max_text_tokens, stop))
        rounds.append((position, end - position))
        unfinished = end < stop
        position, stop = end[unfinished], stop[unfinished]
    start, length = map(np.concatenate, zip(*rounds, strict=True))
    nothing = np.zeros_like(length, np.int32)
    return Samples(start, length.astype(np.int32), start, nothing, nothing.astype(bool))


def _targets(count: int, sampling: Sampling, generator: np.random.Generator) -> np.ndarray:
    """Return the target length of each sample in tokens of text, int64 [count]."""
    short = generator.random(count) < sampling.short_seq_probability
    return np.where(short, generator.integers(2, sampling.max_text_tokens + 1, count), sampling.max_text_tokens)


def _chunks(document_starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (document, first sentence, sentence after the last) of every chunk, int64 arrays of the same size."""
    counts = -(-np.diff(document_starts) // CHUNK_SENTENCES)
    document = np.repeat(np.arange(counts.size), counts)
    # within: index of each chunk in its document.
    within = np.arange(document.size) - np.repeat(np.cumsum(counts) - counts, counts)
    sentence = document_starts[document] + within * CHUNK_SENTENCES
    return document, sentence, np.minimum(sentence + CHUNK_SENTENCES, document_starts[document + 1])


def _end_to_end(starts: list[np.ndarray]) -> np.ndarray:
    """Concatenate the starts of parts, shifted so that each part starts where the one before it ends."""
    ends = np.cumsum([0, *(int(part[-1]) for part in starts)])
    return np.concatenate([*(part[:-1] + end for part, end in zip(starts, ends, strict=False)), ends[-1:]])
