"""A part of every corpus is held out for validation, also of one document."""

import pytest

from bertfast.data.held_out import HeldOut

SENTENCES = [f"Sentence {i} of the text." for i in range(200)]


def divide(percentage, documents):
    """Return the sentences of training and validation, in order."""
    rule = HeldOut.of_corpus(percentage, lambda: iter(documents))
    splits = [rule.divide(document) for document in documents]
    return tuple([sentence for split in splits for sentence in split[i]] for i in (0, 1))


def test_the_validation_split_is_fixed_and_grows_with_the_percentage():
    documents = [[f"document {i}", "and its text"] for i in range(4000)]
    ten, twenty = (
        {i for i, document in enumerate(documents) if HeldOut.of_corpus(p, lambda: iter(documents)).holds(document)}
        for p in (10, 20)
    )
    assert abs(len(ten) - 400) < 4 * (4000 * 0.1 * 0.9) ** 0.5
    assert ten < twenty
    assert not any(HeldOut.share(0).holds(document) for document in documents)
    assert all(HeldOut.share(100).holds(document) for document in documents)
    assert min(ten) == 11  # the split of a corpus must not change between versions


def test_a_large_corpus_is_read_only_until_it_is_clear_that_hashes_suffice():
    read = []

    def documents():
        for i in range(100_000):
            read.append(i)
            yield [f"document {i}", "and its text"]

    assert HeldOut.of_corpus(5, documents) == HeldOut.share(5)
    assert len(read) < 1000


@pytest.mark.parametrize("document", [SENTENCES, [" ".join(SENTENCES)]], ids=["lines", "one paragraph"])
@pytest.mark.parametrize(("percentage", "number"), [(0, 0), (0.001, 2), (5, 10), (90, 100)])
def test_the_end_of_one_document_is_held_out(document, percentage, number):
    train, validation = divide(percentage, [document])
    assert (train, validation) == (SENTENCES[: 200 - number], SENTENCES[200 - number :])


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("works", [1, 2, 12])
def test_both_splits_of_a_few_works_have_a_pair_of_sentences(works, seed):
    documents = [[f"Work {i} of {seed}.", *SENTENCES[: 3 + i % 5]] for i in range(works)]
    train, validation = divide(5, documents)
    assert min(len(train), len(validation)) >= 2
    assert sorted(train + validation) == sorted(sentence for document in documents for sentence in document)


def test_whole_documents_are_held_out_if_all_are_short():
    train, validation = divide(5, [[sentence] for sentence in SENTENCES[:8]])
    assert (len(train), len(validation)) == (6, 2)


def test_a_text_of_three_sentences_is_refused_with_what_is_required():
    message = "the text has 3 sentences and at least 4 are required, of which 2 are held out for validation: use more"
    with pytest.raises(ValueError, match=message):
        divide(5, [SENTENCES[:2], SENTENCES[2:3]])
