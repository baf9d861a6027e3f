"""Token classification: a tag for each word, as in named entity recognition (CoNLL-2003, WNUT-17) and POS tagging.

The first token of a word has its tag; the others are ignored. Sentences that are too long for one sequence are split
between words, and their predictions are joined.

Shapes: T packed tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from bertfast.data.special_tokens import unknown_token
from bertfast.encoder import cross_entropy_sum, token_classification_loss, token_logits
from bertfast.models.bert import BertForTokenClassification
from bertfast.models.extensions import BertFeaturesForTokenClassification
from bertfast.models.tokenizers import mark_words, template
from bertfast.ops.reference import IGNORE_INDEX
from bertfast.runtime.atomic_write import write_atomically
from bertfast.tasks import metrics as task_metrics
from bertfast.tasks.conll import read_sentences, split_words
from bertfast.tasks.entity_metrics import entity_metrics, entity_scores
from bertfast.tasks.features import TOKENIZER_BATCH, Features, ModelInputs
from bertfast.tasks.labels import require_classes
from bertfast.tasks.rows import Rows, Skipped
from bertfast.tasks.sequence_classification import softmax
from bertfast.tasks.tag_schemes import OUTSIDE, bioes_tag, converted, detect_scheme, entities, mark_entities, tag_error
from bertfast.tasks.task import ROWS_PER_CHUNK, ConfusionMatrix, Outputs, Prediction, Task, label_to_id

_ENTITY_METRICS, _WORD_METRICS = ("f1", "precision", "recall"), ("accuracy", "loss")
_LONG_SENTENCE = 1000  # words; a file with no other sentence probably lacks empty lines

logger = logging.getLogger("bertfast")


class Segment(NamedTuple):
    """The part of a sentence that one sequence contains.

    Attributes:
        sentence: Index of the sentence.
        words: int64 [n], indices of the words that begin in this part.
        positions: int64 [n], position of each of those words' first token in the sequence.
    """

    sentence: int
    words: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True, eq=False)
class TaggedSentences:
    """Sentences as lists of words, with a tag for each word if they are known.

    Attributes:
        words: Words of each sentence.
        tags: Tags of each sentence; None: unknown.
        rows: Where each sentence comes from.
        labelled: Whether each word must have a tag; if not, tags that cannot be used are left out.
        segments: After `featurize`, one for each sequence of the features.
    """

    words: list[list[str]]
    tags: list[list[str]] | None
    rows: Rows
    labelled: bool = False
    segments: list[Segment] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.words)

    def select(self, indices: Sequence[int]) -> TaggedSentences:
        """Return the sentences at `indices`."""
        tags = None if self.tags is None else [self.tags[i] for i in indices]
        words = [self.words[i] for i in indices]
        return replace(self, words=words, tags=tags, rows=self.rows.select(indices), segments=[])

    def usable(self, problems: Iterable[str | None]) -> TaggedSentences:
        """Return the sentences without problems, one of which, or None, is given for each; the others are bad rows.

        If tags are not required, return all sentences, without tags if there is a problem.
        """
        found = {i: problem for i, problem in enumerate(problems) if problem is not None}
        if found and not self.labelled:
            first, problem = next(iter(found.items()))
            logger.warning("no metrics, as not all tags can be used: %s: %s", self.rows.where(first), problem)
            return replace(self, tags=None)
        for i, problem in found.items():
            self.rows.reject(i, problem)
        return self.select([i for i in range(len(self)) if i not in found]) if found else self


class TokenClassificationTask(Task[TaggedSentences]):
    """Token classification: one tag for each word."""

    model_class = BertForTokenClassification
    has_probabilities = True
    feature_based_model = BertFeaturesForTokenClassification
    logits_per_token = True
    flags = frozenset({"--tag-column"})

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of entities first; where tags mark no entities, such as parts of speech, only those of words."""
        return (*_ENTITY_METRICS, *_WORD_METRICS) if self.marks_entities else _WORD_METRICS

    @property
    def marks_entities(self) -> bool:
        """Whether the model's tags mark entities."""
        return mark_entities(self.label_names)

    def read(self, path: str, *, labelled: bool) -> TaggedSentences:
        """Read a CoNLL file: one word per line with its tag in a column, an empty line between sentences.

        IOB1 is converted to IOB2, and BILOU and BMES to BIOES. See `bertfast.tasks.conll` and `Task.read`.
        """
        words, tags, numbers, lines = [], [], [], []
        column = self.settings.columns.tag_column
        for sentence in read_sentences(Path(path), column, self.bad_rows, labelled=labelled):
            words.append(sentence.words)
            tags.append(sentence.tags)
            numbers.append(sentence.number)
            lines.append(sentence.line)
        if not words:
            raise ValueError(f"{path} has no usable sentences: it must have one word and its tag per line")
        if len(words) == 1 and len(words[0]) > _LONG_SENTENCE:
            logger.warning(
                "%s holds one sentence of %d words: put an empty line between sentences", path, len(words[0])
            )
        rows = Rows(path, numbers, lines, bad=self.bad_rows)
        known = [sentence for sentence in tags if sentence is not None]
        if len(known) < len(tags):
            if known:
                where = rows.where(tags.index(None))
                logger.warning("no metrics, as not all tags are known: not those of the sentence at %s", where)
            return TaggedSentences(words, None, rows, labelled)
        scheme = detect_scheme(known)
        examples = TaggedSentences(words, known, rows, labelled).usable(tag_error(one, scheme) for one in known)
        for one in examples.tags or []:
            one[:] = converted(one, scheme)
        return examples

    def read_chunks(self, path: str) -> Iterator[TaggedSentences]:
        """Yield the sentences of a file in parts; see `Task.read_chunks`."""
        column = self.settings.columns.tag_column
        sentences = read_sentences(Path(path), column, self.bad_rows, labelled=False)
        while chunk := list(islice(sentences, ROWS_PER_CHUNK)):
            words, _, numbers, lines = map(list, zip(*chunk, strict=True))
            yield TaggedSentences(words, None, Rows(path, numbers, lines, bad=self.bad_rows))
        if self.bad_rows.skipped:  # after the last part
            yield TaggedSentences([], None, Rows(path, [], [], bad=self.bad_rows))

    def label_config(self, examples: TaggedSentences) -> dict[str, Any]:
        """Return the number of tags and their names, O first."""
        names = sorted(
            {tag for sentence in examples.tags or [] for tag in sentence}, key=lambda tag: (tag != OUTSIDE, tag)
        )
        require_classes(names, examples.rows.file)
        if not mark_entities(names) and mark_entities(name.upper().replace("_", "-") for name in names):
            logger.warning(
                "%s: the tags are no entities but classes of words, as %r is not spelled like B-PER",
                examples.rows.file,
                next(name for name in names if not mark_entities([name]) and name != OUTSIDE),
            )
        return {"num_labels": len(names), "id2label": dict(enumerate(names))}

    def featurize(
        self, examples: TaggedSentences, tokenizer: Tokenizer, max_length: int
    ) -> tuple[TaggedSentences, Features]:
        """Tokenize each sentence, or each segment of a sentence that is too long, as one sequence.

        Returns:
            The sentences with segments, and the features. Labels are int64 [T], -100 except at the first token of each
            word. `num_truncated` counts words that are longer than a sequence.
        """
        ids_of_tags = self._ids_of_tags
        if examples.tags is not None:
            examples = examples.usable(_unknown_tag(tags, ids_of_tags) for tags in examples.tags)
        if not examples:
            raise ValueError(f"{examples.rows.file} has no usable sentences")
        special = template(tokenizer)
        room = max_length - len(special.start) - len(special.end)
        token_ids: list[np.ndarray] = []  # of each sequence
        labels: list[np.ndarray] = []
        segments: list[Segment] = []
        num_truncated = 0
        for sentence, encoding in enumerate(_encodings(examples.words, tokenizer)):
            for start, end, words, positions in _segments(encoding, room, len(special.start)):
                num_truncated += end - start > room
                end = min(end, start + room)
                token_ids.append(np.array([*special.start, *encoding.ids[start:end], *special.end], np.int32))
                segments.append(Segment(sentence, words, positions))
                if examples.tags is not None:
                    targets = np.full(len(token_ids[-1]), IGNORE_INDEX, np.int64)
                    targets[positions] = [ids_of_tags[examples.tags[sentence][word]] for word in words]
                    labels.append(targets)
        lengths = [*map(len, token_ids)]
        features = Features(
            np.concatenate(token_ids),
            np.zeros(sum(lengths), np.uint8),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            num_truncated,
            {"labels": np.concatenate(labels)} if labels else {},
        )
        return replace(examples, segments=segments), features

    def logits(self, model: PreTrainedModel, inputs: ModelInputs) -> Tensor:
        """Compute logits [1, T, labels]."""
        if isinstance(model, BertFeaturesForTokenClassification):
            features = inputs.arguments.get("features")
            return model.logits(inputs.packed(model), None if features is None else features[0])[None]
        return token_logits(model, inputs.packed(model))[None]

    def loss(self, model: PreTrainedModel, inputs: ModelInputs, items: Tensor) -> Tensor:
        """Compute the cross-entropy at the first token of each word."""
        labels = inputs.arguments["labels"]
        if isinstance(model, BertFeaturesForTokenClassification):
            return cross_entropy_sum(self.logits(model, inputs)[0], labels) / items
        return token_classification_loss(model, inputs.packed(model), labels, items)

    def texts(self, examples: TaggedSentences) -> Iterator[dict[str, list[str]]]:
        """Yield {"words"}."""
        return ({"words": words} for words in examples.words)

    def predictions(self, examples: TaggedSentences, features: Features, outputs: Outputs) -> Iterator[Prediction]:
        """Yield {"words", "tags", "entities": [{"type", "text", "start", "end"}]}, positions in words."""
        marks_entities = self.marks_entities
        for words, tags in zip(examples.words, self._predicted_tags(examples, outputs), strict=True):
            found = [
                {"type": kind, "text": " ".join(words[start:end]), "start": start, "end": end}
                for kind, start, end in (entities(tags) if marks_entities else ())
            ]
            yield {"words": words, "tags": tags, "entities": found}

    def probabilities(self, examples: TaggedSentences, outputs: Outputs) -> Iterator[list[dict[str, float]]]:
        """Yield the probability of each tag by its name, for each word."""
        names = self.label_names
        found: list[list[dict[str, float]]] = [[{} for _ in words] for words in examples.words]
        for (sentence, words, positions), logits in zip(examples.segments, outputs, strict=True):
            for word, position in zip(words.tolist(), positions.tolist(), strict=True):
                found[sentence][word] = dict(zip(names, softmax(logits[position]).tolist(), strict=True))
        return iter(found)

    def unmeasurable(self, examples: TaggedSentences, features: Features) -> dict[str, str]:
        """Return the metrics of entities if there are none; see `Task.unmeasurable`."""
        if examples.tags is None or not self.marks_entities or any(entities(tags) for tags in examples.tags):
            return {}
        return dict.fromkeys(_ENTITY_METRICS, "no tag marks an entity")

    def compute_metrics(self, examples: TaggedSentences, features: Features, outputs: Outputs) -> dict[str, float]:
        """Compute the accuracy of words' tags and their mean cross-entropy in nats; where tags mark entities, also
        precision, recall and F1 of whole entities as conlleval does."""
        if examples.tags is None:
            return {}
        predicted, ids = self._predicted_tags(examples, outputs), self._ids_of_tags
        pairs = zip(examples.tags, predicted, strict=True)
        correct = [ids[a] == ids[b] for gold, tags in pairs for a, b in zip(gold, tags, strict=True)]
        labels = np.split(features.labels["labels"], features.cu_seqlens[1:-1])
        values = {"accuracy": float(np.mean(correct)), "loss": task_metrics.mean_cross_entropy(outputs, labels)}
        return values | (entity_metrics(examples.tags, predicted) if self.marks_entities else {})

    def write_predictions(
        self, folder: Path, split: str, examples: TaggedSentences, features: Features, outputs: Outputs
    ) -> None:
        """Write predictions_SPLIT.conll: word, true tag if known, predicted tag; comments for skipped sentences."""
        gold: Sequence[list[str] | None] = examples.tags or [None] * len(examples)
        lines: list[str] = []
        for number, _, value in examples.rows.aligned(
            zip(examples.words, gold, self._predicted_tags(examples, outputs), strict=True)
        ):
            if isinstance(value, Skipped):
                lines += [f"# skipped sentence {number}: {value.problem}", ""]
                continue
            columns = [column for column in value if column is not None]
            lines += ["\t".join(line) for line in zip(*columns, strict=True)] + [""]
        write_atomically(folder / f"predictions_{split}.conll", "\n".join(lines) + "\n")

    def confusion_matrix(
        self, examples: TaggedSentences, features: Features, outputs: Outputs
    ) -> ConfusionMatrix | None:
        """Return the confusion matrix of words' tags; see `Task.confusion_matrix`."""
        if examples.tags is None:
            return None
        ids_of_tags = self._ids_of_tags
        gold, predicted = (
            np.array([ids_of_tags[tag] for tags in sentences for tag in tags])
            for sentences in (examples.tags, self._predicted_tags(examples, outputs))
        )
        names = self.label_names
        return names, task_metrics.confusion_matrix(gold, predicted, len(names))

    def report(self, examples: TaggedSentences, features: Features, outputs: Outputs) -> dict[str, Any]:
        """Return the scores of each tag and, where tags mark entities, those of each type of entity."""
        found = super().report(examples, features, outputs)
        if examples.tags is not None and self.marks_entities:
            found["entities"] = entity_scores(examples.tags, self._predicted_tags(examples, outputs))
        return found

    def parse_lines(self, lines: Sequence[str], first_row: int = 1) -> TaggedSentences:
        """Parse one sentence per line, words separated by spaces."""
        rows = Rows.of_input(len(lines), first_row, self.bad_rows)
        return TaggedSentences([split_words(line) for line in lines], None, rows)

    @property
    def _ids_of_tags(self) -> dict[str, int]:
        """Ids of the model's tags by name; those of BILOU and BMES also by their BIOES equivalents."""
        ids = label_to_id(self.config)
        return {bioes_tag(tag): i for tag, i in ids.items()} | ids if self.marks_entities else ids

    def _predicted_tags(self, examples: TaggedSentences, outputs: Outputs) -> list[list[str]]:
        """Return the predicted tag of each word."""
        names = self.label_names
        tags = [[""] * len(words) for words in examples.words]
        for (sentence, words, positions), logits in zip(examples.segments, outputs, strict=True):
            for word, label in zip(words.tolist(), logits[positions].argmax(1).tolist(), strict=True):
                tags[sentence][word] = names[label]
        return tags


