"""Split English paragraphs into sentences by rules, fast enough for a corpus.

A sentence ends at a full stop, an exclamation mark or a question mark, with any closing quotes and brackets, if white
space and something other than a lower-case letter follow. Full stops of abbreviations do not count: the patterns below
match the abbreviations, in lower case and without their last stop.
"""

from __future__ import annotations

import re

OPENING = "\"'“\u2018«(["  # \u2018 and \u2019 are the curly single quotes
END = re.compile(rf"""[.!?…]["'”\u2019»)\]]*(\s+)(?=[{re.escape(OPENING)}]*([^\W_a-zß-öø-ÿ]\w*))""")

BEFORE_A_NAME = re.compile(
    "mr|mrs|ms|dr|prof|rev|hon|st|mt|gen|col|capt|lt|sgt|maj|adm|cmdr|gov|sen|rep|pres|messrs|mme|mlle|"
    r"v|vs|c|ca|b|d|r|cf|viz|e\.g|i\.e|eds|trans"
)
BEFORE_A_NUMBER = re.compile(
    "no|nos|vol|vols|fig|figs|eq|eqs|sec|ch|p|pp|pg|art|approx|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec"
)
ANYWHERE = re.compile(r"jr|sr|inc|ltd|co|corp|bros|etc|al|u\.s|u\.k|u\.n|u\.s\.a|d\.c|a\.m|p\.m|b\.c|a\.d|ph\.d")
# Words that, after one of ANYWHERE or an initial, start a new sentence far more often than they continue one.
OPENING_WORD = re.compile(
    "The|An?|In|On|At|Its?|He|She|They|We|You|I|His|Her|Their|This|That|These|Those|There|As|By|For|From|If|When|"
    "While|After|Before|But|And|However|Although|Since|During|With|Some|Many|Most|Other|To"
)


def split_sentences(paragraph: str) -> list[str]:
    """Return the sentences of a paragraph, stripped; together they contain all of its words in order."""
    sentences, start = [], 0
    for end in END.finditer(paragraph):
        if paragraph[end.start()] == "." and _belongs_to_word(paragraph, start, end):
            continue
        sentences.append(paragraph[start : end.start(1)].strip())
        start = end.end()
    sentences.append(paragraph[start:].strip())
    return [sentence for sentence in sentences if sentence]


def _belongs_to_word(paragraph: str, start: int, end: re.Match[str]) -> bool:
    """Return whether the full stop at `end` is part of an abbreviation; the sentence starts at `start`."""
    word = paragraph[max(start, paragraph.rfind(" ", start, end.start()) + 1) : end.start()].lstrip(OPENING)
    following: str = end[2]
    if (len(word) == 1 and word.isupper()) or ANYWHERE.fullmatch(word.lower()):
        return not OPENING_WORD.fullmatch(following)
    if BEFORE_A_NAME.fullmatch(word.lower()):
        return True
    if BEFORE_A_NUMBER.fullmatch(word.lower()):
        return following[0].isdigit()
    return not any(map(str.isalpha, paragraph[start : end.start()]))  # the number of a list item
