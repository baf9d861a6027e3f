"""Tag schemes of named entities: IOB1, IOB2 (BIO) and BIOES (BILOU, BMES), and the entities that tags mark.

A tag is O, or a letter that says where in an entity its word is. The entity's type may follow: "B-PER", or "B" alone in
files with entities of one type.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

OUTSIDE = "O"
_TO_BIOES = {"L": "E", "U": "S", "M": "I", "W": "S"}  # letters of BILOU and BMES
_ENTITY_TAG = re.compile("[BIESLUMW](-.*)?", re.DOTALL)


class Entity(NamedTuple):
    """An entity of words `start` to `end`, end exclusive."""

    kind: str
    start: int
    end: int


def entities(tags: Sequence[str]) -> list[Entity]:
    """Return the entities that IOB2 or BIOES tags mark, as conlleval does: a stray I or E begins an entity."""
    found, kind, start = [], None, 0
    for position, tag in enumerate([*map(bioes_tag, tags), OUTSIDE]):
        letter, _, tag_kind = tag.partition("-")
        continues = letter in ("I", "E") and tag_kind == kind
        if kind is not None and not continues:
            found.append(Entity(kind, start, position))
            kind = None
        if letter in ("B", "S", "I", "E") and not continues:
            kind, start = tag_kind, position
        if letter in ("S", "E") and kind is not None:
            found.append(Entity(kind, start, position + 1))
            kind = None
    return found


def mark_entities(names: Iterable[str]) -> bool:
    """Return whether tags of these names mark entities; others, such as parts of speech, are classes of words."""
    names = set(names) - {OUTSIDE}
    return bool(names) and all(map(_ENTITY_TAG.fullmatch, names))


def detect_scheme(sentences: Sequence[Sequence[str]]) -> str | None:
    """Return "IOB1", "IOB2" or "BIOES", whichever most tags other than O follow; None if they mark no entities."""
    counts = Counter(tag for sentence in sentences for tag in sentence if tag != OUTSIDE)
    marking = [tag for tag in counts if _ENTITY_TAG.fullmatch(tag)]
    if 2 * sum(counts[tag] for tag in marking) <= counts.total():
        return None
    letters = {tag[0] for tag in marking}
    if letters - set("BI"):
        return "BIOES"
    # IOB1 begins entities with I, and uses B only after another entity of the same kind.
    i_begins_entity, b_follows_other = (
        any(not _follows_same_kind(tags, position) for tags in sentences for position in _positions(tags, letter))
        for letter in "IB"
    )
    return "IOB1" if i_begins_entity and not b_follows_other else "IOB2"


def tag_error(tags: Sequence[str], scheme: str | None) -> str | None:
    """Return what violates the scheme in a sentence's tags; None if they are valid."""
    if scheme is None:
        return None
    unknown = next((tag for tag in tags if not _is_in_scheme(tag)), None)
    if unknown is not None:
        return f"the tag {unknown!r} is neither O nor begins with B- or I-, as the others do ({scheme})"
    previous = OUTSIDE
    for tag in [*map(bioes_tag, tags), OUTSIDE] if scheme != "IOB1" else ():
        letter, previous_letter = tag[0], previous[0]
        if letter in "IE" and not (previous_letter in "BI" and previous[1:] == tag[1:]):
            return f"the tag {tag!r} after {previous!r} continues no entity ({scheme})"
        if scheme == "BIOES" and previous_letter in "BI" and letter not in "IE":
            return f"the tag {previous!r} is not continued ({scheme})"
        previous = tag
    return None


def converted(tags: Sequence[str], scheme: str | None) -> list[str]:
    """Return IOB1 tags as IOB2, BILOU and BMES tags as BIOES, and any others unchanged."""
    if scheme == "IOB1":
        return iob1_to_iob2(tags)
    return [*map(bioes_tag, tags)] if scheme == "BIOES" else [*tags]


def iob1_to_iob2(tags: Sequence[str]) -> list[str]:
    """Convert IOB1, where B only separates adjacent entities of a kind, to IOB2, where B begins every entity."""
    return [
        sys.intern("B" + tag[1:]) if tag[0] == "I" and not _follows_same_kind(tags, position) else tag
        for position, tag in enumerate(tags)
    ]


@cache  # so that equal tags are one object
def bioes_tag(tag: str) -> str:
    """Return a BILOU or BMES tag as its BIOES equivalent, and any other tag unchanged."""
    return _TO_BIOES.get(tag[0], tag[0]) + tag[1:] if _ENTITY_TAG.fullmatch(tag) else tag


def _is_in_scheme(tag: str) -> bool:
    return tag == OUTSIDE or _ENTITY_TAG.fullmatch(tag) is not None


def _positions(tags: Sequence[str], letter: str) -> Iterator[int]:
    return (position for position, tag in enumerate(tags) if tag[0] == letter and _is_in_scheme(tag))


def _follows_same_kind(tags: Sequence[str], position: int) -> bool:
    """Return whether the tag before `position` belongs to an entity of the same kind."""
    return position > 0 and tags[position - 1][1:] == tags[position][1:] and tags[position - 1] != OUTSIDE
