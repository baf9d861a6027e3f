"""Questions whose answers stand in a text: SQuAD 1.1 and 2.0 (Rajpurkar et al., 2016, 2018).

A text that is too long for one sequence is asked about in windows that overlap. Answers are stretches of the text as it
is written. W windows, T tokens.
"""

from __future__ import annotations

import gzip
import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from bertfast.data.tokenizer import special_tokens
from bertfast.encoder import question_answering_loss, span_logits
from bertfast.models.bert import BertForQuestionAnswering
from bertfast.tasks.features import Features, ModelInputs
from bertfast.tasks.sequence_classification import softmax
from bertfast.tasks.task import Outputs, Task, json_lines, write_whole

UNANSWERABLE = "unanswerable"  # a model's configuration says by it whether some questions have no answer
_WANTED = '{"question": "…", "context": "…"}'
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Question:
    """A question about a text.

    Attributes:
        answers: (text, where it starts in the context, in characters) of each, as people gave them; empty: unknown, or
            there is none.
    """

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, eq=False)
class Window:
    """Where a sequence stands in a context: its tokens from `first` on, behind `prefix` of question and specials.

    Attributes:
        question: the number of its question.
        offsets: int64 [n, 2], where each of its tokens of the context starts and ends in characters.
        best: bool [n], whether no other window shows more of what surrounds a token.
    """

    question: int
    prefix: int
    offsets: np.ndarray
    best: np.ndarray


@dataclass(frozen=True, eq=False)
class Questions:
    """Questions, and the windows in which they are asked; `labelled` says whether their answers are known."""

    questions: list[Question]
    labelled: bool
    windows: list[Window] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.questions)


@dataclass(frozen=True)
class Candidate:
    """A stretch of a context that may be the answer; the empty one says that there is none."""

    text: str
    score: float
    start: int


