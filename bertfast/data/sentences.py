"""Split English paragraphs into sentences by rules, fast enough for a corpus.

A sentence ends at a full stop, an exclamation or a question mark, with the quotes and brackets that close behind it,
where white space and something other than a small letter follow. A full stop may also belong to its word; the sets
below say to which, in lower case and without the last stop.
"""

from __future__ import annotations

import re

END = re.compile(r"""[.!?…]["'”’»)\]]*(\s+)(?=["'“‘«(\[]*([^\W_a-zß-öø-ÿ]\w*))""")

# A name follows, so the sentence goes on.
BEFORE_A_NAME = frozenset(
    [
        "mr",
        "mrs",
        "ms",
        "dr",
        "prof",
        "rev",
        "hon",
        "st",
        "mt",
        "gen",
        "col",
        "capt",
        "lt",
        "sgt",
        "maj",
        "adm",
        "cmdr",
        "gov",
        "sen",
        "rep",
        "pres",
        "messrs",
        "mme",
        "mlle",
        "v",
        "vs",
        "c",
        "ca",
        "b",
        "d",
        "r",
        "cf",
        "viz",
        "e.g",
        "i.e",
        "eds",
        "trans",
    ]
)
# The sentence goes on where a number follows.
BEFORE_A_NUMBER = frozenset(
    [
        "no",
        "nos",
        "vol",
        "vols",
        "fig",
        "figs",
        "eq",
        "eqs",
        "sec",
        "ch",
        "pp",
        "pg",
        "p",
        "art",
        "approx",
        "jan",
        "feb",
        "mar",
        "apr",
        "jun",
        "jul",
        "aug",
        "sep",
        "sept",
        "oct",
        "nov",
        "dec",
    ]
)
# The sentence goes on unless a word follows that commonly opens one.
ANYWHERE = frozenset(
    [
        "jr",
        "sr",
        "inc",
        "ltd",
        "co",
        "corp",
        "bros",
        "etc",
        "al",
        "u.s",
        "u.k",
        "u.n",
        "u.s.a",
        "d.c",
        "a.m",
        "p.m",
        "b.c",
        "a.d",
        "ph.d",
    ]
)
OPENING_WORDS = frozenset(
    [
        "The",
        "A",
        "An",
        "In",
        "On",
        "At",
        "It",
        "Its",
        "He",
        "She",
        "They",
        "We",
        "You",
        "I",
        "His",
        "Her",
        "Their",
        "This",
        "That",
        "These",
        "Those",
        "There",
        "As",
        "By",
        "For",
        "From",
        "If",
        "When",
        "While",
        "After",
        "Before",
        "But",
        "And",
        "However",
        "Although",
        "Since",
        "During",
        "With",
        "Some",
        "Many",
        "Most",
        "Other",
        "To",
    ]
)


def split_sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, stripped; together they hold every word of it, in order."""
    sentences, start = [], 0
    for end in END.finditer(paragraph):
        if paragraph[end.start()] == "." and _belongs_to_word(paragraph, start, end):
            continue
        sentences.append(paragraph[start : end.start(1)].strip())
        start = end.end()
    sentences.append(paragraph[start:].strip())
    return [sentence for sentence in sentences if sentence]


def _belongs_to_word(paragraph: str, start: int, end: re.Match) -> bool:
    """Whether the full stop at `end` is part of the word before it; the sentence began at `start`."""
    word = paragraph[max(start, paragraph.rfind(" ", start, end.start()) + 1) : end.start()].lstrip("\"'“‘«([")
    following = end[2]
    if len(word) == 1 and word.isupper():  # an initial
        return following not in OPENING_WORDS
    word = word.lower()
    if word in BEFORE_A_NAME:
        return True
    if word in BEFORE_A_NUMBER:
        return following[0].isdigit()
    if word in ANYWHERE:
        return following not in OPENING_WORDS
    return not any(map(str.isalpha, paragraph[start : end.start()]))  # the number of a list item
