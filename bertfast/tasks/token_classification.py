"""A tag for each word: names (CoNLL-2003, WNUT-17), parts of speech and the like, a word a line.

The first token of a word has its tag, the others none. Sentences that are too long are read in parts, and put together
again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from bertfast.data.corpus import read_lines
from bertfast.data.tokenizer import special_tokens
from bertfast.encoder import cross_entropy_sum, token_classification_loss, token_logits
from bertfast.models.bert import BertForTokenClassification
from bertfast.models.extensions import BertFeaturesForTokenClassification
from bertfast.ops.reference import IGNORED
from bertfast.tasks.features import Features, ModelInputs
from bertfast.tasks.metrics import confusion
from bertfast.tasks.sequence_classification import label_numbers
from bertfast.tasks.task import Confusion, Outputs, Task, TaskSettings, write_whole

OUTSIDE = "O"
DOCUMENT = "-DOCSTART-"
_OTHER_LETTERS = {"L": "E", "U": "S"}  # BILOU's: BIOES's


class Entity(NamedTuple):
    """Words `start` to `end`, the last not included, of a kind."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Tagged:
    """Sentences as words, and where they are known the tag of each word.

    Attributes:
        where: says of each sentence the file and line.
        pieces: of each sequence of the features, (sentence, its words' numbers, the places of their first tokens).
    """

    words: list[list[str]]
    tags: list[list[str]] | None
    where: list[str]
    pieces: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.words)