class SpanTask(Task):
    """Where the answer to a question starts and ends."""

    model = BertForQuestionAnswering
    head = "qa_outputs."
    metrics = ("f1", "exact_match")

    def read(self, path: str, *, labelled: bool) -> Questions:
        """A file in the form of SQuAD, compressed or not."""
        questions, known = [], labelled
        for entry, context in _entries(Path(path)):
            given = tuple((answer["text"], answer["answer_start"]) for answer in entry.get("answers", []))
            wrong = next((text for text, start in given if context[start : start + len(text)] != text), None)
            if wrong is not None:
                self.bad.add(f"{path}, question {entry['id']}: the answer {wrong!r} does not stand where it should")
            elif labelled and not given and not entry.get("is_impossible"):
                self.bad.add(f"{path}, question {entry['id']}: there is no answer, and it is not said to have none")
            else:
                known |= bool(given)
                questions.append(Question(entry["id"], entry["question"], context, given))
        if not questions:
            raise ValueError(f"{path} holds no question that can be used")
        return Questions(questions, known)

    def learn_labels(self, examples: Questions) -> dict[str, Any]:
        """Whether some questions have no answer."""
        return {UNANSWERABLE: any(not question.answers for question in examples.questions)}

    def featurize(self, examples: Questions, tokenizer: Tokenizer, max_length: int) -> tuple[Questions, Features]:
        """A sequence for each window, with the tokens that an answer starts and ends with, or 0 where it shows none."""
        special, windows, sequences, answers = special_tokens(tokenizer), [], [], []
        texts = list(dict.fromkeys(text for q in examples.questions for text in (q.question, q.context)))
        encoded = dict(zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True))
        for number, question in enumerate(examples.questions):
            asked = encoded[question.question].ids[: min(self.settings.max_query_length, max_length // 2)]
            encoding = encoded[question.context]
            offsets, prefix = np.array(encoding.offsets, np.int64).reshape(-1, 2), len(asked) + 2
            room = max_length - prefix - 1
            spans = _window_spans(len(offsets), room, min(self.settings.doc_stride, room))
            best = _best_windows(spans, len(offsets))
            answer = _token_span(offsets, question.answers[0]) if examples.labelled and question.answers else None
            for place, (first, last) in enumerate(spans):
                windows.append(Window(number, prefix, offsets[first:last], best[first:last] == place))
                sequences.append(([special.cls, *asked, special.sep], [*encoding.ids[first:last], special.sep]))
                within = answer is not None and first <= answer[0] and answer[1] < last
                answers.append([place - first + prefix for place in answer] if within else [0, 0])
        lengths = [len(first) + len(second) for first, second in sequences]
        labels = {}
        if examples.labelled:
            starts, ends = np.array(answers, np.int64).T
            labels = {"start_positions": starts, "end_positions": ends}
        parts = [part for pair in sequences for part in pair]
        types = np.tile(np.array([0, 1], np.uint8), len(sequences))
        features = Features(
            np.array([token for part in parts for token in part], np.int32),
            np.repeat(types, [len(part) for part in parts]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            labels=labels,
        )
        return replace(examples, windows=windows), features

    def logits(self, model: PreTrainedModel, inputs: ModelInputs) -> Tensor:
        """[1, T, 2]: where an answer starts, and where it ends."""
        return span_logits(model, inputs.packed(model))[None]

    def loss(self, model: PreTrainedModel, inputs: ModelInputs, items: Tensor) -> Tensor:
        """The mean of both ends' cross entropies."""
        answers = (inputs.arguments[name] for name in ("start_positions", "end_positions"))
        return question_answering_loss(model, inputs.packed(model), *answers, items)

    def answers(self, examples: Questions, features: Features, outputs: Outputs) -> Iterator[dict]:
        """{"answer", "score", its probability among the best, "start", in characters}; "" where there is none."""
        for best, null in self._candidates(examples, outputs):
            scores = softmax(np.array([candidate.score for candidate in (*best, *([null] if self._may_lack else []))]))
            answer, index = self._choice(best, null)
            yield {"answer": answer.text, "score": float(scores[index]), "start": answer.start}

    def measure(self, examples: Questions, features: Features, outputs: Outputs) -> dict[str, float]:
        """exact_match and f1 in percent as the official scripts have them; with questions that have no answer, also of
        each kind apart, and with the best threshold."""
        if not examples.labelled:
            return {}
        candidates = list(self._candidates(examples, outputs))
        golds = [[text for text, _ in question.answers] for question in examples.questions]
        chosen = [self._choice(best, null)[0].text for best, null in candidates]
        scores = np.array([score(text, gold) for text, gold in zip(chosen, golds, strict=True)])
        measured = {"exact_match": 100 * scores[:, 0].mean(), "f1": 100 * scores[:, 1].mean()}
        without = np.array([not gold for gold in golds])
        if without.any():
            for name, rows in (("HasAns", ~without), ("NoAns", without)):
                if rows.any():
                    exact, f1 = 100 * scores[rows].mean(0)
                    measured |= {f"{name}_exact": exact, f"{name}_f1": f1}
            best = np.array([score(best[0].text, gold)[1] for (best, _), gold in zip(candidates, golds, strict=True)])
            differences = np.array([null.score - best[0].score for best, null in candidates])
            measured |= _best_threshold(best, without, differences)
        return {name: float(value) for name, value in measured.items()}

    def write(self, folder: Path, split: str, examples: Questions, features: Features, outputs: Outputs) -> None:
        """predictions_SPLIT.json as the official scripts read it, nbest_SPLIT.json and, where questions may have no
        answer, null_odds_SPLIT.json."""
        predictions, n_best, odds = {}, {}, {}
        for question, (best, null) in zip(examples.questions, self._candidates(examples, outputs), strict=True):
            predictions[question.id] = self._choice(best, null)[0].text
            shown = sorted([*best, *([null] if self._may_lack else [])], key=lambda candidate: -candidate.score)
            scores = softmax(np.array([candidate.score for candidate in shown]))
            n_best[question.id] = [
                {"text": candidate.text, "probability": float(p), "score": candidate.score, "start": candidate.start}
                for candidate, p in zip(shown, scores, strict=True)
            ]
            odds[question.id] = null.score - best[0].score
        files = {"predictions": predictions, "nbest": n_best} | ({"null_odds": odds} if self._may_lack else {})
        for name, values in files.items():
            write_whole(folder / f"{name}_{split}.json", json.dumps(values, ensure_ascii=False, indent=1) + "\n")

    def parse(self, lines: Sequence[str]) -> Questions:
        """A JSON object a line."""
        rows = json_lines(lines, _WANTED)
        if not all(isinstance(row.get("question"), str) and isinstance(row.get("context"), str) for row in rows):
            raise ValueError(f"each line of standard input must be an object such as {_WANTED}")
        return Questions([Question(str(i), row["question"], row["context"]) for i, row in enumerate(rows)], False)

    @property
    def _may_lack(self) -> bool:
        return bool(getattr(self.config, UNANSWERABLE, False))

    def _choice(self, best: list[Candidate], null: Candidate) -> tuple[Candidate, int]:
        """The answer, and its number among the candidates with `null` behind them."""
        if self._may_lack and null.score - best[0].score > self.settings.null_score_diff_threshold:
            return null, len(best)
        return best[0], 0

    def _candidates(self, examples: Questions, outputs: Outputs) -> Iterator[tuple[list[Candidate], Candidate]]:
        """Of each question, the best stretches, the best first, and that there is no answer."""
        numbers = [window.question for window in examples.windows]
        bounds = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if a != b), len(numbers)]
        for question, (first, last) in zip(examples.questions, pairwise(bounds), strict=True):
            found, null = [], np.inf
            for window, logits in zip(examples.windows[first:last], outputs[first:last], strict=True):
                null = min(null, float(logits[0].sum()))
                found += self._stretches(window, logits, question.context)
            found.sort(key=lambda candidate: -candidate.score)
            different = {candidate.text: candidate for candidate in reversed(found)}  # the best of each text
            best = sorted(different.values(), key=lambda candidate: -candidate.score)[: self.settings.n_best]
            yield best or [Candidate("", null, 0)], Candidate("", null, 0)

    def _stretches(self, window: Window, logits: np.ndarray, context: str) -> list[Candidate]:
        count = len(window.offsets)
        start, end = logits[window.prefix : window.prefix + count].astype(np.float64).T
        starts = np.argsort(-np.where(window.best, start, -np.inf), kind="stable")[: self.settings.n_best]
        ends = np.argsort(-end, kind="stable")[: self.settings.n_best]
        length = ends[None] - starts[:, None] + 1
        fits = (length > 0) & (length <= self.settings.max_answer_length) & window.best[starts][:, None]
        scores = np.where(fits, start[starts][:, None] + end[ends][None], -np.inf)
        order = np.argsort(-scores, axis=None, kind="stable")[: self.settings.n_best]
        candidates = []
        for i, j in zip(*np.unravel_index(order, scores.shape), strict=True):
            if np.isfinite(scores[i, j]):
                first, last = int(window.offsets[starts[i], 0]), int(window.offsets[ends[j], 1])
                candidates.append(Candidate(context[first:last], float(scores[i, j]), first))
        return candidates


def normalise(text: str) -> str:
    """As the official scripts compare answers: small letters, no punctuation, no articles, single spaces."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def score(answer: str, golds: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1 of words) of an answer, the best over those that people gave; none: right is to say none."""
    golds = [gold for gold in golds if normalise(gold)] or [""]
    return max(_same(answer, gold) for gold in golds), max(_f1(answer, gold) for gold in golds)


def _same(answer: str, gold: str) -> float:
    return float(normalise(answer) == normalise(gold))


def _f1(answer: str, gold: str) -> float:
    words, wanted = normalise(answer).split(), normalise(gold).split()
    if not words or not wanted:
        return float(words == wanted)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted))


