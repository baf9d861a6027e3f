"""Tags of words: schemes, entities, long sentences, and files as the benchmarks publish them."""

from pathlib import Path

import numpy as np
import pytest

from bertfast import BertConfig
from bertfast.data.tokenizer import train_tokenizer
from bertfast.tasks.task import TaskSettings
from bertfast.tasks.token_classification import Entity, TagTask, entities, invalid, iob2, scheme_of

NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["ann bob lives in rome new york un der stand ing"] * 20, 256)


def task(**settings) -> TagTask:
    own = TagTask(TaskSettings(model_name_or_path="", **settings))
    own.know(BertConfig(id2label=dict(enumerate(NAMES))))
    return own


def write(path: Path, *sentences: str) -> str:
    lines = [word.replace("/", "\t") for sentence in sentences for word in [*sentence.split(), ""]]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-PER I-PER O", [Entity("PER", 1, 3)]),
        ("B-PER B-PER I-PER", [Entity("PER", 0, 1), Entity("PER", 1, 3)]),
        ("B-PER I-LOC", [Entity("PER", 0, 1), Entity("LOC", 1, 2)]),  # leniently, as conlleval reads it
        ("I-PER I-PER O I-LOC", [Entity("PER", 0, 2), Entity("LOC", 3, 4)]),
        ("S-PER B-LOC I-LOC E-LOC E-PER", [Entity("PER", 0, 1), Entity("LOC", 1, 4), Entity("PER", 4, 5)]),
        ("S-PER S-PER", [Entity("PER", 0, 1), Entity("PER", 1, 2)]),
        ("O O", []),
        ("NOUN VERB", []),
    ],
)
def test_entities_of_tags(tags, found):
    assert entities(tags.split()) == found


@pytest.mark.parametrize(
    ("sentences", "scheme"),
    [
        (["I-PER I-PER O", "I-LOC B-LOC"], "IOB1"),
        (["B-PER I-PER O"], "IOB2"),
        (["B-PER I-PER O", "I-LOC"], "IOB2"),
        (["S-PER O", "B-PER E-PER"], "BIOES"),
        (["U-PER O", "B-PER L-PER"], "BIOES"),
        (["NOUN VERB"], None),
        (["O O"], None),
    ],
)
def test_schemes_are_told_apart(sentences, scheme):
    assert scheme_of([sentence.split() for sentence in sentences]) == scheme


def test_iob1_becomes_iob2():
    assert iob2(["I-PER", "I-PER", "B-PER", "O", "I-LOC", "I-PER"]) == [
        "B-PER",
        "I-PER",
        "B-PER",
        "O",
        "B-LOC",
        "B-PER",
    ]


@pytest.mark.parametrize(
    ("tags", "scheme", "what"),
    [
        ("O I-PER", "IOB2", "'I-PER' follows 'O', and continues nothing"),
        ("B-PER I-LOC", "IOB2", "'I-LOC' follows 'B-PER'"),
        ("B-PER O", "BIOES", "'B-PER' is not continued"),
        ("B-PER", "BIOES", "'B-PER' is not continued"),
        ("S-PER E-PER", "BIOES", "'E-PER' follows 'S-PER'"),
        ("B-PER I-PER O B-LOC", "IOB2", None),
        ("B-PER I-PER E-PER S-LOC O", "BIOES", None),
        ("NOUN VERB", None, None),
    ],
)
def test_tags_that_cannot_be_are_known(tags, scheme, what):
    problem = invalid(tags.split(), scheme)
    assert problem is None if what is None else what in problem


def test_files_are_read_as_published(tmp_path):
    path = tmp_path / "conll.txt"
    path.write_text("-DOCSTART- -X- O O\n\nAnn NNP I-NP I-PER\nlives VBZ I-VP O\n\n\nRome NNP I-NP I-LOC\n")
    own = task()
    examples = own.read(str(path), labelled=True)
    assert examples.words == [["Ann", "lives"], ["Rome"]]
    assert examples.tags == [["B-PER", "O"], ["B-LOC"]]  # IOB1 in the file
    assert task(tag_column=1).read(str(path), labelled=True).tags == [["NNP", "VBZ"], ["NNP"]]
    assert own.read(write(tmp_path / "words.conll", "Ann lives"), labelled=False).tags is None
    assert own.learn_labels(examples)["id2label"] == {0: "O", 1: "B-LOC", 2: "B-PER"}


