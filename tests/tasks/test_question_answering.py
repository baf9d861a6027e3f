"""Extractive question answering: windows, answers, and SQuAD's metrics on examples computed by hand."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

from bertfast import BertConfig
from bertfast.data.tokenizer import load_tokenizer, train_tokenizer
from bertfast.tasks.question_answering import QuestionAnsweringTask, Questions
from bertfast.tasks.settings import TaskSettings
from bertfast.tasks.squad_metrics import answer_scores, normalize_answer

WORDS = [f"w{chr(97 + i)}{chr(97 + j)}" for i in range(8) for j in range(5)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join([*WORDS, "who", "when"])] * 20, 256)


def task_for(unanswerable: bool = False, **settings) -> QuestionAnsweringTask:
    task = QuestionAnsweringTask(TaskSettings.of(model_name_or_path="model", **settings))
    task.set_config(BertConfig(unanswerable=unanswerable))
    return task


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
    ("answer", "gold", "exact", "f1"),
    [
        ("the Cat.", ["a cat"], 1, 1),  # articles, case, punctuation
        ("black cat", ["cat", "dog"], 0, 2 / 3),
        ("cat", ["dog", "The  Cat!"], 1, 1),  # the best of several
        ("cat cat", ["cat"], 0, 2 / 3),  # a word counts as often as both contain it
        ("", [], 1, 1),  # unanswerable, and no answer is predicted
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
        ("the", ["a"], 1, 1),  # both are empty after normalisation
        ("U.S.", ["us"], 1, 1),
    ],
)
def test_answer_scores_are_those_of_the_official_scripts(answer, gold, exact, f1):
    assert answer_scores(answer, gold) == (exact, pytest.approx(f1))


def test_normalize_answer_removes_case_punctuation_and_articles():
    assert normalize_answer("An  Apple, the “pie”; a.b") == "apple “pie” ab"


def test_long_context_is_split_into_overlapping_windows(tokenizer, tmp_path):
    context = " ".join(WORDS)
    start = context.index(WORDS[20])
    path = write(tmp_path / "a.json.gz", context, entry("1", (f"{WORDS[20]} {WORDS[21]}", start)))
    task = task_for(doc_stride=4)
    questions, features = task.featurize(task.read(path, labelled=True), tokenizer, 16)
    question_length = len(tokenizer.encode("who", add_special_tokens=False).ids)
    tokens = len(tokenizer.encode(context, add_special_tokens=False).ids)
    room = 16 - question_length - 3
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
        types = features.token_type_ids[slice(*features.cu_seqlens[row : row + 2])]
        assert types.tolist() == [0] * window.prefix + [1] * (len(window.offsets) + 1)
        shown |= {tuple(pair) for pair in window.offsets[window.max_context].tolist()}
    assert len(shown) == tokens  # each token has its maximum context in one window
    assert sum(window.max_context.sum() for window in questions.windows) == tokens


def logits(window, start: int, end: int, height: float = 5.0) -> np.ndarray:
    """Logits that are high at the tokens that start and end at these characters."""
    values = np.zeros((window.prefix + len(window.offsets) + 1, 2), np.float32)
    for side, position in (
        (0, np.flatnonzero(window.offsets[:, 0] == start)),
        (1, np.flatnonzero(window.offsets[:, 1] == end)),
    ):
        values[window.prefix + position, side] = height
    return values


def test_answers_are_substrings_of_the_context(tokenizer, tmp_path):
    context = "WAA  wab, Wac-wad"
    task = task_for()
    path = write(tmp_path / "a.json", context, entry("1", ("wab, Wac", 5)), entry("2", ("Wad", 14), ("wad", 14)))
    with pytest.raises(ValueError, match=r"row 2 \(id '2'\): the answer 'Wad' is not in the context at its"):
        task.read(path, labelled=True)
    task = task_for(on_bad_rows="skip", n_best=3)
    questions, features = task.featurize(task.read(path, labelled=True), tokenizer, 32)
    assert (len(questions), task.bad_rows.count) == (1, 1)
    [window] = questions.windows
    outputs = [logits(window, 5, 13)]
    [answer] = task.predictions(questions, features, outputs)
    assert (answer["answer"], answer["start"]) == ("wab, Wac", 5)
    measured = task.compute_metrics(questions, features, outputs)
    assert (measured["exact_match"], measured["f1"]) == (100, 100)
    others = features.lengths[0] - 1  # tokens with logit 0; that of the right one is 5, at the start and at the end
    assert measured["loss"] == pytest.approx(np.log(np.exp(5) + others) - 5)
    task.write_predictions(tmp_path, "dev", questions, features, outputs)
    assert json.loads((tmp_path / "predictions_dev.json").read_text()) == {"1": "wab, Wac", "2": ""}
    best = json.loads((tmp_path / "nbest_dev.json").read_text())["1"]
    assert len(best) == 3
    assert best[0]["text"] == "wab, Wac"
    assert sum(one["probability"] for one in best) == pytest.approx(1)
    assert not (tmp_path / "null_odds_dev.json").exists()


def test_answer_ends_after_its_start_and_respects_max_answer_length(tokenizer):
    task = task_for(max_answer_length=2)
    questions, features = task.featurize(task.parse_lines([asked("waa wab wac")]), tokenizer, 32)
    [window] = questions.windows
    assert next(task.predictions(questions, features, [logits(window, 8, 3)]))["answer"] != ""
    backwards = next(task.predictions(questions, features, [logits(window, 8, 3)]))
    assert len(backwards["answer"].split()) == 1
    long = next(task.predictions(questions, features, [logits(window, 0, 11)]))
    assert len(long["answer"].split()) <= 2


def asked(context: str) -> str:
    return json.dumps({"question": "who", "context": context})


def test_unanswerable_questions_are_predicted_and_measured(tokenizer, tmp_path):
    entries = [entry("1", ("waa", 0)), entry("2", is_impossible=True), entry("3", is_impossible=True)]
    task = task_for(True)
    path = write(tmp_path / "a.json", "waa wab wac", *entries)
    questions, features = task.featurize(task.read(path, labelled=True), tokenizer, 32)
    assert task.label_config(questions) == {"unanswerable": True}
    assert features.labels["start_positions"].tolist()[1:] == [0, 0]
    outputs = [logits(window, 0, 3) for window in questions.windows]
    outputs[1][0] = 10  # [CLS]: no answer
    outputs[2][0] = 4
    answers = [answer["answer"] for answer in task.predictions(questions, features, outputs)]
    assert answers == ["waa", "", "waa"]
    measured = task.compute_metrics(questions, features, outputs)
    assert measured["f1"] == measured["exact_match"] == pytest.approx(200 / 3)
    assert (measured["HasAns_f1"], measured["NoAns_f1"]) == (100, 50)
    # The third is classified correctly too with a threshold below its difference of -2: null 8, the answer 10.
    assert measured["best_f1"] == 100
    assert -10 <= measured["best_f1_thresh"] < -2
    stricter = task_for(True, null_score_diff_threshold=-3.0)
    assert stricter.compute_metrics(questions, features, outputs)["f1"] == 100
    task.write_predictions(tmp_path, "dev", questions, features, outputs)
    odds = json.loads((tmp_path / "null_odds_dev.json").read_text())
    assert odds == {"1": -10.0, "2": 10.0, "3": -2.0}


def test_questions_that_are_skipped_are_in_the_outputs(tokenizer, tmp_path):
    entries = [entry("1", question=""), entry("2", ("wab", 4)), entry(None), entry("2"), entry("5", ("x", 0))]
    path = write(tmp_path / "a.json", "waa wab", *entries)
    task = task_for(on_bad_rows="skip")
    questions, features = task.featurize(task.read(path, labelled=False), tokenizer, 32)
    assert ([question.id for question in questions.questions], questions.rows.numbers) == (["2", "5"], [2, 5])
    outputs = [logits(window, 4, 7) for window in questions.windows]
    assert task.compute_metrics(questions, features, outputs) == {}  # the answer of 5 is wrong
    task.write_predictions(tmp_path, "test", questions, features, outputs)
    assert json.loads((tmp_path / "predictions_test.json").read_text()) == {"1": "", "2": "wab", "5": "wab"}
    assert json.loads((tmp_path / "nbest_test.json").read_text())["1"] == []
    skipped = json.loads((tmp_path / "skipped_test.json").read_text())
    assert [(one["row"], one["id"]) for one in skipped] == [(1, "1"), (3, None), (4, "2")]
    assert skipped[0]["skipped"] == f"{path}, row 1 (id '1'): it has no question"
    task = task_for(on_bad_rows="skip")
    [chunk] = task.read_chunks(path)
    assert (len(chunk), [*task.bad_rows.skipped[path]]) == (2, [1, 3, 4])


def test_lines_of_standard_input_keep_their_numbers_and_ids(tokenizer):
    task = task_for(on_bad_rows="skip")
    lines = [asked("waa"), "", '{"question": "who", "context": null}', json.dumps({"id": 7} | json.loads(asked("wab")))]
    questions, features = task.featurize(task.parse_lines(lines, 11), tokenizer, 32)
    rows = questions.rows.aligned(task.predictions(questions, features, [logits(w, 0, 3) for w in questions.windows]))
    found = [(row, row_id, getattr(value, "problem", None) or value["answer"]) for row, row_id, value in rows]
    assert [row for row, _, _ in found] == [11, 12, 13, 14]
    assert (found[0][1:], found[3][1:]) == ((None, "waa"), ("7", "wab"))
    assert "standard input, line 13" in found[2][2]


def test_repeated_ids_on_standard_input_are_refused_as_in_files():
    lines = [json.dumps({"id": 7} | json.loads(asked(word))) for word in ("waa", "wab")]
    task = task_for()
    task.parse_lines(lines[:1])
    with pytest.raises(ValueError, match="standard input, line 2: the id 7 is repeated"):
        task.parse_lines(lines[1:], 2)
    task = task_for(on_bad_rows="skip")
    assert [question.question for question in task.parse_lines(lines).questions] == [json.loads(lines[0])["question"]]


@pytest.mark.parametrize("content", ['{"data": []}', "[]"])
def test_a_file_without_questions_is_refused(content, tmp_path):
    path = tmp_path / "empty.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"empty\.json holds no questions"):
        [*task_for().read_chunks(str(path))]


def test_question_without_context_has_an_empty_answer(tokenizer):
    task = task_for()
    questions, features = task.featurize(task.parse_lines([asked(""), asked("\u200b"), asked("waa")]), tokenizer, 32)
    assert len(features) == 3
    outputs = [np.ones((length, 2), np.float32) for length in features.lengths]
    assert [answer["answer"] for answer in task.predictions(questions, features, outputs)] == ["", "", "waa"]


def test_what_is_cut_is_reported(tokenizer, tmp_path, caplog):
    context = " ".join(WORDS)
    long_answer = " ".join(WORDS[:30])
    entries = [entry("1", (long_answer, 0), question="who " * 9), entry("2", (WORDS[1], context.index(WORDS[1])))]
    task = task_for(max_query_length=4)
    _, features = task.featurize(task.read(write(tmp_path / "a.json", context, *entries), labelled=True), tokenizer, 24)
    assert (features.lengths <= 24).all()
    assert "cut 1 question to 4 tokens (--max-query-length)" in caplog.text
    assert "no window has the whole of 1 answer: raise --max-seq-length" in caplog.text


def test_answer_without_tokens_is_ignored_in_the_loss(tokenizer, tmp_path):
    path = write(tmp_path / "a.json", "waa \u200b wab", entry("1", ("\u200b", 4)), entry("2", ("wab", 6)))
    _, features = task_for().featurize(task_for().read(path, labelled=True), tokenizer, 32)
    assert features.labels["start_positions"][0] == features.labels["end_positions"][0] == -100
    assert features.labels["start_positions"][1] > 0


def test_training_file_without_any_answer_is_refused(tmp_path):
    path = write(tmp_path / "a.json", "waa", entry("1", is_impossible=True))
    with pytest.raises(ValueError, match=r"no question in .*a\.json has an answer"):
        task_for().label_config(task_for().read(path, labelled=True))


@pytest.mark.parametrize(("name", "count"), [("dev-v1.1", 10_570), ("dev-v2.0", 11_873)])
def test_gold_answers_of_squad_are_spans_of_tokens(name, count, shared_data):
    task = task_for()
    examples = task.read(str(shared_data / "squad" / f"{name}.json.gz"), labelled=True)
    assert len(examples) == count
    subset = Questions(examples.questions[::40], examples.rows.select(range(0, count, 40)), True)
    tokenizer = load_tokenizer(shared_data / "vocab" / "bert-base-uncased-vocab.txt")
    subset, features = task.featurize(subset, tokenizer, 384)
    outputs = []
    for row in range(len(features)):
        first, last = features.labels["start_positions"][row], features.labels["end_positions"][row]
        values = np.zeros((features.lengths[row], 2), np.float32)
        values[first, 0] = values[last, 1] = 9.0
        outputs.append(values)
    task.set_config(BertConfig(unanswerable=name == "dev-v2.0"))
    measured = task.compute_metrics(subset, features, outputs)
    assert measured["f1"] > 99.5  # a token may contain more than the answer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"doc_stride": 13}, "--doc-stride must be at most 12 in sequences of 16 tokens, got 13"),
        ({"max_query_length": 9}, "--max-query-length must be at most 8 in sequences of 16 tokens, got 9"),
        # What the defaults are where they fit.
        ({"doc_stride": 128}, "--doc-stride must be at most 12 in sequences of 16 tokens, got 128"),
        ({"max_query_length": 64}, "--max-query-length must be at most 8 in sequences of 16 tokens, got 64"),
    ],
)
def test_settings_that_do_not_fit_into_a_sequence_are_refused(settings, message, tokenizer, tmp_path):
    path = write(tmp_path / "a.json", WORDS[0], entry("1", (WORDS[0], 0)))
    task = task_for(**settings)
    with pytest.raises(ValueError, match=message):
        task.featurize(task.read(path, labelled=True), tokenizer, 16)
    limit = int(re.search("at most (\\d+)", message)[1])
    fits = task_for(**dict.fromkeys(settings, limit))
    fits.featurize(fits.read(path, labelled=True), tokenizer, 16)


@pytest.mark.parametrize(("settings", "warned"), [({}, True), ({"doc_stride": 12}, True), ({"doc_stride": 4}, False)])
def test_windows_that_do_not_overlap_are_said(settings, warned, tokenizer, tmp_path, caplog):
    """The default stride is more than a short window holds, and 12 tokens fit after a question of one token only."""
    path = write(tmp_path / "a.json", " ".join(WORDS), entry("1", (WORDS[0], 0), question="who when who"))
    task = task_for(**settings)
    questions, _ = task.featurize(task.read(path, labelled=True), tokenizer, 16)
    assert len(questions.windows) > 1
    assert ("split 1 context into windows that do not overlap" in caplog.text) == warned
