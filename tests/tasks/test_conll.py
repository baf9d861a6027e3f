"""CoNLL files as they are found: separators, comments, headers, and rows that cannot be read."""

from pathlib import Path

import pytest

from bertfast.tasks.conll import read_sentences
from bertfast.tasks.rows import BadRows


def read(path: Path, text: str, column: int = -1, *, labelled: bool = True, skip: bool = False) -> list:
    """Return (words, tags) of each sentence of a file of this text."""
    path.write_bytes(text.encode())
    sentences = read_sentences(path, column, BadRows("skip" if skip else "stop"), labelled=labelled)
    return [(sentence.words, sentence.tags) for sentence in sentences]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("10\u00a0000\tB-NUM\neuros\tO\n\na\tO\n", [["10\u00a0000", "euros"], ["a"]]),
        ("New York\tB-LOC\nrocks\tO\n\na\tO\n", [["New York", "rocks"], ["a"]]),
        ("John\tO\n\u00a0\tO\n \tO\nruns\tO\n", [["John", "\u00a0", " ", "runs"]]),
        ("10\u00a0000 B-NUM\neuros O\n", [["10\u00a0000", "euros"]]),  # a no-break space separates no columns
        ("a\u2028b\u0085 O\n", [["a\u2028b\u0085"]]),
        ("Ann  NNP\t O \nruns VBZ O\nnow RB O\n", [["Ann", "runs", "now"]]),  # spaces, and a stray tab
        ("\ufeffAnn\tO\r\n \t \r\nBob\tO", [["Ann"], ["Bob"]]),  # byte-order mark, CRLF, no last line end
        ("Ann O\rBob O\r\rEve O\r", [["Ann", "Bob"], ["Eve"]]),  # CR
        ("Ann O\r\nBob O\n\nEve O\rIda O\n", [["Ann", "Bob"], ["Eve", "Ida"]]),  # mixed
        ("-DOCSTART- -X- O\n\nAnn NNP O\n-DOCSTART- -X- O\nBob NNP O\n", [["Ann"], ["Bob"]]),
        ("-DOCSTART- (1 a)\n\nAnn\tO\n", [["Ann"]]),
        ("word\ttag\nAnn\tO\n", [["Ann"]]),  # a header
        (
            "# id 1\tdomain=en\nJohn _ _ B-PER\nruns _ _ O\n\n# id 2\tdomain=en\nParis _ _ O\n",
            [["John", "runs"], ["Paris"]],
        ),
        ("# text = a b\n# id = 2\na\tO\n\n#begin document (x);\n\nb\tO\n\n#end document\n", [["a"], ["b"]]),
        ("#\tO\n1\tO\n\n#tag\tB-X\na\tO\n", [["#", "1"], ["#tag", "a"]]),  # words that begin with #
        ("# # O\n1 CD O\n\na DT O\n# # O\n", [["#", "1"], ["a", "#"]]),
    ],
)
def test_words_and_sentences_are_found(text, sentences, tmp_path):
    found = read(tmp_path / "a.conll", text)
    assert [words for words, _ in found] == sentences
    assert all(len(words) == len(tags) for words, tags in found)
    assert [words for words, _ in read(tmp_path / "a.conll", text, labelled=False)] == sentences


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Ann O\nBob\nEve O\n", "line 2: 1 column where most lines have 2; separate columns by tabs"),
        ("Ann O\nNew York O\nEve O\n", "line 2: 3 columns where most lines have 2; separate columns by tabs"),
        ("Ann\tO\nBob\tx\tO\nEve\tO\n", "line 2: 3 columns where most lines have 2"),
        ("Ann\tO\n\tO\n", "line 2: there is no word in the first column"),
        ("Ann\tO\nBob\t\n", "line 2: there is no tag in column 1"),
        ("Ann\tO\nBob\t_\n", "line 2: there is no tag in column 1"),
    ],
)
def test_malformed_rows_name_the_line_and_are_skipped(text, message, tmp_path):
    text += "\nOle\tO\n".replace("\t", "\t" if "\t" in text else " ")
    with pytest.raises(ValueError, match=rf"a\.conll, {message}"):
        read(tmp_path / "a.conll", text)
    assert read(tmp_path / "a.conll", text, skip=True) == [(["Ole"], ["O"])]


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", -1, "has no sentences"),
        ("\n\n", -1, "has no sentences"),
        ("-DOCSTART- O\n", -1, "has no sentences"),
        ("Ann\nBob\n", -1, "has one column, the words, so --tag-column -1 is no column of tags"),
        ("Ann NNP O\n", 3, "has 3 columns, so --tag-column 3 is no column of tags: choose one from 1 to 2"),
        ("Ann NNP O\n", 0, "--tag-column 0 is no column of tags"),
        ("\t".join(["1", "Ann", *"_" * 8]) + "\n", 3, r"is in CoNLL-U format.*cut -f2,4 a\.conll"),
    ],
)
def test_files_without_words_or_tags_are_refused(text, column, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.conll", text, column)


@pytest.mark.parametrize("line", ["Bob O", "# a comment"])
def test_lines_without_tabs_are_no_words_where_tabs_separate(line, tmp_path):
    with pytest.raises(ValueError, match="line 2: 1 column where most lines have 2; separate columns by tabs"):
        read(tmp_path / "a.conll", f"Ann\tO\n{line}\nEve\tO\n", labelled=False)


def test_words_without_tags_are_read_where_tags_are_optional(tmp_path):
    path = tmp_path / "a.conll"
    assert read(path, "Ann\n#\n\n#tag\n", labelled=False) == [(["Ann", "#"], None), (["#tag"], None)]
    assert read(path, "Ann\tO\nBob\n\nEve\tO\n", labelled=False) == [(["Ann", "Bob"], None), (["Eve"], ["O"])]
    assert read(path, "Ann\t_\nBob\t_\n", labelled=False) == [(["Ann", "Bob"], None)]


COUNTED = "numbers that count words in most rows: keep the words and their tags, for example by "


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1\tthe\tO\n2\tfilm\tB-X\n\n1\ta\tO\n2\tb\tO\n", COUNTED + r"cut -f2,3 a\.conll"),
        ("0 the O\n1 film B-X\n\n0 a O\n1 b O\n", COUNTED + r"awk '\{print \$2, \$3\}' a\.conll"),
        ("57 the O\n58 film B-X\n\n59 a O\n60 b O\n", COUNTED),  # over all sentences, in a part of a file
        ("1\tthe\n2\tfilm\n\n1\ta\n", COUNTED + r"cut -f2 a\.conll"),
        ("1 CD\n2 CD\n3 CD\n", COUNTED),  # two columns without tags of entities: a word and its index
        # Ranges precede the words that they join, and empty nodes follow a word; 0.1 precedes the first.
        ("1-2\tdu\t_\n1\tde\tO\n2\tle\tO\n3-4\tau\t_\n3\tà\tO\n4\tle\tO\n", COUNTED),
        ("0.1 x O\n1 a O\n1.1 y O\n1.2 z O\n2 b O\n2.1 c O\n", COUNTED),
        # Numbers of sentences, or words that are numbers: nobody can tell.
        ("7\tthe\tO\n7\tfilm\tO\n7\twas\tO\n9\ta\tO\n", r"numbers in most rows: if they are indices, type "
         r"cut -f2,3 a\.conll, and if they are words, cut -f1,3 a\.conll"),
        ("10 CD O\n3.5 CD O\n1984 CD O\nfilm NN O\n", r"numbers in most rows: if they are indices, type "
         r"awk '\{print \$2, \$3\}' a\.conll, and if they are words, awk '\{print \$1, \$3\}' a\.conll"),
        ("O the\nB-X film\nO was\n", "tags in most rows: put the words into the first column and their tags into"),
    ],
)  # fmt: skip
def test_indices_or_tags_instead_of_words_are_refused(rows, message, tmp_path):
    with pytest.raises(ValueError, match=rf"a\.conll, line 1: the first column holds {message}"):
        read(tmp_path / "a.conll", rows)


@pytest.mark.parametrize("rows", ["1 B-ORD\n2 B-ORD\n3 O\n", "1\tO\n2\tO\n", "555 B-TEL\n7001 B-TEL\n12 O\n"])
def test_words_that_are_numbers_are_read_if_nothing_else_can_be_the_words(rows, tmp_path):
    [(words, tags)] = read(tmp_path / "a.conll", rows)
    assert all(map(str.isdigit, words))
    assert len(tags) == len(words)


def test_a_few_numbers_are_words(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("1 O\nfilm O\nO O\ngood B-X\n1984 O\n")
    [sentence] = read_sentences(path, -1, BadRows(), labelled=True)
    assert sentence.words == ["1", "film", "O", "good", "1984"]