class TagTask(Task):
    """Which tag each word has."""

    model = BertForTokenClassification
    of_features = BertFeaturesForTokenClassification
    head = "classifier."
    metrics = ("f1", "precision", "recall", "accuracy")

    def __init__(self, settings: TaskSettings):
        super().__init__(settings)
        self.scheme: str | None = None

    def read(self, path: str, *, labelled: bool) -> Tagged:
        """Lines of a word, other columns and its tag, an empty line between sentences; -DOCSTART- is no sentence."""
        sentences = list(self._sentences(Path(path), labelled))
        if not sentences:
            raise ValueError(f"{path} holds no sentences")
        words, tags, where = (list(column) for column in zip(*sentences, strict=True))
        if not all(map(len, tags)):
            return Tagged(words, None, where)
        scheme = scheme_of(tags)
        kept, proper = [], []
        for row, sentence in enumerate(tags):
            problem = invalid(sentence, scheme)
            if problem is not None:
                self.bad.add(f"{where[row]}: {problem}")
                continue
            kept.append(row)
            proper.append(iob2(sentence) if scheme == "IOB1" else [_letter(tag) for tag in sentence])
        return Tagged([words[row] for row in kept], proper, [where[row] for row in kept])

    def learn_labels(self, examples: Tagged) -> dict[str, Any]:
        """The tags."""
        names = sorted({tag for sentence in examples.tags for tag in sentence}, key=lambda tag: (tag != OUTSIDE, tag))
        if len(names) < 2:
            raise ValueError(f"every tag is {names[0]!r}; to tell words apart, there must be two different ones")
        return {"num_labels": len(names), "id2label": dict(enumerate(names))}

    def featurize(self, examples: Tagged, tokenizer: Tokenizer, max_length: int) -> tuple[Tagged, Features]:
        """A sequence for each sentence, or for each part of one that is too long."""
        special, numbers = special_tokens(tokenizer), label_numbers(self.config)
        if examples.tags is not None:
            good = [row for row in range(len(examples)) if self._known(examples, row, numbers)]
            columns = (examples.words, examples.tags, examples.where)
            examples = Tagged(*([column[row] for row in good] for column in columns))
        ids, labels, lengths, pieces, cut = [], [], [], [], 0
        for sentence, encoding in enumerate(
            tokenizer.encode_batch(examples.words, is_pretokenized=True, add_special_tokens=False)
        ):
            of_token = np.array(encoding.word_ids, np.int64)
            first_of_word = np.flatnonzero(np.diff(of_token, prepend=-1))
            for start, end in _parts(first_of_word, len(of_token), max_length - 2):
                cut += end - start > max_length - 2
                end = min(end, start + max_length - 2)
                firsts = first_of_word[(first_of_word >= start) & (first_of_word < end)]
                pieces.append((sentence, of_token[firsts], firsts - start + 1))
                ids += [special.cls, *encoding.ids[start:end], special.sep]
                lengths.append(end - start + 2)
                if examples.tags is not None:
                    tags = np.full(lengths[-1], IGNORED, np.int64)
                    tags[firsts - start + 1] = [numbers[examples.tags[sentence][word]] for word in of_token[firsts]]
                    labels.append(tags)
        features = Features(
            np.array(ids, np.int32),
            np.zeros(len(ids), np.uint8),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            cut,
            {"labels": np.concatenate(labels)} if labels else {},
        )
        return replace(examples, pieces=pieces), features

    def logits(self, model: PreTrainedModel, inputs: ModelInputs) -> Tensor:
        """[1, T, labels]."""
        if isinstance(model, BertFeaturesForTokenClassification):
            features = inputs.arguments.get("features")
            return model.logits(inputs.packed(model), None if features is None else features[0])[None]
        return token_logits(model, inputs.packed(model))[None]

    def loss(self, model: PreTrainedModel, inputs: ModelInputs, items: Tensor) -> Tensor:
        """Cross entropy of the words' first tokens."""
        labels = inputs.arguments["labels"]
        if isinstance(model, BertFeaturesForTokenClassification):
            return cross_entropy_sum(self.logits(model, inputs)[0], labels) / items
        return token_classification_loss(model, inputs.packed(model), labels, items)

    def answers(self, examples: Tagged, features: Features, outputs: Outputs) -> Iterator[dict]:
        """{"words", "tags", "entities": [{"type", "text", "start", "end"}]}, in words."""
        for words, tags in zip(examples.words, self._tags(examples, outputs), strict=True):
            found = [
                {"type": one.kind, "text": " ".join(words[one.start : one.end]), "start": one.start, "end": one.end}
                for one in entities(tags)
            ]
            yield {"words": words, "tags": tags, "entities": found}

    def measure(self, examples: Tagged, features: Features, outputs: Outputs) -> dict[str, float]:
        """precision, recall and f1 of whole entities, as conlleval has them, and the share of words with their tag."""
        if examples.tags is None:
            return {}
        predicted = self._tags(examples, outputs)
        pairs = list(zip(examples.tags, predicted, strict=True))
        wanted, found = ([{*entities(sentence)} for sentence in column] for column in (examples.tags, predicted))
        right = sum(len(a & b) for a, b in zip(wanted, found, strict=True))
        precision, recall = (right / max(sum(map(len, sets)), 1) for sets in (found, wanted))
        return {
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if right else 0.0,
            "accuracy": float(np.mean([a == b for tags, others in pairs for a, b in zip(tags, others, strict=True)])),
        }

    def write(self, folder: Path, split: str, examples: Tagged, features: Features, outputs: Outputs) -> None:
        """predictions_SPLIT.conll: a word, its tag where it is known, and the one predicted."""
        lines = []
        for row, (words, predicted) in enumerate(zip(examples.words, self._tags(examples, outputs), strict=True)):
            columns = [words, *([] if examples.tags is None else [examples.tags[row]]), predicted]
            lines += ["\t".join(line) for line in zip(*columns, strict=True)] + [""]
        write_whole(folder / f"predictions_{split}.conll", "\n".join(lines) + "\n")

    def confusion(self, examples: Tagged, features: Features, outputs: Outputs) -> Confusion | None:
        """Of words' tags."""
        if examples.tags is None:
            return None
        numbers = label_numbers(self.config)
        wanted, found = (
            np.array([numbers[tag] for sentence in column for tag in sentence])
            for column in (examples.tags, self._tags(examples, outputs))
        )
        names = [self.config.id2label[i] for i in range(self.config.num_labels)]
        return names, confusion(wanted, found, len(names))

    def parse(self, lines: Sequence[str]) -> Tagged:
        """Words with spaces between them, a sentence a line."""
        return Tagged([line.split() for line in lines], None, [""] * len(lines))

    def _sentences(self, path: Path, labelled: bool) -> Iterator[tuple[list[str], list[str], str]]:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        words, tags, where, broken, column = [], [], "", None, self.settings.tag_column
        for number, line in (*read_lines(path), (0, "")):
            fields = line.split()
            if fields and fields[0] != DOCUMENT:
                where = where or f"{path}, line {number}"
                words.append(fields[0])
                if len(fields) > 1 and -len(fields) <= column < len(fields):
                    tags.append(fields[column])
                elif labelled and broken is None:
                    broken = f"{path}, line {number}: {len(fields)} columns, of which none is the tag"
                continue
            if broken is not None:
                self.bad.add(broken)
            elif words:
                yield words, tags if len(tags) == len(words) else [], where
            words, tags, where, broken = [], [], "", None

    def _known(self, examples: Tagged, row: int, numbers: dict[str, int]) -> bool:
        odd = next((tag for tag in examples.tags[row] if tag not in numbers), None)
        if odd is not None:
            self.bad.add(f"{examples.where[row]}: the tag {odd!r} is none of those known: {', '.join(numbers)}")
        return odd is None

    def _tags(self, examples: Tagged, outputs: Outputs) -> list[list[str]]:
        """Of each sentence's words; of those that no token is left of, the first label, O where there is one."""
        names = self.config.id2label
        tags = [[names[0]] * len(words) for words in examples.words]
        for (sentence, words, places), logits in zip(examples.pieces, outputs, strict=True):
            for word, label in zip(words.tolist(), logits[places].argmax(1).tolist(), strict=True):
                tags[sentence][word] = names[label]
        return tags


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities that tags in IOB2 or BIOES mark, read leniently: an I or E that continues none begins one."""
    found, kind, start = [], None, 0
    for place, tag in enumerate([*tags, OUTSIDE]):
        letter, _, own = tag.partition("-")
        goes_on = letter in ("I", "E") and own == kind
        if kind is not None and not goes_on:
            found.append(Entity(kind, start, place))
            kind = None
        if letter in ("B", "S", "I", "E") and own and not goes_on:
            kind, start = own, place
        if letter in ("S", "E") and kind is not None:
            found.append(Entity(kind, start, place + 1))
            kind = None
    return found


def scheme_of(sentences: Sequence[Sequence[str]]) -> str | None:
    """IOB1, IOB2 or BIOES, whichever the tags are in; None: they mark no entities."""
    tags = {tag for sentence in sentences for tag in sentence}
    letters = {tag[0] for tag in tags if tag[1:2] == "-"}
    if not letters or not all(tag == OUTSIDE or tag[1:2] == "-" for tag in tags) or letters - set("BIOESLU"):
        return None
    if letters & set("ESLU"):
        return "BIOES"
    begun_by_i, first_by_b = (
        any(not _follows_its_kind(sentence, place) for sentence in sentences for place in _places(sentence, letter))
        for letter in "IB"
    )
    return "IOB1" if begun_by_i and not first_by_b else "IOB2"


def invalid(tags: Sequence[str], scheme: str | None) -> str | None:
    """What is wrong with a sentence's tags; None: nothing."""
    if scheme in (None, "IOB1"):
        return None
    previous = OUTSIDE
    for tag in [*map(_letter, tags), OUTSIDE]:
        letter, before = tag[0], previous[0]
        if letter in "IE" and not (before in "BI" and previous[1:] == tag[1:]):
            return f"the tag {tag!r} follows {previous!r}, and continues nothing ({scheme})"
        if scheme == "BIOES" and before in "BI" and letter not in "IE":
            return f"the tag {previous!r} is not continued ({scheme})"
        previous = tag
    return None


