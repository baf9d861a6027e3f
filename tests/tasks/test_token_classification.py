"""Token classification: tag schemes, entities, long sentences, and CoNLL files."""

from pathlib import Path

import numpy as np
import pytest

from bertfast import BertConfig
from bertfast.data.tokenizer import train_tokenizer
from bertfast.tasks.settings import TaskSettings
from bertfast.tasks.tag_schemes import Entity, detect_scheme, entities, iob1_to_iob2, tag_error
from bertfast.tasks.token_classification import TokenClassificationTask

NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["ann bob lives in rome new york un der stand ing"] * 20, 256)


def task_for(**settings) -> TokenClassificationTask:
    task = TokenClassificationTask(TaskSettings.of(model_name_or_path="model", **settings))
    task.set_config(BertConfig(id2label=dict(enumerate(NAMES))))
    return task


def write(path: Path, *sentences: str) -> str:
    lines = [word.replace("/", "\t") for sentence in sentences for word in [*sentence.split(), ""]]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-PER I-PER O", [Entity("PER", 1, 3)]),
        ("B-PER B-PER I-PER", [Entity("PER", 0, 1), Entity("PER", 1, 3)]),
        ("B-PER I-LOC", [Entity("PER", 0, 1), Entity("LOC", 1, 2)]),  # a stray I begins an entity, as in conlleval
        ("I-PER I-PER O I-LOC", [Entity("PER", 0, 2), Entity("LOC", 3, 4)]),
        ("S-PER B-LOC I-LOC E-LOC E-PER", [Entity("PER", 0, 1), Entity("LOC", 1, 4), Entity("PER", 4, 5)]),
        ("S-PER S-PER", [Entity("PER", 0, 1), Entity("PER", 1, 2)]),
        ("U-PER B-LOC L-LOC O B-PER M-PER E-PER", [Entity("PER", 0, 1), Entity("LOC", 1, 3), Entity("PER", 4, 7)]),
        ("B I O B", [Entity("", 0, 2), Entity("", 3, 4)]),  # entities of one type
        ("O O", []),
        ("NOUN VERB", []),
    ],
)
def test_entities_are_found_in_tags(tags, found):
    assert entities(tags.split()) == found


@pytest.mark.parametrize(
    ("sentences", "scheme"),
    [
        (["I-PER I-PER O", "I-LOC B-LOC"], "IOB1"),
        (["B-PER I-PER O"], "IOB2"),
        (["B-PER I-PER O", "I-LOC"], "IOB2"),
        (["S-PER O", "B-PER E-PER"], "BIOES"),
        (["U-PER O", "B-PER L-PER"], "BIOES"),
        (["B-PER M-PER E-PER O", "S-LOC"], "BIOES"),
        (["B I O"], "IOB2"),
        (["B-PER I-PER PER O O O"], "IOB2"),  # most tags
        (["NOUN VERB"], None),
        (["NOUN M VERB", "NOUN B"], None),
        (["O O"], None),
    ],
)
def test_scheme_is_detected(sentences, scheme):
    assert detect_scheme([sentence.split() for sentence in sentences]) == scheme


def test_iob1_is_converted_to_iob2():
    assert iob1_to_iob2(["I-PER", "I-PER", "B-PER", "O", "I-LOC", "I-PER"]) == [
        "B-PER",
        "I-PER",
        "B-PER",
        "O",
        "B-LOC",
        "B-PER",
    ]


@pytest.mark.parametrize(
    ("tags", "scheme", "expected"),
    [
        ("O I-PER", "IOB2", "'I-PER' after 'O' continues no entity"),
        ("B-PER I-LOC", "IOB2", "'I-LOC' after 'B-PER'"),
        ("B-PER O", "BIOES", "'B-PER' is not continued"),
        ("B-PER", "BIOES", "'B-PER' is not continued"),
        ("S-PER E-PER", "BIOES", "'E-PER' after 'S-PER'"),
        ("B-PER I-PER O B-LOC", "IOB2", None),
        ("B-PER I-PER E-PER S-LOC O", "BIOES", None),
        ("B-PER PER", "IOB2", "'PER' is neither O nor begins with B- or I-"),
        ("I-PER PER", "IOB1", "'PER' is neither O nor begins with B- or I-"),
        ("NOUN VERB", None, None),
    ],
)
def test_invalid_tags_are_detected(tags, scheme, expected):
    problem = tag_error(tags.split(), scheme)
    assert problem is None if expected is None else expected in problem


