"""Metrics of SQuAD 1.1 and 2.0 (Rajpurkar et al., 2016, 2018), as the official evaluation scripts compute them.

Shapes: Q questions.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower-case `text`, and remove punctuation, articles and repeated white space."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_scores(answer: str, gold_answers: Sequence[str]) -> tuple[float, float]:
    """Return (exact match, F1 of words) of a predicted answer, each the maximum over the gold answers.

    A question without gold answers is unanswerable: the empty answer scores 1.
    """
    gold_answers = [gold for gold in gold_answers if normalize_answer(gold)] or [""]
    return max(_exact_match(answer, gold) for gold in gold_answers), max(_f1(answer, gold) for gold in gold_answers)


def mean_scores(scores: np.ndarray, unanswerable: np.ndarray) -> dict[str, float]:
    """Return the mean scores in percent; if there are unanswerable questions, also of both kinds separately.

    Args:
        scores: float64 [Q, 2], exact match and F1 of each question.
        unanswerable: bool [Q], whether each question has no answer.
    """
    means = {"exact_match": 100 * scores[:, 0].mean(), "f1": 100 * scores[:, 1].mean()}
    if unanswerable.any():
        for name, rows in (("HasAns", ~unanswerable), ("NoAns", unanswerable)):
            if rows.any():
                exact, f1 = 100 * scores[rows].mean(0)
                means |= {f"{name}_exact": exact, f"{name}_f1": f1}
    return means


def best_threshold(f1: np.ndarray, unanswerable: np.ndarray, score_differences: np.ndarray) -> dict[str, float]:
    """Return the no-answer threshold with the best mean F1, and that F1 in percent.

    Args:
        f1: float64 [Q], F1 of each question's best non-empty answer.
        unanswerable: bool [Q], whether each question has no answer.
        score_differences: float64 [Q], score of "no answer" minus that of the best answer. Questions whose difference
            exceeds the threshold are left unanswered.
    """
    order = np.argsort(score_differences, kind="stable")
    # Starting from no answer anywhere, which is right for all unanswerable questions, answer the questions in order of
    # rising difference: each gains its F1, or loses 1 if it is unanswerable. totals[i] is the sum after i answers.
    gains = np.where(unanswerable, -1.0, f1)[order]
    totals = unanswerable.sum() + np.concatenate([[0], np.cumsum(gains)])
    best = int(totals.argmax())
    threshold = score_differences[order[best - 1]] if best else score_differences.min() - 1
    return {"best_f1": 100 * totals[best] / len(f1), "best_f1_thresh": threshold}


def _exact_match(answer: str, gold: str) -> float:
    return float(normalize_answer(answer) == normalize_answer(gold))


def _f1(answer: str, gold: str) -> float:
    words, gold_words = normalize_answer(answer).split(), normalize_answer(gold).split()
    if not words or not gold_words:
        return float(words == gold_words)
    num_common = sum((Counter(words) & Counter(gold_words)).values())
    return 2 * num_common / (len(words) + len(gold_words))
