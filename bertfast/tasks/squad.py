"""Files of questions about contexts, in SQuAD's format or that of the library datasets.

SQuAD's nests questions in paragraphs of articles: {"data": [{"paragraphs": [{"context", "qas": [{"id", "question",
"answers": [{"text", "answer_start"}]}]}]}]}. The library datasets has one object per question: {"id", "question",
"context", "answers": {"text": [], "answer_start": []}}, in a list or one per line of a .jsonl file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bertfast.data.text_files import (
    decode_json,
    json_object,
    read_lines,
    read_text,
    require_rereadable,
    unpaired_surrogate,
)
from bertfast.tasks.rows import BadRows, Rows

LINE_EXAMPLE = '{"question": "…", "context": "…"}'
_FORMAT = '{"data": [{"paragraphs": [{"context": "…", "qas": […]}]}]}'
_SHOWN = 40  # characters of a value in messages

Answers = tuple[tuple[str, int], ...]
"""Gold answers as (text, start in the context in characters)."""


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        id: Identifier in the file.
        question: The question.
        context: The text that may contain the answer.
        answers: Gold answers; empty: unknown, or unanswerable.
    """

    id: str
    question: str
    context: str
    answers: Answers = ()


class QuestionFile(NamedTuple):
    """The usable questions of a file.

    Attributes:
        questions: The questions.
        rows: Where each comes from; rows are counted in the file's order.
        labelled: Whether the gold answers are known.
        no_metrics: Why there are no metrics although some gold answers are known; None: that is not so.
    """

    questions: list[Question]
    rows: Rows
    labelled: bool
    no_metrics: str | None


class _Absent:
    """Stands for a value that an object lacks, which is not the same as null."""


_ABSENT = _Absent()


class _Entry(NamedTuple):
    """A question as it stands in a file: where, and its JSON values or why it has none."""

    location: str
    values: object = None
    context: object = None
    default_id: str | None = None
    problem: str | None = None


class _Malformed(NamedTuple):
    """An article or a paragraph whose questions cannot be read: where, and why."""

    location: str
    problem: str