def test_bad_sentences_are_named_or_left_out(tmp_path):
    path = write(tmp_path / "a.conll", "Ann/B-PER", "Bob/O Rome/I-LOC", "lives", "Rome/B-LOC")
    with pytest.raises(ValueError, match=r"a\.conll, line 6: 1 columns, of which none is the tag"):
        task().read(path, labelled=True)
    own = task(on_bad_rows="skip")
    assert own.read(path, labelled=True).words == [["Ann"], ["Rome"]]
    assert own.bad.count == 2
    own = task()
    odd = own.read(write(tmp_path / "b.conll", "Ann/B-PER Acme/B-ORG"), labelled=True)
    with pytest.raises(ValueError, match=r"line 1: the tag 'B-ORG' is none of those known: O, B-PER"):
        own.featurize(odd, train_tokenizer(["ann acme"], 64), 32)


def outputs_for(own: TagTask, examples, features, tags: list[list[str]]) -> list[np.ndarray]:
    """Logits that say these tags at the first token of each word, and something else at all others."""
    outputs = []
    for (sentence, words, places), length in zip(examples.pieces, features.lengths, strict=True):
        logits = np.full((length, len(NAMES)), 0.0)
        logits[:, 4] = 1.0
        logits[places] = np.eye(len(NAMES))[[NAMES.index(tags[sentence][word]) for word in words]]
        outputs.append(logits)
    return outputs


@pytest.mark.parametrize("max_length", [32, 7])
def test_the_first_token_of_a_word_has_its_tag_and_parts_are_put_together(max_length, tokenizer, tmp_path):
    own = task()
    sentences = ["ann/B-PER understanding/I-PER lives/O in/O new/B-LOC york/I-LOC", "rome/B-LOC"]
    examples = own.read(write(tmp_path / "a.conll", *sentences), labelled=True)
    examples, features = own.featurize(examples, tokenizer, max_length)
    assert (features.lengths <= max_length).all()
    assert (len(features) > 2) == (max_length == 7)
    labels = features.labels["labels"]
    assert [NAMES[label] for label in labels[labels >= 0]] == [tag for tags in examples.tags for tag in tags]
    assert (labels == -100).sum() >= 2 * len(features) + 3  # [CLS], [SEP], and what goes on with a word
    predicted = [["B-PER", "I-PER", "O", "O", "B-LOC", "O"], ["B-LOC"]]
    outputs = outputs_for(own, examples, features, predicted)
    answers = list(own.answers(examples, features, outputs))
    assert [answer["tags"] for answer in answers] == predicted
    assert answers[0]["entities"][0] == {"type": "PER", "text": "ann understanding", "start": 0, "end": 2}
    measured = own.measure(examples, features, outputs)
    assert (measured["precision"], measured["recall"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert measured["accuracy"] == pytest.approx(6 / 7)
    own.write(tmp_path, "dev", examples, features, outputs)
    assert (tmp_path / "predictions_dev.conll").read_text().splitlines()[5] == "york\tI-LOC\tO"
    names, counts = own.confusion(examples, features, outputs)
    assert counts[names.index("I-LOC"), names.index("O")] == 1
    assert counts.sum() == 7


def test_a_word_that_is_longer_than_a_sequence_is_cut(tokenizer):
    own = task()
    examples, features = own.featurize(own.parse(["understanding ann"]), tokenizer, 4)
    assert features.cut == 1
    assert [words.tolist() for _, words, _ in examples.pieces] == [[0], [1]]
    assert (features.lengths <= 4).all()


def test_a_word_of_which_nothing_is_left_is_outside(tokenizer):
    own = task()
    examples, features = own.featurize(own.parse(["ann \u200b rome", ""]), tokenizer, 16)
    outputs = outputs_for(own, examples, features, [["B-PER", "B-LOC", "B-LOC"], []])
    assert [answer["tags"] for answer in own.answers(examples, features, outputs)] == [["B-PER", "O", "B-LOC"], []]


def test_wnut_is_read_whole(shared_data):
    counts = {"train": 3394, "dev": 1009, "test": 1287}
    for split, count in counts.items():
        examples = task().read(str(shared_data / "wnut17" / f"{split}.conll.gz"), labelled=True)
        assert len(examples) == count
        assert scheme_of(examples.tags) == "IOB2"
