"""Extract the prose of a docstring: what remains without code, tables, signatures and markup."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from bertfast.data.sentences import split_sentences

FENCE = re.compile(r"```|~~~")
DIRECTIVE = re.compile(r"\.\. +([\w-]+)::|\.\. ")
PROSE_DIRECTIVES = ("note", "warning", "tip", "hint", "important", "caution", "attention", "danger", "admonition")
RULER = re.compile(r"([^\w\s])\1{2,}|[-=+|~\s]{3,}")  # underlines of titles, borders of tables
CITATIONS = ("references", "reference", "see also", "bibliography")
PARAMETER = re.compile(r"[\w.*`, ]+ : ")  # NumPy style, on a line of its own: "name : type"
# The start of a list item, or of a parameter in Sphinx or Google style, which is not part of the sentence.
ITEM = re.compile(
    r"(?:[-*+•]|\(?\d+[.)]|\(?[a-zA-Z]\))\s+"
    r"|:\w[^:`]*:\s+"
    r"|[\w.*`]+\s*(?:\(.*?\))?:\s+"
    r"|(?:(?:int|float|bool|str|string|list|dict|tuple|callable|array[-_]like|ndarray|or|optional)\b[, ()]*)+(?=[A-Z])"
)
MARKUP = [
    (re.compile(r":[\w:+-]+:`~(?:[\w.]*\.)?(\w+)`"), r"\1"),  # :class:`~a.b.Name`
    (re.compile(r":[\w:+-]+:(?=`)"), ""),  # :class:
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_*"), r"\1"),  # `text <link>`_
    (re.compile(r"\[([^][]+)\]\([^()]*\)"), r"\1"),  # [text](link)
    (re.compile(r"\[`~?([^`]+)`\]"), r"\1"),  # [`name`]
    (re.compile(r"\s?\[[\w#*-]+\]_"), ""),  # [1]_
    (re.compile(r"`+~?\.?([^`]*)`+_*"), r"\1"),  # `name`, `.name` and ``code``
    (re.compile(r"\|(\w[\w ]*)\|"), r"\1"),  # |substitution|
    (re.compile(r"(?<![\w*])(\*{1,2})(\w[^*]*?)\1(?![\w*])"), r"\2"),  # *emphasis* and **more of it**
    (re.compile(r"</?\w[^<>]*>"), ""),  # <Tag>
    (re.compile(r"\s+"), " "),
    (re.compile(r" (?=[,.;](?: |$))"), ""),  # a space before punctuation, left by removed markup
]
NOT_PROSE = re.compile(r"\w+://|www\.|[\\{}|^`]|>>>|==|:=|->|=>|\b\w+\([^)]*=|\w\[[^]]*\]|\s=\s|@\w+\.")
FUNCTION_WORD = re.compile(
    r"\b(?:the|an?|of|to|is|are|be|in|and|or|for|with|if|that|this|by|on|as|it|from|not)\b", re.I
)
NOT_PLAIN = re.compile(r"[^\w ,.'-]|[\d_]")
WORD = re.compile(r"(?<![\w.])[A-Za-z][a-z]*(?:['-][a-z]+)*(?![\w(])")


def prose_paragraphs(docstring: str) -> list[str]:
    """Return the paragraphs of English prose in a docstring, each as a single line without markup."""
    paragraphs = (_prose(" ".join(block)) for block in _text_blocks(inspect.cleandoc(docstring).splitlines()))
    return [paragraph for paragraph in paragraphs if paragraph]


def _text_blocks(lines: list[str]) -> Iterator[list[str]]:
    """Yield the stripped lines of each paragraph, list item or parameter description; literal blocks are skipped."""
    block: list[str] = []
    block_indent = 0
    literal_indent = None  # inside a literal block while lines are indented deeper than this
    fenced = doctest = cited = False
    for line in lines:
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if FENCE.match(text):
            fenced = not fenced
        elif text.startswith(">>>"):
            doctest = True
        elif not text:
            doctest = False
        elif literal_indent is not None and indent <= literal_indent:
            literal_indent = None
        if RULER.fullmatch(text):
            cited = " ".join(block).lower().rstrip(":") in CITATIONS
            block = []
            continue
        directive = DIRECTIVE.match(text)
        literal = fenced or doctest or cited or literal_indent is not None
        if not text or literal or directive or FENCE.match(text) or PARAMETER.match(text):
            if block:
                yield block
            block = []
            if directive and literal_indent is None and directive[1] not in PROSE_DIRECTIVES:
                literal_indent = indent
            continue
        item = ITEM.match(text)
        deeper = block and indent > block_indent and not ITEM.match(block[0])
        if block and (item or deeper or indent < block_indent):
            yield block
            block = []
        if not block:
            block_indent = indent
        block.append(text)
        if text.endswith("::"):
            literal_indent = indent
    if block:
        yield block


def _prose(text: str) -> str:
    """Return the English sentences of a block, without markup and without the label of a list item."""
    while item := ITEM.match(text):
        text = text[item.end() :]
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return " ".join(filter(_is_english, split_sentences(text.strip().replace("::", ":"))))


def _is_english(sentence: str) -> bool:
    words = WORD.findall(sentence)
    return (
        len(words) >= 3
        and sentence[0].isalpha()
        and (sentence[0].isupper() or sentence[-1] in ".!?")
        and sentence[-1] != ":"
        and len(NOT_PLAIN.findall(sentence)) <= 0.1 * len(sentence)
        and sum(map(len, words)) >= 0.6 * len(sentence)
        and bool(FUNCTION_WORD.search(sentence))
        and not NOT_PROSE.search(sentence)
    )
