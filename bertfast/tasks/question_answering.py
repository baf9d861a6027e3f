"""Extractive question answering: SQuAD 1.1 and 2.0 (Rajpurkar et al., 2016, 2018) and files in their format.

A context that is too long for one sequence is split into overlapping windows, each with the question in front. Answers
are substrings of the context, character by character.

Shapes: W windows (one sequence each), T packed tokens.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from bertfast.data.tokenizer import special_tokens
from bertfast.encoder import question_answering_loss, span_logits
from bertfast.models.bert import BertForQuestionAnswering
from bertfast.runtime.atomic_write import write_atomically
from bertfast.tasks.features import Features, ModelInputs
from bertfast.tasks.rows import Rows
from bertfast.tasks.sequence_classification import softmax
from bertfast.tasks.settings import TaskSettings
from bertfast.tasks.squad_metrics import answer_scores, best_threshold, mean_scores
from bertfast.tasks.task import Outputs, Prediction, Task, json_lines

UNANSWERABLE = "unanswerable"  # entry of a model's configuration: whether it may predict that there is no answer
_LINE_EXAMPLE = '{"question": "…", "context": "…"}'


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        id: Identifier in the file.
        question: The question.
        context: The text that may contain the answer.
        answers: Gold answers as (text, start in the context in characters); empty: unknown, or unanswerable.
    """

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...] = ()


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


@dataclass(frozen=True, eq=False)
class Questions:
    """Questions and, after `featurize`, their windows.

    Attributes:
        questions: The questions.
        labelled: Whether the gold answers are known.
        rows: The rows that the questions come from; a question is a row.
        windows: One for each sequence of the features; those of a question are adjacent.
    """

    questions: list[Question]
    labelled: bool
    rows: Rows
    windows: list[Window] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.questions)


@dataclass(frozen=True)
class Candidate:
    """A candidate answer, empty for "no answer"; `start` is in characters."""

    text: str
    score: float
    start: int


