"""Files of questions as they are found: formats, encodings, and questions that cannot be used."""

import gzip
import json
import lzma
import re
from pathlib import Path

import pytest

from bertfast.tasks.question_answering import QuestionAnsweringTask
from bertfast.tasks.registry import choose_task
from bertfast.tasks.rows import BadRows
from bertfast.tasks.settings import TaskSettings
from bertfast.tasks.squad import Question, QuestionFile, read_questions

CONTEXT = "Denver Broncos won the game in Santa Clara."
ANSWER = {"text": "Denver", "answer_start": 0}
GOOD = {"id": "good", "question": "Who won?", "answers": [ANSWER]}
READ = Question("good", "Who won?", CONTEXT, (("Denver", 0),))
FLAT = {"id": "good", "question": "Who won?", "context": CONTEXT, "answers": {"text": ["Denver"], "answer_start": [0]}}


def squad(*entries: object, context: object = CONTEXT) -> dict:
    return {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(entries)}]}]}


def read(path: Path, content: object, *, labelled: bool = True, skip: bool = False) -> QuestionFile:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_questions(path, BadRows("skip" if skip else "stop"), labelled=labelled)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", squad(GOOD)),
        ("a.json", squad(GOOD | {"answers": FLAT["answers"]})),
        ("a.json", {"data": [FLAT]}),
        ("a.json", [FLAT]),
        ("a.json", squad(GOOD)["data"]),
        ("a.jsonl", json.dumps(FLAT).encode() + b"\n\n"),
        ("a.json", "\ufeff".encode() + json.dumps(squad(GOOD)).encode()),
        ("a.json", json.dumps(squad(GOOD), indent=1).replace("\n", "\r\n").encode()),
        ("a.json.xz", lzma.compress(json.dumps(squad(GOOD)).encode())),
        ("a.json", gzip.compress(json.dumps(squad(GOOD)).encode())),
        ("a.json.gz", squad(GOOD)),  # not compressed
    ],
)
def test_files_whose_meaning_is_clear_are_read(name, content, tmp_path):
    questions, rows, labelled, _ = read(tmp_path / name, content)
    assert (questions, rows.numbers, rows.ids, labelled) == ([READ], [1], ["good"], True)


def test_lines_with_a_question_and_a_context_are_recognised(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(FLAT))
    task = choose_task(TaskSettings.of(model_name_or_path="model"), file=str(tmp_path / "a.jsonl"))
    assert isinstance(task, QuestionAnsweringTask)


BAD = {
    "id": ({"id": None}, "1 (question 'Who?'): it has no id"),
    "question": ({"question": None}, "1 (id '1'): it has no question"),
    "start": (
        {"answers": [{"text": "Denver"}]},
        "'Denver' has no answer_start, its first character in the context; the",
    ),
    "null start": (
        {"answers": [ANSWER | {"answer_start": None}]},
        "answer_start of the answer 'Denver' is null, not an",
    ),
    "no text": ({"answers": [{"answer_start": 0}]}, "an answer has no text"),
    "negative": ({"answers": [{"text": "Clara.", "answer_start": -6}]}, "not in the context at its answer_start -6"),
    "elsewhere": ({"answers": [{"text": "won", "answer_start": 3}]}, "at its answer_start 3; it is at 15"),
    "empty": ({"answers": [{"text": " ", "answer_start": 6}]}, "the text of an answer is"),
    "null": ({"answers": None}, "there is no answer, but is_impossible is not true"),
    "none": ({"answers": []}, "there is no answer, but is_impossible is not true"),
    "text": ({"answers": "Denver"}, "its answers are not a list of objects"),
    "strings": ({"answers": ["Denver"]}, "its answers are not a list of objects"),
    "lengths": ({"answers": {"text": ["Denver"], "answer_start": []}}, "are not lists of the same length"),
    "contradiction": ({"is_impossible": True}, "is_impossible is true, but there are answers"),
    "impossible": ({"is_impossible": "False"}, "is_impossible is 'False', not true or false"),
    "surrogate": ({"question": "Who\ud83d?"}, "1 (id '1'): it holds the unpaired surrogate"),
    "repeated": ({"id": "good"}, "the id 'good' is repeated, after row 1 (id 'good')"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_questions_that_cannot_be_used_are_named_and_skipped(changes, message, tmp_path):
    entries = [{"id": "1", "question": "Who?", "answers": [ANSWER]} | changes, GOOD]
    content = squad(*(reversed(entries) if "repeated" in message else entries))
    with pytest.raises(ValueError, match=rf"a\.json, row .*{re.escape(message)}"):
        read(tmp_path / "a.json", content)
    questions, rows, *_ = read(tmp_path / "a.json", content, skip=True)
    assert questions == [READ]
    assert len(rows.bad.skipped[rows.file]) == 1


def test_entries_and_contexts_that_are_no_texts_are_bad_rows(tmp_path):
    content = {"data": [*squad(GOOD)["data"], *squad({"id": "2", "question": "?"}, context=None)["data"]]}
    with pytest.raises(ValueError, match=r"row 2 \(id '2'\): its context is null, not a text"):
        read(tmp_path / "a.json", content)
    assert read(tmp_path / "a.json", content, skip=True).questions == [READ]
    with pytest.raises(ValueError, match=r"row 1: 3 is not an object"):
        read(tmp_path / "a.json", squad(3, GOOD))
    lines = b"{\n" + json.dumps(FLAT).encode()
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: not JSON"):
        read(tmp_path / "a.jsonl", lines)
    assert read(tmp_path / "a.jsonl", lines, skip=True).rows.numbers == [2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "not in SQuAD's format"),
        ("a.json", b"{", "not in SQuAD's format"),
        ("a.json", b"[" * 100_000, "nested too deeply|not JSON"),
        ("a.json", b"3", "not in SQuAD's format"),
        ("a.json", {"data": [{"paragraphs": 3}]}, "not in SQuAD's format"),
        ("a.json", {"data": [{"paragraphs": [{"context": "a"}]}]}, "no list 'qas'"),
        ("a.json", {"data": [{"paragraphs": []}, None]}, r"row 1 \(article 2\): .*it is null"),
        (
            "a.json",
            {"data": [{"paragraphs": [{"context": "a", "qas": []}, 5]}]},
            r"row 1 \(article 1, paragraph 2\): .*it is 5",
        ),
        ("a.json", {"data": [{"title": "t"}]}, "no 'paragraphs'"),
        ("a.json", b'{"data": [], "data": []}', r"the key 'data' is repeated within an object; remove one"),
        ("a.json", b"{}\n{}\n", r"one object per line the suffix \.jsonl"),
        ("a.json", '{"data": "na\u00efve"}'.encode("latin-1"), "line 1: not UTF-8"),
        (
            "a.json.gz",
            gzip.compress(json.dumps(squad(GOOD)).encode())[:-20],
            r"cannot be read \(.*; copy or download it again",
        ),
    ],
)
def test_malformed_files_are_named(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=rf"a\.json.*({message})"):
        read(tmp_path / name, content)


