"""The prose in a documentation string: what remains without code, tables, signatures and markup."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from bertfast.data.sentences import split_sentences

FENCE = re.compile(r"```|~~~")
DIRECTIVE = re.compile(r"\.\. +([\w-]+)::|\.\. ")
PROSE_DIRECTIVES = ("note", "warning", "tip", "hint", "important", "caution", "attention", "danger", "admonition")
RULER = re.compile(r"([^\w\s])\1{2,}|[-=+|~\s]{3,}")  # under a title, or around a table
CITATIONS = ("references", "reference", "see also", "bibliography")
PARAMETER = re.compile(r"[\w.*`, ]+ : ")  # NumPy's style, a line of its own: "name : type"
# What begins an item of a list, or a parameter in the styles of Sphinx and Google; not part of the sentence.
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
    (re.compile(r" (?=[,.;](?: |$))"), ""),  # before a mark, where markup has gone
]
NOT_PROSE = re.compile(r"\w+://|www\.|[\\{}|^`]|>>>|==|:=|->|=>|\b\w+\([^)]*=|\w\[[^]]*\]|\s=\s|@\w+\.")
FUNCTION_WORD = re.compile(
    r"\b(?:the|an?|of|to|is|are|be|in|and|or|for|with|if|that|this|by|on|as|it|from|not)\b", re.I
)
NOT_PLAIN = re.compile(r"[^\w ,.'-]|[\d_]")
WORD = re.compile(r"(?<![\w.])[A-Za-z][a-z]*(?:['-][a-z]+)*(?![\w(])")


def prose_paragraphs(docstring: str) -> list[str]:
    """The paragraphs of English prose in `docstring`, each one line, markup removed."""
    paragraphs = (_prose(" ".join(block)) for block in _text_blocks(inspect.cleandoc(docstring).splitlines()))
    return [paragraph for paragraph in paragraphs if paragraph]


def _text_blocks(lines: list[str]) -> Iterator[list[str]]:
    """Groups of stripped lines that make a paragraph, a list item or a parameter; literal blocks are left out."""
    block: list[str] = []
    block_indent = 0
    literal_indent = None  # within what is literal as long as it is deeper than this
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
    """The sentences of one block that read as English, without markup and the name of a list item."""
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