def read_questions(path: Path, bad: BadRows, *, labelled: bool) -> QuestionFile:
    """Read the questions of a .json or .jsonl file, compressed or not.

    Args:
        path: The file.
        bad: Collects questions that cannot be used.
        labelled: Whether each question must have usable answers, or be marked as impossible.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is malformed, or a question cannot be used and bad rows are not skipped.
    """
    require_rereadable(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    questions: list[Question] = []
    numbers: list[int] = []
    known_ids: dict[str, str] = {}  # by id
    any_answered, unknown = False, None
    for number, entry in enumerate(_lines(path) if ".jsonl" in path.suffixes[-2:] else _nested(path), 1):
        question_id = None
        try:
            question_id = _id(entry)
            if question_id in known_ids:
                raise ValueError(f"the id {question_id!r} is repeated, after {known_ids[question_id]}")
            known_ids[question_id] = entry.location
            question, context = _texts(question_id, entry)
            answers, is_answered = _answers(entry.values, context, required=labelled)
        except ValueError as error:
            bad.add(f"{path}, {entry.location}: {error}", file=str(path), row=number, row_id=question_id)
            continue
        if answers is None:
            unknown = unknown or f"{path}, {entry.location}"
        any_answered |= is_answered
        questions.append(Question(question_id, question, context, answers or ()))
        numbers.append(number)
    partly = any_answered and unknown is not None and not labelled
    no_metrics = f"not all questions have usable answers: {unknown}" if partly else None
    rows = Rows(str(path), numbers, None, [question.id for question in questions], bad)
    return QuestionFile(questions, rows, labelled or (any_answered and unknown is None), no_metrics)


def _lines(path: Path) -> Iterator[_Entry]:
    """Yield the questions of a .jsonl file; without ids they are numbered."""
    filled = ((number, line) for number, line in read_lines(path) if line.strip())
    for row, (number, line) in enumerate(filled, 1):
        location = f"line {number}"
        try:
            values = json_object(location, line, LINE_EXAMPLE)
        except ValueError as error:
            yield _Entry(location, problem=str(error).removeprefix(f"{location}: "))
        else:
            yield _Entry(location, values, values.get("context", _ABSENT), str(row))


def _nested(path: Path) -> Iterator[_Entry]:
    """Yield the questions of a .json file, paragraph by paragraph; a malformed article or paragraph is one entry."""
    for number, found in enumerate(_pairs(path, _json(path)), 1):
        if isinstance(found, _Malformed):
            location = f"row {number} ({found.location})"
            yield _Entry(location, problem=f"not in SQuAD's format, {_FORMAT}: {found.problem}")
            continue
        values, context = found
        known = values if isinstance(values, dict) else {}
        name = next((f" ({key} {known[key]!r:.{_SHOWN}})" for key in ("id", "question") if known.get(key)), "")
        yield _Entry(f"row {number}{name}", values, context)


def _pairs(path: Path, data: object) -> Iterator[tuple[object, object] | _Malformed]:
    """Yield (question with its answers, context) of the content of a file, and what cannot be read."""
    articles = data["data"] if isinstance(data, dict) and "data" in data else data
    if not isinstance(articles, list):
        raise ValueError(f"{path} is not in SQuAD's format, {_FORMAT}: a list of articles is missing")
    for number, article in enumerate(articles, 1):
        where = f"article {number}"
        if not isinstance(article, dict):
            yield _Malformed(where, f"it is {_shown(article)}")
        elif "paragraphs" in article:
            yield from _questions_of(article["paragraphs"], where)
        elif {"question", "context"} & article.keys():
            yield article, article.get("context", _ABSENT)
        else:
            remedy = "for another task than question answering, add --task"
            yield _Malformed(where, f"it has no 'paragraphs'; {remedy}")


def _questions_of(paragraphs: object, where: str) -> Iterator[tuple[object, object] | _Malformed]:
    """Yield what `_pairs` yields, of the paragraphs of one article."""
    if not isinstance(paragraphs, list):
        yield _Malformed(where, f"its 'paragraphs' are {_shown(paragraphs)}, not a list")
        return
    for number, paragraph in enumerate(paragraphs, 1):
        if not isinstance(paragraph, dict):
            yield _Malformed(f"{where}, paragraph {number}", f"it is {_shown(paragraph)}")
        elif not isinstance(paragraph.get("qas"), list):
            yield _Malformed(f"{where}, paragraph {number}", "it has no list 'qas'")
        else:
            yield from ((values, paragraph.get("context", _ABSENT)) for values in paragraph["qas"])


def _json(path: Path) -> object:
    """Return the content of a JSON file."""
    text = read_text(path)
    try:
        return decode_json(text)
    except json.JSONDecodeError as error:
        several = error.msg == "Extra data"
        remedy = "; give a file of one object per line the suffix .jsonl" if several else ""
        raise ValueError(f"{path} is not in SQuAD's format, {_FORMAT}: not JSON ({error}){remedy}") from None
    except RecursionError:
        raise ValueError(f"{path} is not in SQuAD's format, {_FORMAT}: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error} within an object; remove one of the two") from None


def _shown(value: object) -> str:
    """Return the beginning of a JSON value, for messages."""
    return json.dumps(value, ensure_ascii=False)[:_SHOWN]


def _id(entry: _Entry) -> str:
    """Return the id of an entry; ValueError if it has none."""
    if entry.problem is not None:
        raise ValueError(entry.problem)
    if not isinstance(entry.values, dict):
        raise ValueError(f"{_shown(entry.values)} is not an object with an id and a question")
    question_id = entry.values.get("id", entry.default_id)
    if isinstance(question_id, int) and not isinstance(question_id, bool):
        question_id = str(question_id)
    if not isinstance(question_id, str) or not question_id:
        raise ValueError("it has no id, by which predictions are written: add one, such as its number")
    return question_id


def _texts(question_id: str, entry: _Entry) -> tuple[str, str]:
    """Return the question and the context of an entry; ValueError if one is not a text."""
    question = entry.values.get("question") if isinstance(entry.values, dict) else None
    if not isinstance(question, str) or not question.strip():
        raise ValueError("it has no question")
    if entry.context is _ABSENT:
        raise ValueError("it has no context")
    if not isinstance(entry.context, str):
        raise ValueError(f"its context is {_shown(entry.context)}, not a text")
    for text in (question_id, question, entry.context):
        if (problem := unpaired_surrogate(text)) is not None:
            raise ValueError(f"it holds the {problem}")
    return question, entry.context


def _answers(values: object, context: str, *, required: bool) -> tuple[Answers | None, bool]:
    """Return the gold answers, and whether they say that answers of the file are known.

    An empty list of answers in the form of the library datasets says that there is no answer only if others have one.

    Args:
        values: An entry of a file.
        context: Its context.
        required: Whether answers must be usable; if not, return None if they are not.

    Raises:
        ValueError: The answers must be usable, but are not.
    """
    assert isinstance(values, dict)
    try:
        pairs, is_complete = _answer_pairs(values)
        is_impossible = values.get("is_impossible") or False
        if not isinstance(is_impossible, bool):
            raise ValueError(f"is_impossible is {is_impossible!r}, not true or false")
        if is_impossible and pairs:
            raise ValueError("is_impossible is true, but there are answers")
        if not (pairs or is_impossible or is_complete):
            raise ValueError("there is no answer, but is_impossible is not true")
        return tuple(_located(text, start, context) for text, start in pairs), bool(pairs) or is_impossible
    except ValueError:
        if required:
            raise
        return None, bool(values.get("answers"))


def _answer_pairs(values: dict[str, object]) -> tuple[list[tuple[object, object]], bool]:
    """Return the texts and starts of answers, and whether their form is one in which an empty list means no answer."""
    answers = values.get("answers")
    if isinstance(answers, dict):  # of the library datasets
        texts, starts = answers.get("text"), answers.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise ValueError("'text' and 'answer_start' of its answers are not lists of the same length")
        return list(zip(texts, starts, strict=True)), True
    if answers is None:
        return [], False
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise ValueError('its answers are not a list of objects such as {"text": "…", "answer_start": 0}')
    return [(answer.get("text", _ABSENT), answer.get("answer_start", _ABSENT)) for answer in answers], False


def _located(text: object, start: object, context: str) -> tuple[str, int]:
    """Return an answer; ValueError if it does not begin at character `start` of the context."""
    if text is _ABSENT:
        raise ValueError("an answer has no text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the text of an answer is {_shown(text)}")
    if start is _ABSENT:
        found = context.find(text)
        remedy = "" if found < 0 else f"; the context has it at {found}"
        raise ValueError(f"the answer {text!r} has no answer_start, its first character in the context{remedy}")
    if not isinstance(start, int) or isinstance(start, bool):
        raise ValueError(f"answer_start of the answer {text!r} is {_shown(start)}, not an integer")
    if start < 0 or not context.startswith(text, start):
        found = context.find(text)
        remedy = "" if found < 0 else f" {start}; it is at {found}"
        raise ValueError(f"the answer {text!r} is not in the context at its answer_start{remedy}")
    return text, start