IMPOSSIBLE = {"id": "2", "question": "?", "is_impossible": True}
EMPTY = {"id": "3", "question": "?", "answers": {"text": [], "answer_start": []}}


@pytest.mark.parametrize(
    ("entries", "labelled"),
    [
        ([GOOD], True),
        ([GOOD, IMPOSSIBLE], True),
        ([GOOD, EMPTY], True),
        ([IMPOSSIBLE], True),
        ([EMPTY], False),  # of a test set as the library datasets writes it
        ([{"id": "4", "question": "?"}], False),
        ([GOOD, {"id": "4", "question": "?"}], False),
        ([GOOD, {"id": "4", "question": "?", "answers": [{"text": "x"}]}], False),
    ],
)
def test_files_to_predict_need_no_answers(entries, labelled, tmp_path):
    """All questions are read; metrics are computed only if all answers are known."""
    questions, rows, known, no_metrics = read(tmp_path / "a.json", squad(*entries), labelled=False)
    assert (len(questions), known, rows.bad.count) == (len(entries), labelled, 0)
    assert (no_metrics is not None) == (not labelled and GOOD in entries)


MALFORMED = {  # of articles between two good ones: where the problem is, and what it is
    "article": (None, r"row 2 \(article 2\): not in SQuAD's format, .*: it is null"),
    "no paragraphs": ({"title": "t"}, r"row 2 \(article 2\): .*it has no 'paragraphs'"),
    "paragraphs": ({"paragraphs": 3}, r"row 2 \(article 2\): .*its 'paragraphs' are 3, not a list"),
    "paragraph": ({"paragraphs": ["x"]}, r'row 2 \(article 2, paragraph 1\): .*it is "x"'),
    "questions": (
        {"paragraphs": [{"context": "a", "qas": {}}]},
        r"row 2 \(article 2, paragraph 1\): .*it has no list 'qas'",
    ),
    "context": ({"paragraphs": [{"qas": [GOOD | {"id": "2"}]}]}, r"row 2 \(id '2'\): it has no context"),
}


@pytest.mark.parametrize(("article", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_articles_and_paragraphs_are_bad_rows(article, message, tmp_path):
    content = {"data": [*squad(GOOD)["data"], article, *squad(GOOD | {"id": "last"})["data"]]}
    with pytest.raises(ValueError, match=rf"a\.json, {message}"):
        read(tmp_path / "a.json", content)
    questions, rows, *_ = read(tmp_path / "a.json", content, skip=True)
    assert ([question.id for question in questions], rows.numbers) == (["good", "last"], [1, 3])
    [(number, skipped)] = rows.bad.skipped[rows.file].items()
    assert number == 2
    assert re.search(message, skipped.problem)


def test_malformed_articles_are_listed_among_the_predictions(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [None, *squad(GOOD)["data"]]}))
    task = QuestionAnsweringTask(TaskSettings.of(model_name_or_path="model", on_bad_rows="skip"))
    [questions] = task.read_chunks(str(path))
    aligned = [(row, row_id, str(value)) for row, row_id, value in questions.rows.aligned(["answer"])]
    assert aligned[0][:2] == (1, None)
    assert "it is null" in aligned[0][2]
    assert aligned[1] == (2, "good", "answer")