def test_conll_files_are_read_in_their_published_format(tmp_path):
    path = tmp_path / "conll.txt"
    path.write_text("-DOCSTART- -X- O O\n\nAnn NNP I-NP I-PER\nlives VBZ I-VP O\n\n\nRome NNP I-NP I-LOC\n")
    task = task_for()
    examples = task.read(str(path), labelled=True)
    assert examples.words == [["Ann", "lives"], ["Rome"]]
    assert examples.tags == [["B-PER", "O"], ["B-LOC"]]  # IOB1 in the file
    assert task_for(tag_column=1).read(str(path), labelled=True).tags == [["NNP", "VBZ"], ["NNP"]]
    assert task.read(write(tmp_path / "words.conll", "Ann lives"), labelled=False).tags is None
    assert task.label_config(examples)["id2label"] == {0: "O", 1: "B-LOC", 2: "B-PER"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", "sentence\tlabel\ngood film\tpos\nbad film\tneg\n"),
        ("a.tsv", "sentence\tlabel\ngood\tpos\nbad\tneg\n"),
        ("a.tsv", "the film was good\tpos\n"),
        ("a.csv", "sentence,label\ngood,pos\n"),
        ("a.jsonl", '{"sentence": "good", "label": "pos"}\n'),
    ],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_a_table_of_texts_is_refused(name, text, labelled, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"not a CoNLL file.*--task sequence-classification"):
        task_for().read(str(tmp_path / name), labelled=labelled)


def test_columns_of_a_tsv_are_read_as_words_and_tags(tmp_path):
    task = task_for()
    path = write(tmp_path / "a.tsv", "Ann/B-PER lives/O", "Rome/B-LOC")
    assert task.read(path, labelled=True).tags == [["B-PER", "O"], ["B-LOC"]]


def test_bad_sentences_are_reported_or_skipped(tmp_path):
    path = write(tmp_path / "a.conll", "Ann/B-PER", "Bob/O Rome/I-LOC", "lives", "Rome/B-LOC")
    with pytest.raises(ValueError, match=r"a\.conll, line 6: 1 column where most lines have 2"):
        task_for().read(path, labelled=True)
    task = task_for(on_bad_rows="skip")
    assert task.read(path, labelled=True).words == [["Ann"], ["Rome"]]
    assert task.bad_rows.count == 2
    task = task_for()
    examples = task.read(write(tmp_path / "b.conll", "Ann/B-PER Acme/B-ORG"), labelled=True)
    with pytest.raises(ValueError, match=r"line 1: unknown tag 'B-ORG'; known tags: O, B-PER"):
        task.featurize(examples, train_tokenizer(["ann acme"], 64), 32)


def outputs_for(task: TokenClassificationTask, examples, features, tags: list[list[str]]) -> list[np.ndarray]:
    """Logits that predict these tags at the first token of each word, and another tag at all other tokens."""
    outputs = []
    for (sentence, words, positions), length in zip(examples.segments, features.lengths, strict=True):
        logits = np.full((length, len(NAMES)), 0.0)
        logits[:, 4] = 1.0
        logits[positions] = np.eye(len(NAMES))[[NAMES.index(tags[sentence][word]) for word in words]]
        outputs.append(logits)
    return outputs