def _best_threshold(f1: np.ndarray, without: np.ndarray, differences: np.ndarray) -> dict[str, float]:
    """The threshold on null's lead with the best mean F1, and that: answers of `f1` up to it, none beyond."""
    order = np.argsort(differences, kind="stable")
    gains = np.where(without, -1.0, f1)[order]  # of answering rather than not, where not answering is all that is known
    totals = without.sum() + np.concatenate([[0], np.cumsum(gains)])
    best = int(totals.argmax())
    threshold = differences[order[best - 1]] if best else differences.min() - 1
    return {"best_f1": 100 * totals[best] / len(f1), "best_f1_thresh": threshold}


def _entries(path: Path) -> Iterator[tuple[dict, str]]:
    """(question with its answers, context) of a file."""
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
        raise ValueError(f"{path} is not in the form of SQuAD, {{'data': [{{'paragraphs': …}}]}}: {error!r}") from None


def _window_spans(tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """First and last token, the last not included, of the windows that a context of `tokens` is cut into."""
    if room < 1:
        raise ValueError("max_seq_length leaves no room for a text behind a question: raise it")
    spans, first = [], 0
    while True:
        last = min(first + room, tokens)
        spans.append((first, last))
        if last == tokens:
            return spans
        first += stride


def _best_windows(spans: list[tuple[int, int]], tokens: int) -> np.ndarray:
    """int64 [tokens]: the window that shows most of what surrounds each token, on its poorer side first."""
    places = np.arange(tokens)
    surroundings = [
        np.where(
            (places >= first) & (places < last),
            np.minimum(places - first, last - 1 - places) + 0.01 * (last - first),
            -np.inf,
        )
        for first, last in spans
    ]
    return np.argmax(surroundings, axis=0)


def _token_span(offsets: np.ndarray, answer: tuple[str, int]) -> tuple[int, int] | None:
    """The first and last token of an answer, those that it splits included; None where there are no tokens of it."""
    text, start = answer
    inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < start + len(text)))
    return (int(inside[0]), int(inside[-1])) if inside.size else None
