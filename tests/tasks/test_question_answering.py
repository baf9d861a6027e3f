"""Questions about texts: windows, answers, and the official scripts' measures, on cases worked out by hand."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from bertfast import BertConfig
from bertfast.data.tokenizer import load_tokenizer, train_tokenizer
from bertfast.tasks.question_answering import Questions, SpanTask, normalise, score
from bertfast.tasks.task import TaskSettings

WORDS = [f"w{chr(97 + i)}{chr(97 + j)}" for i in range(8) for j in range(5)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join([*WORDS, "who", "when"])] * 20, 256)


def task(unanswerable: bool = False, **settings) -> SpanTask:
    own = SpanTask(TaskSettings(model_name_or_path="", **settings))
    own.know(BertConfig(unanswerable=unanswerable))
    return own


def write(path: Path, context: str, *entries: dict) -> str:
    data = {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(entries)}]}]}
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        json.dump(data, file)
    return str(path)


def entry(name: str, *answers: tuple[str, int], question: str = "who", **rest) -> dict:
    given = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": name, "question": question, "answers": given} | rest


@pytest.mark.parametrize(
    ("answer", "golds", "exact", "f1"),
    [
        ("the Cat.", ["a cat"], 1, 1),  # articles, small letters, punctuation
        ("black cat", ["cat", "dog"], 0, 2 / 3),
        ("cat", ["dog", "The  Cat!"], 1, 1),  # the best of several
        ("cat cat", ["cat"], 0, 2 / 3),  # a word counts as often as both have it
        ("", [], 1, 1),  # there is none, and it says so
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
        ("the", ["a"], 1, 1),  # nothing is left of either
        ("U.S.", ["us"], 1, 1),
    ],
)
def test_answers_are_scored_as_by_the_official_scripts(answer, golds, exact, f1):
    assert score(answer, golds) == (exact, pytest.approx(f1))


def test_normalising():
    assert normalise("An  Apple, the “pie”; a.b") == "apple “pie” ab"


def test_a_long_text_is_asked_about_in_windows_that_overlap(tokenizer, tmp_path):
    context = " ".join(WORDS)
    start = context.index(WORDS[20])
    path = write(tmp_path / "a.json.gz", context, entry("1", (f"{WORDS[20]} {WORDS[21]}", start)))
    own = task(doc_stride=4)
    questions, features = own.featurize(own.read(path, labelled=True), tokenizer, 16)
    one = len(tokenizer.encode("who", add_special_tokens=False).ids)
    tokens = len(tokenizer.encode(context, add_special_tokens=False).ids)
    room = 16 - one - 3
    assert len(features) == len(questions.windows) == -(-(tokens - room) // 4) + 1
    assert (features.lengths <= 16).all()
    shown = set()
    for row, window in enumerate(questions.windows):
        first, last = int(features.labels["start_positions"][row]), int(features.labels["end_positions"][row])
        characters = (window.offsets[0, 0], window.offsets[-1, 1])
        if first:
            offsets = window.offsets[first - window.prefix], window.offsets[last - window.prefix]
            assert context[offsets[0][0] : offsets[1][1]] == f"{WORDS[20]} {WORDS[21]}"
        else:
            assert characters[0] > start or characters[1] < start + len(f"{WORDS[20]} {WORDS[21]}")
        types = features.token_type_ids[slice(*features.starts[row : row + 2])]
        assert types.tolist() == [0] * window.prefix + [1] * (len(window.offsets) + 1)
        shown |= {tuple(pair) for pair in window.offsets[window.best].tolist()}
    assert len(shown) == tokens  # each token is at its best in one window
    assert sum(window.best.sum() for window in questions.windows) == tokens


def logits(window, start: int, end: int, height: float = 5.0) -> np.ndarray:
    """High where the tokens at these characters start and end."""
    values = np.zeros((window.prefix + len(window.offsets) + 1, 2), np.float32)
    for side, place in (
        (0, np.flatnonzero(window.offsets[:, 0] == start)),
        (1, np.flatnonzero(window.offsets[:, 1] == end)),
    ):
        values[window.prefix + place, side] = height
    return values


def test_answers_are_stretches_of_the_text_as_it_is_written(tokenizer, tmp_path):
    context = "WAA  wab, Wac-wad"
    own = task()
    path = write(tmp_path / "a.json", context, entry("1", ("wab, Wac", 5)), entry("2", ("Wad", 14), ("wad", 14)))
    with pytest.raises(ValueError, match=r"question 2: the answer 'Wad' does not stand where it should"):
        own.read(path, labelled=True)
    own = task(on_bad_rows="skip", n_best=3)
    questions, features = own.featurize(own.read(path, labelled=True), tokenizer, 32)
    assert (len(questions), own.bad.count) == (1, 1)
    [window] = questions.windows
    outputs = [logits(window, 5, 13)]
    [answer] = own.answers(questions, features, outputs)
    assert (answer["answer"], answer["start"]) == ("wab, Wac", 5)
    assert own.measure(questions, features, outputs) == {"exact_match": 100, "f1": 100}
    own.write(tmp_path, "dev", questions, features, outputs)
    assert json.loads((tmp_path / "predictions_dev.json").read_text()) == {"1": "wab, Wac"}
    best = json.loads((tmp_path / "nbest_dev.json").read_text())["1"]
    assert len(best) == 3
    assert best[0]["text"] == "wab, Wac"
    assert sum(one["probability"] for one in best) == pytest.approx(1)
    assert not (tmp_path / "null_odds_dev.json").exists()


def test_an_answer_ends_behind_its_start_and_is_no_longer_than_allowed(tokenizer):
    own = task(max_answer_length=2)
    questions, features = own.featurize(Questions(own.parse([asked("waa wab wac")]).questions, False), tokenizer, 32)
    [window] = questions.windows
    assert next(own.answers(questions, features, [logits(window, 8, 3)]))["answer"] != ""
    backwards = next(own.answers(questions, features, [logits(window, 8, 3)]))
    assert len(backwards["answer"].split()) == 1
    long = next(own.answers(questions, features, [logits(window, 0, 11)]))
    assert len(long["answer"].split()) <= 2


def asked(context: str) -> str:
    return json.dumps({"question": "who", "context": context})


def test_a_question_may_have_no_answer(tokenizer, tmp_path):
    entries = [entry("1", ("waa", 0)), entry("2", is_impossible=True), entry("3", is_impossible=True)]
    own = task(True)
    path = write(tmp_path / "a.json", "waa wab wac", *entries)
    questions, features = own.featurize(own.read(path, labelled=True), tokenizer, 32)
    assert own.learn_labels(questions) == {"unanswerable": True}
    assert features.labels["start_positions"].tolist()[1:] == [0, 0]
    outputs = [logits(window, 0, 3) for window in questions.windows]
    outputs[1][0] = 10  # [CLS]: there is none
    outputs[2][0] = 4
    answers = [answer["answer"] for answer in own.answers(questions, features, outputs)]
    assert answers == ["waa", "", "waa"]
    measured = own.measure(questions, features, outputs)
    assert measured["f1"] == measured["exact_match"] == pytest.approx(200 / 3)
    assert (measured["HasAns_f1"], measured["NoAns_f1"]) == (100, 50)
    # The third is right too, once no answer needs to lead by less than it does: null 8, the answer 10.
    assert measured["best_f1"] == 100
    assert -10 <= measured["best_f1_thresh"] < -2
    sterner = task(True, null_score_diff_threshold=-3.0)
    assert sterner.measure(questions, features, outputs)["f1"] == 100
    own.write(tmp_path, "dev", questions, features, outputs)
    odds = json.loads((tmp_path / "null_odds_dev.json").read_text())
    assert odds == {"1": -10.0, "2": 10.0, "3": -2.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "is not in the form of SQuAD"), ('{"data": [{"paragraphs": 3}]}', "form of SQuAD"), ("{", "form of SQuAD")],
)
def test_other_files_are_refused(text, message, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        task().read(str(tmp_path / "a.json"), labelled=True)
    with pytest.raises(ValueError, match=r"question 1: there is no answer, and it is not said to have none"):
        task().read(write(tmp_path / "b.json", "waa", entry("1")), labelled=True)


@pytest.mark.parametrize(("name", "count"), [("dev-v1.1", 10_570), ("dev-v2.0", 11_873)])
def test_every_answer_that_people_gave_is_a_stretch_of_tokens(name, count, shared_data):
    own = task()
    examples = own.read(str(shared_data / "squad" / f"{name}.json.gz"), labelled=True)
    assert len(examples) == count
    some = Questions(examples.questions[::40], True)
    tokenizer = load_tokenizer(shared_data / "vocab" / "bert-base-uncased-vocab.txt")
    some, features = own.featurize(some, tokenizer, 384)
    outputs = []
    for row in range(len(features)):
        first, last = features.labels["start_positions"][row], features.labels["end_positions"][row]
        values = np.zeros((features.lengths[row], 2), np.float32)
        values[first, 0] = values[last, 1] = 9.0
        outputs.append(values)
    own.config = BertConfig(unanswerable=name == "dev-v2.0")
    measured = own.measure(some, features, outputs)
    assert measured["f1"] > 99.5  # a token may hold more than the answer