@pytest.mark.parametrize("max_length", [32, 7])
def test_first_tokens_have_the_tags_and_segments_are_joined(max_length, tokenizer, tmp_path):
    task = task_for()
    sentences = ["ann/B-PER understanding/I-PER lives/O in/O new/B-LOC york/I-LOC", "rome/B-LOC"]
    examples = task.read(write(tmp_path / "a.conll", *sentences), labelled=True)
    examples, features = task.featurize(examples, tokenizer, max_length)
    assert (features.lengths <= max_length).all()
    assert (len(features) > 2) == (max_length == 7)
    labels = features.labels["labels"]
    assert [NAMES[label] for label in labels[labels >= 0]] == [tag for tags in examples.tags for tag in tags]
    assert (labels == -100).sum() >= 2 * len(features) + 3  # [CLS], [SEP] and the further tokens of words
    predicted = [["B-PER", "I-PER", "O", "O", "B-LOC", "O"], ["B-LOC"]]
    outputs = outputs_for(task, examples, features, predicted)
    predictions = list(task.predictions(examples, features, outputs))
    assert [prediction["tags"] for prediction in predictions] == predicted
    assert predictions[0]["entities"][0] == {"type": "PER", "text": "ann understanding", "start": 0, "end": 2}
    measured = task.compute_metrics(examples, features, outputs)
    assert (measured["precision"], measured["recall"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert measured["accuracy"] == pytest.approx(6 / 7)
    task.write_predictions(tmp_path, "dev", examples, features, outputs)
    assert (tmp_path / "predictions_dev.conll").read_text().splitlines()[5] == "york\tI-LOC\tO"
    names, counts = task.confusion_matrix(examples, features, outputs)
    assert counts[names.index("I-LOC"), names.index("O")] == 1
    assert counts.sum() == 7


def test_word_longer_than_a_sequence_is_truncated(tokenizer):
    task = task_for()
    examples, features = task.featurize(task.parse_lines(["understanding ann"]), tokenizer, 4)
    assert features.num_truncated == 1
    assert [words.tolist() for _, words, _ in examples.segments] == [[0], [1]]
    assert (features.lengths <= 4).all()


def test_word_without_tokens_has_a_predicted_tag(tokenizer, tmp_path):
    task = task_for()
    sentences = task.parse_lines(["ann \u200b rome", "", "\u00a0"])
    assert sentences.words == [["ann", "\u200b", "rome"], [], ["\u00a0"]]
    examples, features = task.featurize(sentences, tokenizer, 16)
    tags = [["B-PER", "I-PER", "B-LOC"], [], ["B-LOC"]]
    outputs = outputs_for(task, examples, features, tags)
    assert [prediction["tags"] for prediction in task.predictions(examples, features, outputs)] == tags
    path = write(tmp_path / "a.conll", "ann/B-PER \x01/I-PER rome/B-LOC")
    _, features = task.featurize(task.read(path, labelled=True), tokenizer, 16)
    labels = features.labels["labels"]
    assert [NAMES[label] for label in labels[labels >= 0]] == ["B-PER", "I-PER", "B-LOC"]


@pytest.mark.parametrize(
    ("tags", "named"), [("b-per/i-per/O", "'b-per'"), ("B_PER/O/O", "'B_PER'"), ("NOUN/b/O", None)]
)
def test_tags_that_nearly_mark_entities_are_reported(tags, named, tmp_path, caplog):
    task = TokenClassificationTask(TaskSettings.of(model_name_or_path="model"))
    first, second, third = tags.split("/")
    path = write(tmp_path / "a.conll", f"ann/{first} lives/{second} here/{third}")
    task.label_config(task.read(path, labelled=True))
    messages = [message for message in caplog.messages if "no entities but classes of words" in message]
    assert len(messages) == (named is not None)
    assert all(f"{named} is not spelled like B-PER" in message for message in messages)


def test_parts_of_speech_are_measured_by_accuracy_and_loss(tokenizer, tmp_path):
    """F1 of entities is 0 with every model where tags mark none, so that it cannot choose the best one."""
    task = TokenClassificationTask(TaskSettings.of(model_name_or_path="model"))
    examples = task.read(write(tmp_path / "pos.conll", "ann/NOUN lives/VERB", "rome/NOUN"), labelled=True)
    task.set_config(BertConfig(**task.label_config(examples)))
    assert task.metrics == ("accuracy", "loss")
    examples, features = task.featurize(examples, tokenizer, 16)
    outputs = [np.tile([2.0, 0.0], (length, 1)) for length in features.lengths]  # NOUN everywhere
    measured = task.compute_metrics(examples, features, outputs)
    expected = (2 * np.log1p(np.exp(-2)) + np.log1p(np.exp(2))) / 3
    assert measured == {"accuracy": pytest.approx(2 / 3), "loss": pytest.approx(expected)}
    assert next(task.predictions(examples, features, outputs))["entities"] == []


def test_tags_of_a_model_in_another_scheme_are_found(tokenizer, tmp_path):
    task = task_for()
    task.set_config(BertConfig(id2label=dict(enumerate(["O", "U-PER", "B-PER", "L-PER"]))))
    path = write(tmp_path / "a.conll", "ann/U-PER lives/O new/B-PER york/L-PER")
    examples, features = task.featurize(task.read(path, labelled=True), tokenizer, 16)
    assert features.labels["labels"].tolist() == [-100, 1, 0, 2, 3, -100]
    outputs = [np.eye(4)[np.maximum(features.labels["labels"], 0)]]
    measured = task.compute_metrics(examples, features, outputs)
    assert (measured["f1"], measured["accuracy"]) == (1, 1)


@pytest.mark.parametrize(
    ("tags", "warns"),
    [
        ("B-PER/O", False),
        ("_/_", False),
        ("B-PER/_", True),
        ("B-PER/B-ORG", True),
        ("B-PER/I-LOC", True),
        ("O/PER", True),
    ],
)
def test_tags_of_files_to_predict_are_optional(tags, warns, tokenizer, tmp_path, caplog):
    """Tags that are missing, unknown or malformed never cost a prediction; metrics need all of them."""
    task = task_for()
    first, second = tags.split("/")
    examples = task.read(write(tmp_path / "a.conll", f"ann/{first} bob/O", f"rome/{second} x/O"), labelled=False)
    examples, features = task.featurize(examples, tokenizer, 16)
    assert len(features) == len(examples) == 2
    outputs = outputs_for(task, examples, features, [["O", "O"], ["O", "O"]])
    assert ("accuracy" in task.compute_metrics(examples, features, outputs)) == (tags == "B-PER/O")
    assert ("no metrics" in caplog.text) == warns
    assert task.bad_rows.count == 0


def test_skipped_sentences_are_marked_in_predictions(tokenizer, tmp_path):
    path = write(
        tmp_path / "a.conll", "ann/x/B-PER", "bob/O rome/y/I-LOC", "rome/O", "x/y/B-ORG/O", "bob/O", "ann/O/O/O"
    )
    task = task_for(on_bad_rows="skip")
    examples, features = task.featurize(task.read(path, labelled=False), tokenizer, 16)
    assert examples.rows.numbers == [3, 5]
    task.write_predictions(tmp_path, "test", examples, features, outputs_for(task, examples, features, [["O"], ["O"]]))
    written = [line for line in (tmp_path / "predictions_test.conll").read_text().splitlines() if line]
    assert [line.split(":")[0] for line in written] == [
        "# skipped sentence 1",
        "# skipped sentence 2",
        "rome\tO\tO",
        "# skipped sentence 4",
        "bob\tO\tO",
        "# skipped sentence 6",
    ]
    task = task_for(on_bad_rows="skip")
    chunks = list(task.read_chunks(path))
    assert [sentence for chunk in chunks for sentence in chunk.words] == [["rome"], ["bob"]]
    assert [*task.bad_rows.skipped[path]] == [1, 2, 4, 6]


def test_wnut_has_the_published_number_of_sentences(shared_data):
    counts = {"train": 3394, "dev": 1009, "test": 1287}
    for split, count in counts.items():
        examples = task_for().read(str(shared_data / "wnut17" / f"{split}.conll.gz"), labelled=True)
        assert len(examples) == count
        assert detect_scheme(examples.tags) == "IOB2"