def iob2(tags: Sequence[str]) -> list[str]:
    """IOB1, where B stands only between two entities of a kind, as IOB2, where every entity begins with it."""
    return [
        "B" + tag[1:] if tag[0] == "I" and not _follows_its_kind(tags, place) else tag for place, tag in enumerate(tags)
    ]


def _letter(tag: str) -> str:
    return _OTHER_LETTERS.get(tag[0], tag[0]) + tag[1:] if tag[1:2] == "-" else tag


def _places(tags: Sequence[str], letter: str) -> Iterator[int]:
    return (place for place, tag in enumerate(tags) if tag[0] == letter)


def _follows_its_kind(tags: Sequence[str], place: int) -> bool:
    return place > 0 and tags[place - 1][1:] == tags[place][1:] and tags[place - 1] != OUTSIDE


def _parts(first_of_word: np.ndarray, tokens: int, room: int) -> list[tuple[int, int]]:
    """Stretches of a sentence's tokens, as many words in each as there is room for; at least one."""
    parts, start = [], 0
    ends = np.append(first_of_word[1:], tokens)
    for end, following in zip(ends, np.append(ends[1:], tokens), strict=True):
        if end == tokens or following - start > room:
            parts.append((start, int(end)))
            start = int(end)
    return parts or [(0, 0)]
