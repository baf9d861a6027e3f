"""Extractive question answering: SQuAD 1.1 and 2.0 (Rajpurkar et al., 2016, 2018) and files in their format.

A context that is too long for one sequence is split into overlapping windows, each with the question in front. Answers
are substrings of the context, character by character.

Shapes: W windows (one sequence each), T packed tokens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from bertfast.encoder import question_answering_loss, span_logits
from bertfast.models.bert import BertForQuestionAnswering
from bertfast.models.tokenizers import template
from bertfast.runtime.atomic_write import write_atomically
from bertfast.runtime.settings import counted, flag, hints_of
from bertfast.tasks import metrics as task_metrics
from bertfast.tasks.features import Features, ModelInputs
from bertfast.tasks.rows import Rows, Skipped
from bertfast.tasks.sequence_classification import softmax
from bertfast.tasks.settings import QuestionAnsweringSettings, TaskSettings
from bertfast.tasks.squad import LINE_EXAMPLE, Question, read_questions
from bertfast.tasks.squad_metrics import answer_scores, best_threshold, mean_scores
from bertfast.tasks.task import ROWS_PER_CHUNK, Outputs, Prediction, Task, json_lines
from bertfast.tasks.windows import Window, answer_positions, max_context_windows, tokenized, window_sizes, window_spans

UNANSWERABLE = "unanswerable"  # entry of a model's configuration: whether it may predict that there is no answer

logger = logging.getLogger("bertfast")


@dataclass(frozen=True, eq=False)
class Questions:
    """Questions and, after `featurize`, their windows.

    Attributes:
        questions: The questions.
        rows: Where each question comes from.
        labelled: Whether the gold answers are known.
        windows: One for each sequence of the features; those of a question are adjacent.
    """

    questions: list[Question]
    rows: Rows
    labelled: bool
    windows: list[Window] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.questions)

    def select(self, indices: Sequence[int]) -> Questions:
        """Return the questions at `indices`, not yet tokenized."""
        return Questions([self.questions[i] for i in indices], self.rows.select(indices), self.labelled)


@dataclass(frozen=True)
class Candidate:
    """A candidate answer, empty for "no answer"; `start` is in characters."""

    text: str
    score: float
    start: int


class QuestionAnsweringTask(Task[Questions]):
    """Extractive question answering: the start and end of the answer in the context."""

    model_class = BertForQuestionAnswering
    logits_per_token = True
    flags = frozenset(map(flag, hints_of(QuestionAnsweringSettings)))
    metrics = ("f1", "exact_match", "loss")

    def __init__(self, settings: TaskSettings):
        super().__init__(settings)
        self.options = settings.question_answering

    def read(self, path: str, *, labelled: bool) -> Questions:
        """Read a file of questions; see `bertfast.tasks.squad` for its formats, and `Task.read`."""
        file = read_questions(Path(path), self.bad_rows, labelled=labelled)
        if not file.questions:
            raise ValueError(f"{path} has no usable questions")
        if file.no_metrics is not None:
            logger.warning("no metrics, as %s", file.no_metrics)
        return Questions(file.questions, file.rows, file.labelled)

    def read_chunks(self, path: str) -> Iterator[Questions]:
        """Yield the questions of a file in parts; see `Task.read_chunks`."""
        questions, rows, *_ = read_questions(Path(path), self.bad_rows, labelled=False)
        if not questions and path not in self.bad_rows.skipped:
            raise ValueError(f"{path} holds no questions")
        for start in range(0, max(len(questions), 1), ROWS_PER_CHUNK):
            part = range(len(questions))[start : start + ROWS_PER_CHUNK]
            yield Questions(questions, rows, False).select(part)

    def label_config(self, examples: Questions) -> dict[str, Any]:
        """Return whether there are unanswerable questions."""
        if not any(question.answers for question in examples.questions):
            raise ValueError(f"no question in {examples.rows.file} has an answer, so there is nothing to learn")
        return {UNANSWERABLE: any(not question.answers for question in examples.questions)}

    def featurize(self, examples: Questions, tokenizer: Tokenizer, max_length: int) -> tuple[Questions, Features]:
        """Tokenize each window of each question as one sequence: [CLS] question [SEP] context [SEP].

        Returns:
            The questions with windows, and the features. Labels are the first and last token of the answer, int64 [W],
            or 0 ([CLS]) in windows that do not contain it whole; -100 if the answer has no tokens.
        """
        special = template(tokenizer)
        max_query_length, stride = window_sizes(self.options, max_length, special)
        windows: list[Window] = []
        parts: list[np.ndarray] = []  # token ids of each window's question and context, with special tokens
        answers: list[tuple[int, int]] = []
        num_cut = num_not_whole = num_adjoining = 0
        for index, (question, query, context) in enumerate(tokenized(examples.questions, tokenizer)):
            num_cut += len(query.ids) > max_query_length
            prefix = np.array([*special.start, *query.ids[:max_query_length], *special.middle], np.int32)
            room = max_length - len(prefix) - len(special.end_of_pair)
            spans, added = _windows(index, context.offsets, len(prefix), room, stride)
            windows += added
            num_adjoining += len(spans) > 1 and room < stride
            for first, last in spans:
                parts += [prefix, np.array([*context.ids[first:last], *special.end_of_pair], np.int32)]
            gold = question.answers[0] if examples.labelled and question.answers else None
            positions = answer_positions(gold, context.offsets, spans, len(prefix))
            num_not_whole += gold is not None and not any(start > 0 for start, _ in positions)
            answers += positions
        if num_cut:
            logger.warning("cut %s to %d tokens (--max-query-length)", counted(num_cut, "question"), max_query_length)
        if num_adjoining:
            logger.warning(
                "split %s into windows that do not overlap, as a window has room for fewer tokens than --doc-stride "
                "%d: lower it",
                counted(num_adjoining, "context"),
                stride,
            )
        if num_not_whole:
            logger.warning("no window has the whole of %s: raise --max-seq-length", counted(num_not_whole, "answer"))
        labels = {}
        if examples.labelled:
            starts, ends = np.array(answers, np.int64).T
            labels = {"start_positions": starts, "end_positions": ends}
        lengths = np.array([len(part) for part in parts], np.int64)
        features = Features(
            np.concatenate(parts),
            np.repeat(np.tile(np.array([0, 1], np.uint8), len(windows)), lengths),
            np.concatenate([[0], np.cumsum(lengths)[1::2]]).astype(np.int64),
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

    def texts(self, examples: Questions) -> Iterator[dict[str, str]]:
        """Yield {"question", "context"}."""
        for question in examples.questions:
            yield {"question": question.question, "context": question.context}

    def predictions(self, examples: Questions, features: Features, outputs: Outputs) -> Iterator[Prediction]:
        """Yield {"answer", "score", "start"}: the text ("" for no answer), its probability among the n best, and its
        start in characters."""
        for best, null in self._candidates(examples, outputs):
            considered = [*best, *([null] if self._may_abstain else [])]
            probabilities = softmax(np.array([candidate.score for candidate in considered]))
            answer, index = self._choose(best, null)
            yield {"answer": answer.text, "score": float(probabilities[index]), "start": answer.start}

    def compute_metrics(self, examples: Questions, features: Features, outputs: Outputs) -> dict[str, float]:
        """Compute exact_match and f1 in percent, and the loss of windows in nats; if there are unanswerable questions,
        also HasAns_*, NoAns_* and the best threshold on the no-answer score."""
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
        targets = np.stack([features.labels["start_positions"], features.labels["end_positions"]], 1)
        values["loss"] = task_metrics.mean_cross_entropy((logits.T for logits in outputs), targets)
        return {name: float(value) for name, value in values.items()}

    def write_predictions(
        self, folder: Path, split: str, examples: Questions, features: Features, outputs: Outputs
    ) -> None:
        """Write predictions_SPLIT.json for the official scripts, nbest_SPLIT.json and, if the model may predict no
        answer, null_odds_SPLIT.json.

        A skipped question has the answer "" and no candidates; skipped_SPLIT.json says why it was skipped.
        """
        answers: dict[str, str] = {}
        n_best: dict[str, list[dict[str, object]]] = {}
        null_odds: dict[str, float] = {}
        skipped = []
        for row, question_id, value in examples.rows.aligned(self._candidates(examples, outputs)):
            if isinstance(value, Skipped):
                skipped.append({"row": row, "id": question_id, "skipped": value.problem})
                if question_id is not None and question_id not in answers:
                    answers[question_id], n_best[question_id] = "", []
                continue
            best, null = value
            answers[question_id] = self._choose(best, null)[0].text
            considered = [*best, *([null] if self._may_abstain else [])]
            considered.sort(key=lambda candidate: -candidate.score)
            probabilities = softmax(np.array([candidate.score for candidate in considered]))
            n_best[question_id] = [
                {"text": candidate.text, "probability": float(p), "score": candidate.score, "start": candidate.start}
                for candidate, p in zip(considered, probabilities, strict=True)
            ]
            null_odds[question_id] = null.score - best[0].score
        files: dict[str, object] = {"predictions": answers, "nbest": n_best}
        files |= ({"null_odds": null_odds} if self._may_abstain else {}) | ({"skipped": skipped} if skipped else {})
        for name, values in files.items():
            text = json.dumps(values, ensure_ascii=False, indent=1) + "\n"
            write_atomically(folder / f"{name}_{split}.json", text)

    def parse_lines(self, lines: Sequence[str], first_row: int = 1) -> Questions:
        """Parse one JSON object per line."""
        required = (("question", str), ("context", str))
        objects, rows = json_lines(lines, first_row, LINE_EXAMPLE, self.bad_rows, self.known_ids, *required)
        ids = [str(row["id"]) if row.get("id") is not None else None for row in objects]
        if any(ids):
            rows = replace(rows, ids=ids)
        return Questions([Question("", row["question"], row["context"]) for row in objects], rows, False)

    @property
    def _may_abstain(self) -> bool:
        return bool(getattr(self.config, UNANSWERABLE, False))

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


def _windows(
    question: int, offsets: np.ndarray, prefix: int, room: int, stride: int
) -> tuple[list[tuple[int, int]], list[Window]]:
    """Return the windows of one question's context, as (first, end) tokens and as `Window`.

    Args:
        question: Index of the question.
        offsets: int64 [n, 2], start and end in characters of the context's tokens.
        prefix: Tokens before the context.
        room: Tokens of the context that fit into a window after this question.
        stride: Tokens between the starts of two windows, or fewer if a window has less room.
    """
    spans = window_spans(len(offsets), room, min(stride, room))
    best = max_context_windows(spans, len(offsets))
    windows = [
        Window(question, prefix, offsets[first:last], best[first:last] == index)
        for index, (first, last) in enumerate(spans)
    ]
    return spans, windows
