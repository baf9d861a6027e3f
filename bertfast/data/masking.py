"""Which tokens of a sample are hidden from the model, and behind what."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bertfast.data.samples import Sampling
from bertfast.data.tokenizer import SpecialTokens

# Philox makes four 64-bit numbers a count; a sample's numbers start on a count of its own.
PHILOX_BLOCK = 4


class Masked(NamedTuple):
    """What masking makes of packed samples of T tokens.

    Attributes:
        token_ids: int64 [T], what the model sees.
        rows: int64 [M], the places that it is asked about, ascending.
        labels: int64 [M], the original tokens there.
    """

    token_ids: np.ndarray
    rows: np.ndarray
    labels: np.ndarray


def mask_counts(maskable: np.ndarray, sampling: Sampling) -> np.ndarray:
    """int64: how many of so many maskable tokens are masked, the rounded share and at least one of any.

    Left to right, all of them and [SEP] are to be predicted.
    """
    if sampling.objective == "ltr":
        return maskable + 1
    counts = np.rint(sampling.mlm_probability * maskable).astype(np.int64)
    return np.minimum(np.maximum(counts, 1), maskable)


class Masker:
    """Masks packed samples; what happens to a sample follows from the seed and the sample's number alone.

    Args:
        special: Ids that are never put in a masked token's place; [CLS] and [SEP] are never masked either.
        continuation: bool [V], the tokens that go on with a word ("##…").
    """

    def __init__(self, special: SpecialTokens, continuation: np.ndarray, sampling: Sampling, seed: int):
        self.special, self.continuation, self.sampling, self.seed = special, continuation, sampling, seed
        special_ids = [special.pad, special.unk, special.cls, special.sep, special.mask]
        self.ordinary = np.setdiff1d(np.arange(len(continuation)), special_ids)

    def __call__(self, token_ids: np.ndarray, lengths: np.ndarray, first_number: int) -> Masked:
        """Mask samples of `lengths` [S], numbered from `first_number` on, that lie end to end in `token_ids` int64 [T].

        A masked token becomes [MASK], a random ordinary token or stays. With whole words, a word that no longer fits
        into the number to be masked is left alone, so that there may be fewer; a lone one that is too long is cut. Left
        to right nothing is hidden, and every place but a sample's last is asked about the token behind it.
        """
        if self.sampling.objective == "ltr":
            rows = np.setdiff1d(np.arange(len(token_ids)), np.cumsum(lengths) - 1)
            return Masked(token_ids, rows, token_ids[rows + 1])
        present = np.arange(lengths.max(initial=0)) < lengths[:, None]  # [S, L]
        maskable = np.zeros_like(present)
        maskable[present] = (token_ids != self.special.cls) & (token_ids != self.special.sep)
        counts = mask_counts(maskable.sum(1), self.sampling)

        order = self._draw(0, first_number, present.shape)
        if self.sampling.whole_word:
            order = self._by_word(order, maskable, counts, token_ids, present)
        columns, chosen = _smallest(np.where(maskable, order, np.inf), counts)
        if self.sampling.whole_word:
            chosen = _without_cut_word(np.take_along_axis(order, columns, 1), chosen, counts)

        hidden = np.zeros_like(present)
        np.put_along_axis(hidden, columns, chosen, 1)
        rows = hidden[present].nonzero()[0]
        labels = token_ids[rows]
        return Masked(self._replaced(token_ids, rows, self._draw(1, first_number, present.shape)[hidden]), rows, labels)

    def _draw(self, stream: int, first_number: int, shape: tuple[int, int]) -> np.ndarray:
        """float64 [S, L] in [0, 1): a row a sample, found by the sample's number in a Philox stream of the seed."""
        blocks = -(-self.sampling.max_seq_length // PHILOX_BLOCK)
        philox = np.random.Philox(key=[self.seed, stream], counter=first_number * blocks)
        return np.random.Generator(philox).random((shape[0], blocks * PHILOX_BLOCK))[:, : shape[1]]

    def _replaced(self, token_ids: np.ndarray, rows: np.ndarray, fate: np.ndarray) -> np.ndarray:
        """`token_ids` with [MASK] in `rows` of the lowest `fate`, random tokens in those of the next."""
        sampling, result = self.sampling, token_ids.copy()
        # What lies within the random share of [0, 1) is, stretched, the choice of the random token as well.
        random = (fate - sampling.mask_replace_prob) / max(sampling.random_replace_prob, 1e-9)
        result[rows[random < 0]] = self.special.mask
        drawn = (random >= 0) & (random < 1)
        result[rows[drawn]] = self.ordinary[(random[drawn] * self.ordinary.size).astype(np.int64)]
        return result

    def _by_word(self, order, maskable, counts, token_ids, present) -> np.ndarray:
        """`order` [S, L] with one number for all tokens of a word; words longer than their sample's count come last."""
        goes_on = np.zeros_like(present)
        goes_on[present] = self.continuation[token_ids]
        goes_on[:, 1:] &= maskable[:, :-1]  # behind [CLS] or [SEP] a word begins
        word_start = np.maximum.accumulate(np.where(goes_on, 0, np.arange(present.shape[1])), 1)
        flat = np.arange(len(order))[:, None] * present.shape[1] + word_start
        too_long = np.bincount(flat.ravel(), minlength=flat.size)[flat] > counts[:, None]
        return np.take_along_axis(order, word_start, 1) + too_long


def _smallest(order: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each row's `counts` [S] smallest stand: (columns [S, K + 1] by rising `order`, chosen bool [S, K + 1]).

    K is the largest count, so the column behind a row's last chosen one is always there.
    """
    columns = np.argsort(order, axis=1, kind="stable")[:, : counts.max(initial=0) + 1]
    return columns, np.arange(columns.shape[1]) < counts[:, None]


def _without_cut_word(order: np.ndarray, chosen: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`chosen` [S, K + 1] without the word that goes on behind the last chosen token, unless it is the only one."""
    cut = order == np.take_along_axis(order, counts[:, None], 1)
    return chosen & ~(cut & ~cut[:, :1])
