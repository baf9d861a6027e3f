"""Masking for masked-LM training: which tokens of a sample are predicted, and what replaces them in the input."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bertfast.data.samples import Sampling
from bertfast.data.special_tokens import SpecialTokens

# Philox generates four 64-bit numbers per counter value; each sample's numbers start at a counter value of its own.
PHILOX_BLOCK = 4


class Masked(NamedTuple):
    """Packed samples of T tokens after masking.

    Attributes:
        token_ids: int64 [T], the input of the model.
        rows: int64 [M], the positions to be predicted, ascending.
        labels: int64 [M], the token ids to be predicted there.
    """

    token_ids: np.ndarray
    rows: np.ndarray
    labels: np.ndarray


def mask_counts(maskable: NDArray[np.int64], sampling: Sampling) -> NDArray[np.int64]:
    """Return how many tokens of each sample are to be predicted.

    Args:
        maskable: int64 [N], tokens of each sample that may be masked, which are all but [CLS] and [SEP].
        sampling: Objective and masking probability.

    Returns:
        int64 [N]. Masked LM: the rounded share of `maskable`, at least 1 unless `maskable` is 0. Causal LM: all tokens
        that follow another one, which are `maskable` and [SEP].
    """
    if sampling.objective == "ltr":
        return maskable + 1
    rounded = np.rint(sampling.mlm_probability * maskable).astype(np.int64)
    counts: NDArray[np.int64] = np.minimum(np.maximum(rounded, 1), maskable)
    return counts


class Masker:
    """Mask packed samples, each as a pure function of its tokens, the seed and the sample's number.

    Args:
        special: Special tokens, which never replace a masked token; [CLS] and [SEP] are never masked.
        continuation: bool [V], True for tokens that continue a word ("##…").
        sampling: Masking probabilities and objective.
        seed: Key of the random number generator.
    """

    def __init__(self, special: SpecialTokens, continuation: np.ndarray, sampling: Sampling, seed: int):
        self.special, self.continuation, self.sampling, self.seed = special, continuation, sampling, seed
        special_ids = [special.pad, special.cls, special.sep, special.mask]
        special_ids += [] if special.unk is None else [special.unk]
        self.replacements = np.setdiff1d(np.arange(len(continuation)), special_ids)

    def __call__(self, token_ids: np.ndarray, lengths: np.ndarray, first_number: int) -> Masked:
        """Mask samples that lie end to end.

        A masked token is replaced by [MASK] or by a random token that is not special, or kept. With whole-word masking,
        a word that would exceed the number of tokens to mask is skipped, so fewer may be masked; if every word of a
        sample is too long, one is masked in part. For causal LM nothing is replaced, and every token but a sample's
        last predicts its successor.

        Args:
            token_ids: int64 [T], the tokens of all samples.
            lengths: int64 [S], the length of each sample.
            first_number: Number of the first sample; the others follow.
        """
        if self.sampling.objective == "ltr":
            rows = np.setdiff1d(np.arange(len(token_ids)), np.cumsum(lengths) - 1)
            return Masked(token_ids, rows, token_ids[rows + 1])
        # The samples as a padded matrix [S, L]: `present` marks its tokens, so matrix[present] is packed order.
        present = np.arange(lengths.max(initial=0)) < lengths[:, None]
        maskable = np.zeros_like(present)
        maskable[present] = (token_ids != self.special.cls) & (token_ids != self.special.sep)
        counts = mask_counts(maskable.sum(1), self.sampling)

        # The tokens of a sample with the smallest random numbers are masked.
        order = self._draw(0, first_number, present.shape)
        if self.sampling.whole_word:
            order = self._by_word(order, maskable, counts, token_ids, present)
        columns, selected = _smallest(np.where(maskable, order, np.inf), counts)
        if self.sampling.whole_word:
            selected = _without_cut_word(np.take_along_axis(order, columns, 1), selected, counts)

        masked = np.zeros_like(present)
        np.put_along_axis(masked, columns, selected, 1)
        rows = masked[present].nonzero()[0]
        uniform = self._draw(1, first_number, present.shape)[masked]
        return Masked(self._replaced(token_ids, rows, uniform), rows, token_ids[rows])

    def _draw(self, stream: int, first_number: int, shape: tuple[int, int]) -> np.ndarray:
        """Return float64 [S, L] in [0, 1), one row per sample, which depends on (seed, stream, sample number) alone."""
        blocks = -(-self.sampling.max_seq_length // PHILOX_BLOCK)
        philox = np.random.Philox(key=[self.seed, stream], counter=first_number * blocks)
        return np.random.Generator(philox).random((shape[0], blocks * PHILOX_BLOCK))[:, : shape[1]]

    def _replaced(self, token_ids: np.ndarray, rows: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Return `token_ids` with the tokens at `rows` replaced by [MASK], by a random token or not at all.

        `uniform` float64 [M] in [0, 1) decides: below mask_replace_prob, [MASK]; in the next interval, of length
        random_replace_prob, a random token.
        """
        sampling, result = self.sampling, token_ids.copy()
        # That interval rescaled to [0, 1): the same number also selects the random token.
        random = (uniform - sampling.mask_replace_prob) / max(sampling.random_replace_prob, 1e-9)
        result[rows[random < 0]] = self.special.mask
        drawn = (random >= 0) & (random < 1)
        result[rows[drawn]] = self.replacements[(random[drawn] * self.replacements.size).astype(np.int64)]
        return result

    def _by_word(
        self,
        order: NDArray[np.float64],
        maskable: np.ndarray,
        counts: np.ndarray,
        token_ids: np.ndarray,
        present: np.ndarray,
    ) -> NDArray[np.float64]:
        """Return `order` [S, L] with one number per word, in [1, 2) for words longer than their sample's count."""
        continues = np.zeros_like(present)
        continues[present] = self.continuation[token_ids]
        continues[:, 1:] &= maskable[:, :-1]  # a word starts after [CLS] or [SEP], even if a cut left only its tail
        # word_start[s, i]: column where the word of token i starts, as a running maximum of the columns that start one.
        word_start = np.maximum.accumulate(np.where(continues, 0, np.arange(present.shape[1])), 1)
        flat = np.arange(len(order))[:, None] * present.shape[1] + word_start
        too_long: NDArray[np.bool] = np.bincount(flat.ravel(), minlength=flat.size)[flat] > counts[:, None]
        return np.take_along_axis(order, word_start, 1) + too_long


def _smallest(order: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the `counts` [S] smallest entries of each row of `order` [S, L].

    Returns:
        Columns [S, K + 1] in ascending order of their entries, and bool [S, K + 1], which of them are selected. K is
        the largest count, so the entry after a row's last selected one is always included.
    """
    columns = np.argsort(order, axis=1, kind="stable")[:, : counts.max(initial=0) + 1]
    return columns, np.arange(columns.shape[1]) < counts[:, None]


def _without_cut_word(order: np.ndarray, selected: NDArray[np.bool], counts: np.ndarray) -> NDArray[np.bool]:
    """Return `selected` [S, K + 1] without a last word of which only a part is selected, unless it is the only word."""
    # Tokens of one word have the same order, so the last word is cut if the entry after the selected ones has it too.
    cut: NDArray[np.bool] = order == np.take_along_axis(order, counts[:, None], 1)
    return selected & ~(cut & ~cut[:, :1])