class QuestionAnsweringTask(Task[Questions]):
    """Extractive question answering: the start and end of the answer in the context."""

    model_class = BertForQuestionAnswering
    head_prefix = "qa_outputs."
    metrics = ("f1", "exact_match")

    def __init__(self, settings: TaskSettings):
        super().__init__(settings)
        self.options = settings.question_answering

    def read(self, path: str, *, labelled: bool) -> Questions:
        """Read a file in SQuAD's format, optionally compressed by gzip; see `Task.read`."""
        questions, numbers, has_answers = [], [], labelled
        for row, (entry, context) in enumerate(_entries(Path(path)), 1):
            answers = tuple((answer["text"], answer["answer_start"]) for answer in entry.get("answers", []))
            misplaced = next((text for text, start in answers if context[start : start + len(text)] != text), None)
            if misplaced is not None:
                problem = f"the answer {misplaced!r} is not in the context at its answer_start"
                self.bad_rows.add(f"{path}, question {entry['id']}: {problem}", file=path, row=row, row_id=entry["id"])
            elif labelled and not answers and not entry.get("is_impossible"):
                problem = "there is no answer, but is_impossible is not true"
                self.bad_rows.add(f"{path}, question {entry['id']}: {problem}", file=path, row=row, row_id=entry["id"])
            else:
                has_answers |= bool(answers)
                questions.append(Question(entry["id"], entry["question"], context, answers))
                numbers.append(row)
        if not questions:
            raise ValueError(f"{path} has no usable questions")
        rows = Rows(path, numbers, None, [question.id for question in questions], self.bad_rows)
        return Questions(questions, has_answers, rows)

    def label_config(self, examples: Questions) -> dict[str, Any]:
        """Return whether there are unanswerable questions."""
        return {UNANSWERABLE: any(not question.answers for question in examples.questions)}

    def featurize(self, examples: Questions, tokenizer: Tokenizer, max_length: int) -> tuple[Questions, Features]:
        """Tokenize each window of each question as one sequence: [CLS] question [SEP] context [SEP].

        Returns:
            The questions with windows, and the features. Labels are the first and last token of the answer, int64 [W],
            or 0 ([CLS]) in windows that do not contain it whole.
        """
        texts = list(dict.fromkeys(text for q in examples.questions for text in (q.question, q.context)))
        encodings = dict(zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True))
        special = special_tokens(tokenizer)
        windows: list[Window] = []
        sequences: list[tuple[list[int], list[int]]] = []  # of each window: question and context, with special tokens
        answers: list[tuple[int, int]] = []
        for index, question in enumerate(examples.questions):
            max_query_length = min(self.options.max_query_length, max_length // 2)
            prefix = [special.cls, *encodings[question.question].ids[:max_query_length], special.sep]
            context = encodings[question.context]
            spans, added = self._windows(index, context, len(prefix), max_length)
            windows += added
            sequences += [(prefix, [*context.ids[first:last], special.sep]) for first, last in spans]
            gold = question.answers[0] if examples.labelled and question.answers else None
            answers += _answer_positions(gold, context, spans, len(prefix))
        labels = {}
        if examples.labelled:
            starts, ends = np.array(answers, np.int64).T
            labels = {"start_positions": starts, "end_positions": ends}
        # Both parts of all sequences in order, [2 W]; their types alternate.
        parts = [part for pair in sequences for part in pair]
        types = np.tile(np.array([0, 1], np.uint8), len(sequences))
        lengths = [len(first) + len(second) for first, second in sequences]
        features = Features(
            np.array([token for part in parts for token in part], np.int32),
            np.repeat(types, [len(part) for part in parts]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            labels=labels,
        )
        return replace(examples, windows=windows), features

    def logits(self, model: PreTrainedModel, inputs: ModelInputs) -> Tensor:
        """Compute start and end logits [1, T, 2]."""
        return span_logits(model, inputs.packed(model))[None]

    def loss(self, model: PreTrainedModel, inputs: ModelInputs, items: Tensor) -> Tensor:
        """Compute the mean of the cross-entropies of start and end."""
        starts, ends = inputs.arguments["start_positions"], inputs.arguments["end_positions"]
        return question_answering_loss(model, inputs.packed(model), starts, ends, items)

    def predictions(self, examples: Questions, features: Features, outputs: Outputs) -> Iterator[Prediction]:
        """Yield {"answer", "score", "start"}: the text ("" for no answer), its probability among the n best, and its
        start in characters."""
        for best, null in self._candidates(examples, outputs):
            considered = [*best, *([null] if self._may_abstain else [])]
            probabilities = softmax(np.array([candidate.score for candidate in considered]))
            answer, index = self._choose(best, null)
            yield {"answer": answer.text, "score": float(probabilities[index]), "start": answer.start}

    def compute_metrics(self, examples: Questions, features: Features, outputs: Outputs) -> dict[str, float]:
        """Compute exact_match and f1 in percent; if there are unanswerable questions, also HasAns_*, NoAns_* and the
        best threshold on the no-answer score."""
        if not examples.labelled:
            return {}
        candidates = list(self._candidates(examples, outputs))
        gold = [[text for text, _ in question.answers] for question in examples.questions]
        chosen = [self._choose(best, null)[0].text for best, null in candidates]
        scores = np.array([answer_scores(text, answers) for text, answers in zip(chosen, gold, strict=True)])
        unanswerable = np.array([not answers for answers in gold])
        values = mean_scores(scores, unanswerable)
        if unanswerable.any():
            pairs = zip(candidates, gold, strict=True)
            best_f1 = np.array([answer_scores(best[0].text, answers)[1] for (best, _), answers in pairs])
            differences = np.array([null.score - best[0].score for best, null in candidates])
            values |= best_threshold(best_f1, unanswerable, differences)
        return {name: float(value) for name, value in values.items()}

    def write_predictions(
        self, folder: Path, split: str, examples: Questions, features: Features, outputs: Outputs
    ) -> None:
        """Write predictions_SPLIT.json for the official scripts, nbest_SPLIT.json and, if the model may predict no
        answer, null_odds_SPLIT.json."""
        answers, n_best, null_odds = {}, {}, {}
        for question, (best, null) in zip(examples.questions, self._candidates(examples, outputs), strict=True):
            answers[question.id] = self._choose(best, null)[0].text
            considered = [*best, *([null] if self._may_abstain else [])]
            considered.sort(key=lambda candidate: -candidate.score)
            probabilities = softmax(np.array([candidate.score for candidate in considered]))
            n_best[question.id] = [
                {"text": candidate.text, "probability": float(p), "score": candidate.score, "start": candidate.start}
                for candidate, p in zip(considered, probabilities, strict=True)
            ]
            null_odds[question.id] = null.score - best[0].score
        files = {"predictions": answers, "nbest": n_best} | ({"null_odds": null_odds} if self._may_abstain else {})
        for name, values in files.items():
            text = json.dumps(values, ensure_ascii=False, indent=1) + "\n"
            write_atomically(folder / f"{name}_{split}.json", text)

    def parse_lines(self, lines: Sequence[str], first_row: int = 1) -> Questions:
        """Parse one JSON object per line."""
        required = ("question", str), ("context", str)
        entries, rows = json_lines(lines, first_row, _LINE_EXAMPLE, self.bad_rows, *required)
        numbered = zip(rows.numbers, entries, strict=True)
        return Questions(
            [Question(str(row), entry["question"], entry["context"]) for row, entry in numbered], False, rows
        )

    @property
    def _may_abstain(self) -> bool:
        return bool(getattr(self.config, UNANSWERABLE, False))

    def _windows(
        self, question: int, context: Encoding, prefix: int, max_length: int
    ) -> tuple[list[tuple[int, int]], list[Window]]:
        """Return the windows of one question's context, as (first, end) tokens and as `Window`."""
        offsets = np.array(context.offsets, np.int64).reshape(-1, 2)
        room = max_length - prefix - 1  # for tokens of the context, before the last [SEP]
        spans = _window_spans(len(offsets), room, min(self.options.doc_stride, room))
        best = _max_context_windows(spans, len(offsets))
        windows = [
            Window(question, prefix, offsets[first:last], best[first:last] == index)
            for index, (first, last) in enumerate(spans)
        ]
        return spans, windows

    def _choose(self, best: list[Candidate], null: Candidate) -> tuple[Candidate, int]:
        """Return the predicted answer and its index in [*best, null]."""
        if self._may_abstain and null.score - best[0].score > self.options.null_score_diff_threshold:
            return null, len(best)
        return best[0], 0

    def _candidates(self, examples: Questions, outputs: Outputs) -> Iterator[tuple[list[Candidate], Candidate]]:
        """Yield the n best answers of each question, best first, and the candidate "no answer"."""
        # Windows of a question are adjacent: bounds[q] to bounds[q + 1] are those of question q.
        of_window = [window.question for window in examples.windows]
        bounds = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(of_window)) if a != b), len(of_window)]
        for question, (first, last) in zip(examples.questions, pairwise(bounds), strict=True):
            candidates, null_score = [], np.inf
            for window, logits in zip(examples.windows[first:last], outputs[first:last], strict=True):
                null_score = min(null_score, float(logits[0].sum()))  # [CLS]
                candidates += self._candidates_of_window(window, logits, question.context)
            candidates.sort(key=lambda candidate: -candidate.score)
            distinct = {candidate.text: candidate for candidate in reversed(candidates)}  # best-scored of each text
            best = sorted(distinct.values(), key=lambda candidate: -candidate.score)[: self.options.n_best]
            yield best or [Candidate("", null_score, 0)], Candidate("", null_score, 0)

    def _candidates_of_window(self, window: Window, logits: np.ndarray, context: str) -> list[Candidate]:
        """Return the n best answers of one window.

        Args:
            window: The window, of n context tokens.
            logits: float32 [tokens of the sequence, 2].
            context: The whole context.
        """
        start, end = logits[window.prefix : window.prefix + len(window.offsets)].astype(np.float64).T
        starts = np.argsort(-np.where(window.max_context, start, -np.inf), kind="stable")[: self.options.n_best]
        ends = np.argsort(-end, kind="stable")[: self.options.n_best]
        # Score matrix [starts, ends], -inf where the span is empty, too long, or has more context in another window.
        lengths = ends[None] - starts[:, None] + 1
        valid = (lengths > 0) & (lengths <= self.options.max_answer_length) & window.max_context[starts][:, None]
        scores = np.where(valid, start[starts][:, None] + end[ends][None], -np.inf)
        order = np.argsort(-scores, axis=None, kind="stable")[: self.options.n_best]
        candidates = []
        for i, j in zip(*np.unravel_index(order, scores.shape), strict=True):
            if np.isfinite(scores[i, j]):
                first, last = int(window.offsets[starts[i], 0]), int(window.offsets[ends[j], 1])
                candidates.append(Candidate(context[first:last], float(scores[i, j]), first))
        return candidates


def _entries(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (entry of `qas`, context) of a file in SQuAD's format."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            data = json.load(file)["data"]
        for article in data:
            for paragraph in article["paragraphs"]:
                for entry in paragraph["qas"]:
                    yield entry, paragraph["context"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not in SQuAD's format, {{'data': [{{'paragraphs': …}}]}}: {error!r}") from None


def _window_spans(num_tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
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


def _max_context_windows(spans: list[tuple[int, int]], num_tokens: int) -> np.ndarray:
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


def _answer_positions(
    answer: tuple[str, int] | None, context: Encoding, spans: list[tuple[int, int]], prefix: int
) -> list[tuple[int, int]]:
    """Return the answer's first and last position in each window's sequence, (0, 0) if it is not whole in it."""
    offsets = np.array(context.offsets, np.int64).reshape(-1, 2)
    tokens = None if answer is None else _token_span(offsets, answer)
    if tokens is None:
        return [(0, 0)] * len(spans)
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
