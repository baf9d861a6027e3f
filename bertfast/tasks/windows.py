"""Windows of contexts that are too long for one sequence, each with the question in front, and answers in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from bertfast.models.tokenizers import Template, without_spaces
from bertfast.ops.reference import IGNORE_INDEX
from bertfast.tasks.settings import QuestionAnsweringSettings
from bertfast.tasks.squad import Question

_QUERY_LENGTH, _STRIDE = 64, 128  # tokens, as in BERT's code for SQuAD; less in short sequences
_QUESTIONS_PER_BATCH = 2000  # tokenized at a time, which bounds memory; a context's tokens are shared within a batch


@dataclass(frozen=True, eq=False)
class Window:
    """The part of a context that one sequence contains.

    Attributes:
        question: Index of its question.
        prefix: Number of tokens before the context: [CLS], the question and [SEP].
        offsets: int64 [n, 2], start and end in characters of each of the n context tokens.
        max_context: bool [n], whether no other window has more context around a token (SQuAD's "max context").
    """

    question: int
    prefix: int
    offsets: np.ndarray
    max_context: np.ndarray


class Tokens(NamedTuple):
    """Token ids, int32 [n], and their start and end in characters, int64 [n, 2]."""

    ids: np.ndarray
    offsets: np.ndarray


def window_sizes(options: QuestionAnsweringSettings, max_length: int, special: Template) -> tuple[int, int]:
    """Return the maximum tokens of a question, and the tokens between the starts of two windows.

    Args:
        options: Settings of question answering.
        max_length: Maximum tokens of a sequence.
        special: The tokenizer's special tokens.

    Raises:
        ValueError: A setting that was given does not fit into a sequence.
    """
    half = max_length // 2
    # Room for the context after a question of one token.
    room = max_length - len(special.start) - 1 - len(special.middle) - len(special.end_of_pair)
    for name, value, limit in (
        ("--max-query-length", options.max_query_length, half),
        ("--doc-stride", options.doc_stride, room),
    ):
        if value is not None and value > limit:
            raise ValueError(f"{name} must be at most {limit} in sequences of {max_length} tokens, got {value}")
    query = min(_QUERY_LENGTH, half) if options.max_query_length is None else options.max_query_length
    return query, min(_STRIDE, room) if options.doc_stride is None else options.doc_stride


def tokenized(questions: list[Question], tokenizer: Tokenizer) -> Iterator[tuple[Question, Tokens, Tokens]]:
    """Yield each question with the tokens of the question and of its context."""
    for start in range(0, len(questions), _QUESTIONS_PER_BATCH):
        batch = questions[start : start + _QUESTIONS_PER_BATCH]
        texts = list(dict.fromkeys(text for one in batch for text in (one.question, one.context)))
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        tokens = {
            text: Tokens(np.array(encoding.ids, np.int32), without_spaces(text, encoding.offsets))
            for text, encoding in zip(texts, encodings, strict=True)
        }
        yield from ((one, tokens[one.question], tokens[one.context]) for one in batch)


def window_spans(num_tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Return (first, end) tokens, end exclusive, of the windows of a context of `num_tokens` tokens.

    Args:
        num_tokens: Length of the context.
        room: Context tokens that fit into a window.
        stride: Tokens between the starts of two windows.
    """
    if room < 1:
        raise ValueError("--max-seq-length leaves no room for a context after the question: increase it")
    spans, first = [], 0
    while True:
        last = min(first + room, num_tokens)
        spans.append((first, last))
        if last == num_tokens:
            return spans
        first += stride


def max_context_windows(spans: list[tuple[int, int]], num_tokens: int) -> np.ndarray:
    """Return int64 [num_tokens]: the window in which each token has the most context on its shorter side.

    As in SQuAD's reference code, longer windows win ties by a bonus of 0.01 per token.
    """
    positions = np.arange(num_tokens)
    context_sizes = [
        np.where(
            (positions >= first) & (positions < last),
            np.minimum(positions - first, last - 1 - positions) + 0.01 * (last - first),
            -np.inf,
        )
        for first, last in spans
    ]
    windows: np.ndarray = np.argmax(context_sizes, axis=0)
    return windows


def answer_positions(
    answer: tuple[str, int] | None, offsets: np.ndarray, spans: list[tuple[int, int]], prefix: int
) -> list[tuple[int, int]]:
    """Return the answer's first and last position in each window's sequence, (0, 0) if it is not whole in it.

    Args:
        answer: Text and start in characters; None: there is no answer.
        offsets: int64 [n, 2], start and end in characters of the context's tokens.
        spans: First and end token of each window.
        prefix: Tokens before the context.
    """
    if answer is None:
        return [(0, 0)] * len(spans)
    tokens = _token_span(offsets, answer)
    if tokens is None:  # such as an answer of control characters
        return [(IGNORE_INDEX, IGNORE_INDEX)] * len(spans)
    start, end = tokens
    return [
        (start - first + prefix, end - first + prefix) if first <= start and end < last else (0, 0)
        for first, last in spans
    ]


def _token_span(offsets: np.ndarray, answer: tuple[str, int]) -> tuple[int, int] | None:
    """Return the first and last token that overlap an answer (text, start in characters); None if none does."""
    text, start = answer
    overlapping = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < start + len(text)))
    return (int(overlapping[0]), int(overlapping[-1])) if overlapping.size else None