def _unknown_tag(tags: list[str], known: dict[str, int]) -> str | None:
    """Return what is wrong with the tags of a sentence if the model does not know one."""
    unknown = next((tag for tag in tags if tag not in known), None)
    return None if unknown is None else f"unknown tag {unknown!r}; known tags: {', '.join(known)}"


def _encodings(sentences: list[list[str]], tokenizer: Tokenizer) -> Iterator[Encoding]:
    """Yield the tokens of each sentence, at least one for each word.

    A word of which the tokenizer leaves nothing, such as a zero-width space, becomes an unknown token: so it has a tag.
    """
    mark_words(tokenizer)
    for start in range(0, len(sentences), TOKENIZER_BATCH):
        batch = sentences[start : start + TOKENIZER_BATCH]
        encodings = tokenizer.encode_batch(batch, is_pretokenized=True, add_special_tokens=False)
        for words, encoding in zip(batch, encodings, strict=True):
            with_tokens = {*encoding.word_ids}
            if len(with_tokens) == len(words):
                yield encoding
            else:
                unknown = unknown_token(tokenizer)
                filled = [word if i in with_tokens else unknown for i, word in enumerate(words)]
                yield tokenizer.encode(filled, is_pretokenized=True, add_special_tokens=False)


def _segments(encoding: Encoding, room: int, before: int) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Yield the segments of a sentence, each of as many words as fit, and at least one segment.

    Args:
        encoding: Tokens of the sentence's words, without special tokens.
        room: Maximum tokens per segment; only a single word may exceed it.
        before: Number of special tokens before a segment.

    Returns:
        First and end token (exclusive) of each segment; int64 [n], indices of the words that begin in its first `room`
        tokens; and int64 [n], the positions of their first tokens in the sequence, special tokens included.
    """
    word_ids = np.array(encoding.word_ids, np.int64)
    num_tokens = len(word_ids)
    first_tokens = np.flatnonzero(np.diff(word_ids, prepend=-1))
    for start, end in _segment_spans(first_tokens, num_tokens, room):
        in_segment = first_tokens[(first_tokens >= start) & (first_tokens < min(end, start + room))]
        yield start, end, word_ids[in_segment], in_segment - start + before


def _segment_spans(first_tokens: np.ndarray, num_tokens: int, room: int) -> list[tuple[int, int]]:
    """Return (start, end) tokens of segments that end between words; at least one.

    Args:
        first_tokens: int64 [words], index of each word's first token.
        num_tokens: Tokens of the sentence.
        room: Maximum tokens per segment; only a single word may exceed it.
    """
    spans, start = [], 0
    word_ends = np.append(first_tokens[1:], num_tokens)
    next_word_ends = np.append(word_ends[1:], num_tokens)
    for end, next_end in zip(word_ends, next_word_ends, strict=True):
        if end == num_tokens or next_end - start > room:
            spans.append((start, int(end)))
            start = int(end)
    return spans or [(0, 0)]
