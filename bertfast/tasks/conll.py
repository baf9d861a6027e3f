"""CoNLL files: one word per line with its tag in a column, and an empty line between sentences.

Columns are separated by tabs, where words may contain spaces, or by spaces. Which, and how many columns there are, is
decided once per file, from its first lines. Comments and -DOCSTART- lines are skipped.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from bertfast.data.text_files import read_lines, require_rereadable
from bertfast.runtime.settings import counted
from bertfast.tasks.rows import BadRows
from bertfast.tasks.tables import SUFFIXES

_TAG = r"O|[BIESLU]-\S+"
_INDEX = r"(\d{1,9})(?:([-.])\d{1,9})?"  # of a word in a sentence; a range, 1-2, or an empty node, 1.1, of CoNLL-U
_NO_TAG = ("", "_")  # what stands in the column of tags where a word has none
_SUFFIXES = (".conll", ".iob", ".bio")
_TSV = {suffix for suffix in SUFFIXES if suffix.startswith(".tsv")}  # tabs also separate the columns of CoNLL files
_DOCUMENT_START = "-DOCSTART-"
_BLANK = " \t\r\n"  # other white space, such as a no-break space, may be part of a word
_SAMPLE = 1000  # lines from which the format is detected
_TEXT_HEADERS = ("sentence", "sentence1", "text")  # first columns of tables of texts
_WORD_HEADERS = ("word", "words", "token", "tokens", "form")  # first columns of CoNLL files with a header
_CONLL_U_COLUMNS = 10


class Sentence(NamedTuple):
    """A sentence of a file.

    Attributes:
        words: Its words.
        tags: Their tags; None: a word has none.
        number: Number of the sentence in the file, from 1.
        line: Number of its first line, from 1.
    """

    words: list[str]
    tags: list[str] | None
    number: int
    line: int


@dataclass(frozen=True)
class Format:
    """The columns of a file.

    Attributes:
        path: The file.
        tabs: Whether tabs separate columns; else spaces and tabs do.
        num_columns: Number of columns.
        tag_column: Index of the tag in a row, from 0; None: there is no column of tags.
        tags: Tags of the first lines.
        header: Number of the line that names the columns; 0: there is none.
    """

    path: Path
    tabs: bool
    num_columns: int
    tag_column: int | None
    tags: frozenset[str]
    header: int

    @classmethod
    def detect(cls, path: Path, tag_column: int) -> Format:
        """Detect the format from the first lines of a file.

        Args:
            path: The file.
            tag_column: The setting: index of the tag in a row, from 0; negative: from the last.

        Raises:
            ValueError: It is another kind of file, such as a table of texts.
        """
        filled = ((number, line) for number, line in read_lines(path, universal=True) if not _separates(line))
        sample = list(islice(filled, _SAMPLE))
        rows = [(number, line) for number, line in sample if line[0] != "#"] or sample
        if not rows:
            raise ValueError(f"{path} has no sentences: it must have one word and its tag per line")
        tabs = 2 * sum("\t" in line.strip(_BLANK) for _, line in rows) > len(rows)
        split = [_fields(line, tabs) for _, line in rows]
        ((num_columns, _),) = Counter(map(len, split)).most_common(1)
        _require_conll(path, rows[0][0], split, tabs)
        index = tag_column if tag_column >= 0 else num_columns + tag_column
        has_tags = 0 < index < num_columns
        tags = frozenset(fields[index].strip() for fields in split if has_tags and len(fields) == num_columns)
        header = rows[0][0] if num_columns > 1 and split[0][0].lower() in _WORD_HEADERS else 0
        return cls(path, tabs, num_columns, index if has_tags else None, tags, header)

    def require_tags(self, tag_column: int) -> None:
        """Raise ValueError, naming the setting `tag_column`, if there is no such column of tags."""
        if self.tag_column is None:
            columns = f"{self.num_columns} columns" if self.num_columns > 1 else "one column, the words"
            raise ValueError(
                f"{self.path} has {columns}, so --tag-column {tag_column} is no column of tags"
                + (f": choose one from 1 to {self.num_columns - 1}" if self.num_columns > 1 else "")
            )

    def fields(self, line: str) -> list[str]:
        """Return the columns of a line."""
        return _fields(line, self.tabs)

    def is_comment(self, line: str) -> bool:
        """Return whether the first line of a sentence, which begins with #, is a comment.

        It is a row if it is the word # or a hashtag with as many columns as the file has. A comment may have as many:
        where spaces separate columns, the tag decides.
        """
        fields = self.fields(line)
        if len(fields) != self.num_columns:
            return len(line.split()) > 1
        if self.tabs:
            return fields[0].startswith("# ")
        return fields[0] == "#" and self.tag_column is not None and fields[self.tag_column].strip() not in self.tags

    def word_and_tag(self, line: str, *, labelled: bool) -> tuple[str, str, str | None]:
        """Return the word and the tag of a row, "" if it has none, and what is wrong with the row, if anything.

        Args:
            line: The row.
            labelled: Whether it must have a tag; if not, it may have the word alone, without spaces.
        """
        fields, problem = self.fields(line), None
        if len(fields) != self.num_columns and (labelled or len(fields) > 1 or " " in fields[0].strip()):
            remedy = "; separate columns by tabs" + ("" if self.tabs else " where words contain spaces")
            problem = f"{counted(len(fields), 'column')} where most lines have {self.num_columns}{remedy}"
        tag = fields[self.tag_column].strip() if self.tag_column is not None and self.tag_column < len(fields) else ""
        if not fields[0]:
            problem = problem or "there is no word in the first column"
        if tag in _NO_TAG:
            tag = ""
            if labelled:
                problem = problem or f"there is no tag in column {self.tag_column}, counted from 0"
        return fields[0].strip(_BLANK) or fields[0], tag, problem


def read_sentences(path: Path, tag_column: int, bad: BadRows, *, labelled: bool) -> Iterator[Sentence]:
    """Yield the sentences of a file.

    Args:
        path: The file, compressed or not.
        tag_column: Index of the tag in a row, from 0; negative: from the last.
        bad: Collects sentences with a malformed row.
        labelled: Whether each word must have a tag.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a CoNLL file, or a sentence cannot be used and bad rows are not skipped.
    """
    require_rereadable(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    columns = Format.detect(path, tag_column)
    if labelled:
        columns.require_tags(tag_column)
    words: list[str] = []
    tags: list[str] = []
    sentences, first, problem = 0, 0, None
    for number, line in chain(read_lines(path, universal=True), [(0, "")]):  # an empty line after the last sentence
        if _separates(line):
            sentences += bool(words)
            if problem is not None:
                bad.add(f"{path}, {problem}", file=str(path), row=sentences)
            elif words:
                yield Sentence(words, tags if len(tags) == len(words) else None, sentences, first)
            words, tags, first, problem = [], [], 0, None
        elif number != columns.header and not (line[0] == "#" and not words and columns.is_comment(line)):
            word, tag, row_problem = columns.word_and_tag(line, labelled=labelled)
            if row_problem is not None and problem is None:
                problem = f"line {number}: {row_problem}"
            first = first or number
            words.append(sys.intern(word))
            if tag:
                tags.append(sys.intern(tag))


def is_tagged(path: Path) -> bool:
    """Return whether a file named like a table is a CoNLL file, with tags such as B-ORG and O in its last column."""
    lines = [line for _, line in islice(read_lines(path, universal=True), _SAMPLE)]
    rows = [_fields(line, tabs=True) for line in lines if not _separates(line)]
    tags = {row[-1].strip() if len(row) > 1 else "" for row in rows}
    return "O" in tags and all(re.fullmatch(_TAG, tag) for tag in tags)


def split_words(line: str) -> list[str]:
    """Return the words of a line, separated by spaces or tabs."""
    return [word for word in _fields(line, tabs=False) if word]


def _separates(line: str) -> bool:
    """Return whether a line stands between sentences."""
    return not line.strip(_BLANK) or line.split(maxsplit=1)[:1] == [_DOCUMENT_START]


def _fields(line: str, tabs: bool) -> list[str]:
    return line.rstrip("\r\n").split("\t") if tabs else re.split("[ \t]+", line.strip(_BLANK))


def _require_conll(path: Path, number: int, rows: list[list[str]], tabs: bool) -> None:
    """Raise ValueError if the first rows of a file are from a table of texts, or from a CoNLL-U file.

    Args:
        path: The file.
        number: Line number of the first row.
        rows: Columns of each row.
        tabs: Whether tabs separate columns.
    """
    is_table = path.name.endswith(tuple(set(SUFFIXES) - _TSV)) or ".json" in path.suffixes[-2:]
    is_header = rows[0][0] in _TEXT_HEADERS and len(rows[0]) > 1
    of_texts = tabs and 2 * sum(" " in row[0].strip() for row in rows) > len(rows)
    if is_table or is_header or (of_texts and not {*path.suffixes[-2:]} & {*_SUFFIXES}):
        raise ValueError(
            f"{path}, line {number}: not a CoNLL file, which has one word and its tag per line and an empty line "
            "between sentences: for a label per text use --task sequence-classification"
        )
    if all(len(row) == _CONLL_U_COLUMNS and _is_number(row[0]) for row in rows):
        raise ValueError(
            f"{path} is in CoNLL-U format, whose words are in the second column: keep the words and their tags, for "
            f"example by cut -f2,4 {path.name}"
        )
    _require_words_first(path, number, [row for row in rows if len(row) > 1], tabs)


def _require_words_first(path: Path, number: int, rows: list[list[str]], tabs: bool) -> None:
    """Raise ValueError if the first column holds tags or indices, or numbers that may be indices; see `_require_conll`.

    Of two columns the first is that of the words if the second one holds tags such as B-ORG, also if it has numbers.
    With more columns, numbers that do not count words may still be those of sentences.
    """
    if not rows:
        return
    first = [row[0] for row in rows]
    kinds = map(_is_tag, first), _count_up(first), map(_is_number, first)
    tags, counted_up, numbers = (2 * sum(kind) > len(rows) for kind in kinds)
    ((num_columns, _),) = Counter(map(len, rows)).most_common(1)
    is_word_and_tag = num_columns == 2 and 2 * sum(_is_tag(row[-1]) for row in rows) > len(rows)
    from_second, from_first = (_cut(path, column, num_columns, tabs) for column in (2, 1))
    if tags:
        found, remedy = "tags", "put the words into the first column and their tags into the last"
    elif counted_up and not is_word_and_tag:
        found, remedy = "numbers that count words", f"keep the words and their tags, for example by {from_second}"
    elif numbers and num_columns > 2:
        found, remedy = "numbers", f"if they are indices, type {from_second}, and if they are words, {from_first}"
    else:
        return
    raise ValueError(f"{path}, line {number}: the first column holds {found} in most rows: {remedy}")


def _is_tag(word: str) -> bool:
    return re.fullmatch(_TAG, word.strip()) is not None


def _is_number(word: str) -> bool:
    return re.fullmatch(_INDEX, word) is not None


def _count_up(words: list[str]) -> Iterator[bool]:
    """Yield, for each word of the first column, whether it continues or begins a count of words, from 0 or 1.

    As in CoNLL-U, the range 3-4 precedes words 3 and 4, and the empty node 4.1 follows word 4; neither is counted.
    """
    last = 0
    for word in words:
        index = re.fullmatch(_INDEX, word)
        if index is None:
            last = 0
            yield False
            continue
        value, kind = int(index[1]), index[2]
        yield value == last if kind == "." else value in (0, 1, last + 1)
        last = last if kind else value


def _cut(path: Path, first: int, last: int, tabs: bool) -> str:
    """Return a command that keeps two columns of a file, counted from 1."""
    columns = [first, last] if last > first else [first]
    if tabs:
        return f"cut -f{','.join(map(str, columns))} {path.name}"
    return f"awk '{{print {', '.join(f'${column}' for column in columns)}}}' {path.name}"
