"""Tag schemes of named entities: IOB1, IOB2 (BIO) and BIOES (BILOU), and the entities that tags mark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

OUTSIDE = "O"
_BILOU_TO_BIOES = {"L": "E", "U": "S"}


class Entity(NamedTuple):
    """An entity of words `start` to `end`, end exclusive."""

    kind: str
    start: int
    end: int


def entities(tags: Sequence[str]) -> list[Entity]:
    """Return the entities that IOB2 or BIOES tags mark, as conlleval does: a stray I or E begins an entity."""
    found, kind, start = [], None, 0
    for position, tag in enumerate([*tags, OUTSIDE]):
        letter, _, tag_kind = tag.partition("-")
        continues = letter in ("I", "E") and tag_kind == kind
        if kind is not None and not continues:
            found.append(Entity(kind, start, position))
            kind = None
        if letter in ("B", "S", "I", "E") and tag_kind and not continues:
            kind, start = tag_kind, position
        if letter in ("S", "E") and kind is not None:
            found.append(Entity(kind, start, position + 1))
            kind = None
    return found


def detect_scheme(sentences: Sequence[Sequence[str]]) -> str | None:
    """Return "IOB1", "IOB2" or "BIOES", whichever the tags of `sentences` follow; None if they mark no entities."""
    tags = {tag for sentence in sentences for tag in sentence}
    letters = {tag[0] for tag in tags if tag[1:2] == "-"}
    if not letters or not all(tag == OUTSIDE or tag[1:2] == "-" for tag in tags) or letters - set("BIOESLU"):
        return None
    if letters & set("ESLU"):
        return "BIOES"
    # IOB1 begins entities with I, and uses B only after another entity of the same kind.
    i_begins_entity, b_follows_other = (
        any(not _follows_same_kind(tags, position) for tags in sentences for position in _positions(tags, letter))
        for letter in "IB"
    )
    return "IOB1" if i_begins_entity and not b_follows_other else "IOB2"


def tag_error(tags: Sequence[str], scheme: str | None) -> str | None:
    """Return what violates the scheme in a sentence's tags; None if they are valid."""
    if scheme in (None, "IOB1"):
        return None
    previous = OUTSIDE
    for tag in [*map(bioes_tag, tags), OUTSIDE]:
        letter, previous_letter = tag[0], previous[0]
        if letter in "IE" and not (previous_letter in "BI" and previous[1:] == tag[1:]):
            return f"the tag {tag!r} after {previous!r} continues no entity ({scheme})"
        if scheme == "BIOES" and previous_letter in "BI" and letter not in "IE":
            return f"the tag {previous!r} is not continued ({scheme})"
        previous = tag
    return None


def iob1_to_iob2(tags: Sequence[str]) -> list[str]:
    """Convert IOB1, where B only separates adjacent entities of a kind, to IOB2, where B begins every entity."""
    return [
        "B" + tag[1:] if tag[0] == "I" and not _follows_same_kind(tags, position) else tag
        for position, tag in enumerate(tags)
    ]


def bioes_tag(tag: str) -> str:
    """Return a BILOU tag as its BIOES equivalent, and any other tag unchanged."""
    return _BILOU_TO_BIOES.get(tag[0], tag[0]) + tag[1:] if tag[1:2] == "-" else tag


def _positions(tags: Sequence[str], letter: str) -> Iterator[int]:
    return (position for position, tag in enumerate(tags) if tag[0] == letter)


def _follows_same_kind(tags: Sequence[str], position: int) -> bool:
    """Return whether the tag before `position` belongs to an entity of the same kind."""
    return position > 0 and tags[position - 1][1:] == tags[position][1:] and tags[position - 1] != OUTSIDE
