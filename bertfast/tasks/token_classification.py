"""Token classification: a tag for each word, as in named entity recognition (CoNLL-2003, WNUT-17) and POS tagging.

The first token of a word has its tag; the others are ignored. Sentences that are too long for one sequence are split
between words, and their predictions are joined.

Shapes: T packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from bertfast.data.text_files import read_lines
from bertfast.data.tokenizer import special_tokens
from bertfast.encoder import cross_entropy_sum, token_classification_loss, token_logits
from bertfast.models.bert import BertForTokenClassification
from bertfast.models.extensions import BertFeaturesForTokenClassification
from bertfast.ops.reference import IGNORE_INDEX
from bertfast.runtime.atomic_write import write_atomically
from bertfast.tasks import metrics as task_metrics
from bertfast.tasks.features import Features, ModelInputs
from bertfast.tasks.rows import Rows
from bertfast.tasks.tables import SUFFIXES
from bertfast.tasks.tag_schemes import OUTSIDE, bioes_tag, detect_scheme, entities, iob1_to_iob2, tag_error
from bertfast.tasks.task import ConfusionMatrix, Outputs, Prediction, Task, label_to_id

DOCUMENT_START = "-DOCSTART-"
_TSV = {suffix for suffix in SUFFIXES if suffix.startswith(".tsv")}  # tabs also separate the columns of CoNLL files
_HEADERS = ("sentence", "sentence1", "text")  # first columns of tables of texts


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
        rows: The rows that the sentences come from; a sentence is a row.
        segments: After `featurize`, one for each sequence of the features.
    """

    words: list[list[str]]
    tags: list[list[str]] | None
    rows: Rows
    segments: list[Segment] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.words)

    def select(self, rows: Sequence[int]) -> TaggedSentences:
        """Return the sentences at `rows`."""
        tags = None if self.tags is None else [self.tags[row] for row in rows]
        return TaggedSentences([self.words[row] for row in rows], tags, self.rows.select(rows))


class TokenClassificationTask(Task[TaggedSentences]):
    """Token classification: one tag for each word."""

    model_class = BertForTokenClassification
    feature_based_model = BertFeaturesForTokenClassification
    head_prefix = "classifier."
    metrics = ("f1", "precision", "recall", "accuracy")

    def read(self, path: str, *, labelled: bool) -> TaggedSentences:
        """Read a CoNLL file: one word per line with its tag in a column, an empty line between sentences.

        IOB1 is converted to IOB2, and BILOU to BIOES. -DOCSTART- lines are skipped. See `Task.read`.
        """
        sentences = list(self._sentences(Path(path), labelled))
        if not sentences:
            raise ValueError(f"{path} has no sentences: it must have one word and its tag per line")
        words, tags = [words for words, *_ in sentences], [tags for _, tags, *_ in sentences]
        numbers, lines = [number for *_, number, _ in sentences], [line for *_, line in sentences]
        rows = Rows(path, numbers, lines, None, self.bad_rows)
        if not all(map(len, tags)):
            return TaggedSentences(words, None, rows)
        scheme = detect_scheme(tags)
        usable, converted = [], []
        for row, sentence in enumerate(tags):
            problem = tag_error(sentence, scheme)
            if problem is not None:
                rows.reject(row, problem)
                continue
            usable.append(row)
            converted.append(iob1_to_iob2(sentence) if scheme == "IOB1" else list(map(bioes_tag, sentence)))
        return replace(TaggedSentences(words, None, rows).select(usable), tags=converted)

    def label_config(self, examples: TaggedSentences) -> dict[str, Any]:
        """Return the number of tags and their names, O first."""
        names = sorted(
            {tag for sentence in examples.tags or [] for tag in sentence}, key=lambda tag: (tag != OUTSIDE, tag)
        )
        if len(names) < 2:
            raise ValueError(f"every tag is {names[0]!r}; classification needs at least two different tags")
        return {"num_labels": len(names), "id2label": dict(enumerate(names))}

    def featurize(
        self, examples: TaggedSentences, tokenizer: Tokenizer, max_length: int
    ) -> tuple[TaggedSentences, Features]:
        """Tokenize each sentence, or each segment of a sentence that is too long, as one sequence.

        Returns:
            The sentences with segments, and the features. Labels are int64 [T], -100 except at the first token of each
            word. `num_truncated` counts words that are longer than a sequence.
        """
        special, ids_of_tags = special_tokens(tokenizer), label_to_id(self.config)
        if examples.tags is not None:
            tags_of_rows, rows = enumerate(examples.tags), examples.rows
            examples = examples.select([row for row, tags in tags_of_rows if _are_known(tags, ids_of_tags, rows, row)])
        room = max_length - 2  # for tokens between [CLS] and [SEP]
        token_ids: list[int] = []
        lengths: list[int] = []
        labels: list[np.ndarray] = []
        segments: list[Segment] = []
        num_truncated = 0
        encodings = tokenizer.encode_batch(examples.words, is_pretokenized=True, add_special_tokens=False)
        for sentence, encoding in enumerate(encodings):
            for start, end, words, positions in _segments(encoding, room):
                num_truncated += end - start > room
                end = min(end, start + room)
                token_ids += [special.cls, *encoding.ids[start:end], special.sep]
                lengths.append(end - start + 2)
                segments.append(Segment(sentence, words, positions))
                if examples.tags is not None:
                    targets = np.full(lengths[-1], IGNORE_INDEX, np.int64)
                    targets[positions] = [ids_of_tags[examples.tags[sentence][word]] for word in words]
                    labels.append(targets)
        features = Features(
            np.array(token_ids, np.int32),
            np.zeros(len(token_ids), np.uint8),
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

    def predictions(self, examples: TaggedSentences, features: Features, outputs: Outputs) -> Iterator[Prediction]:
        """Yield {"words", "tags", "entities": [{"type", "text", "start", "end"}]}, positions in words."""
        for words, tags in zip(examples.words, self._predicted_tags(examples, outputs), strict=True):
            found = [
                {"type": kind, "text": " ".join(words[start:end]), "start": start, "end": end}
                for kind, start, end in entities(tags)
            ]
            yield {"words": words, "tags": tags, "entities": found}

    def compute_metrics(self, examples: TaggedSentences, features: Features, outputs: Outputs) -> dict[str, float]:
        """Compute precision, recall and F1 of whole entities as conlleval does, and the accuracy of words' tags."""
        if examples.tags is None:
            return {}
        predicted = self._predicted_tags(examples, outputs)
        gold_entities, predicted_entities = (
            [{*entities(tags)} for tags in sentences] for sentences in (examples.tags, predicted)
        )
        num_correct = sum(len(a & b) for a, b in zip(gold_entities, predicted_entities, strict=True))
        precision, recall = (
            num_correct / max(sum(map(len, sentences)), 1) for sentences in (predicted_entities, gold_entities)
        )
        pairs = zip(examples.tags, predicted, strict=True)
        return {
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if num_correct else 0.0,
            "accuracy": float(np.mean([a == b for gold, tags in pairs for a, b in zip(gold, tags, strict=True)])),
        }

    def write_predictions(
        self, folder: Path, split: str, examples: TaggedSentences, features: Features, outputs: Outputs
    ) -> None:
        """Write predictions_SPLIT.conll: word, true tag if known, and predicted tag."""
        lines = []
        for row, (words, predicted) in enumerate(
            zip(examples.words, self._predicted_tags(examples, outputs), strict=True)
        ):
            columns = [words, *([] if examples.tags is None else [examples.tags[row]]), predicted]
            lines += ["\t".join(line) for line in zip(*columns, strict=True)] + [""]
        write_atomically(folder / f"predictions_{split}.conll", "\n".join(lines) + "\n")

    def confusion_matrix(
        self, examples: TaggedSentences, features: Features, outputs: Outputs
    ) -> ConfusionMatrix | None:
        """Return the confusion matrix of words' tags; see `Task.confusion_matrix`."""
        if examples.tags is None:
            return None
        ids_of_tags = label_to_id(self.config)
        gold, predicted = (
            np.array([ids_of_tags[tag] for tags in sentences for tag in tags])
            for sentences in (examples.tags, self._predicted_tags(examples, outputs))
        )
        names = self.label_names
        return names, task_metrics.confusion_matrix(gold, predicted, len(names))

    def parse_lines(self, lines: Sequence[str], first_row: int = 1) -> TaggedSentences:
        """Parse one sentence per line, words separated by white space."""
        rows = Rows.of_input(len(lines), first_row, self.bad_rows)
        return TaggedSentences([line.split() for line in lines], None, rows)

    def _sentences(self, path: Path, labelled: bool) -> Iterator[tuple[list[str], list[str], int, int]]:
        """Yield (words, tags, row number, first line) of each sentence; tags are empty if any is missing."""
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        words, tags, row, first, problem, column = [], [], 1, 0, None, self.settings.columns.tag_column
        for number, line in (*read_lines(path), (0, "")):  # an empty line after the last sentence
            _require_conll(path, number, line)
            fields = line.split()
            if fields and fields[0] != DOCUMENT_START:
                first = first or number
                words.append(fields[0])
                if len(fields) > 1 and -len(fields) <= column < len(fields):
                    tags.append(fields[column])
                elif labelled and problem is None:
                    problem = f"{path}, line {number}: no tag in column {column} of {len(fields)}"
                continue
            if problem is not None:
                self.bad_rows.add(problem, file=str(path), row=row)
            elif words:
                yield words, tags if len(tags) == len(words) else [], row, first
            row += bool(words)
            words, tags, first, problem = [], [], 0, None

    def _predicted_tags(self, examples: TaggedSentences, outputs: Outputs) -> list[list[str]]:
        """Return the predicted tag of each word; label 0 (O if there is an O) for words without a token."""
        names = self.label_names
        tags = [[names[0]] * len(words) for words in examples.words]
        for (sentence, words, positions), logits in zip(examples.segments, outputs, strict=True):
            for word, label in zip(words.tolist(), logits[positions].argmax(1).tolist(), strict=True):
                tags[sentence][word] = names[label]
        return tags


def _are_known(tags: list[str], known: dict[str, int], rows: Rows, row: int) -> bool:
    """Return whether all tags of a sentence are known; if not, it is a bad row."""
    unknown = next((tag for tag in tags if tag not in known), None)
    if unknown is not None:
        rows.reject(row, f"unknown tag {unknown!r}; known tags: {', '.join(known)}")
    return unknown is None


def _require_conll(path: Path, number: int, line: str) -> None:
    """Raise ValueError if a line is from a table of texts, or its file is one, instead of one word per line."""
    first, *others = line.rstrip("\r\n").split("\t")
    is_table = path.name.endswith(tuple(set(SUFFIXES) - _TSV)) or ".json" in path.suffixes[-2:]
    is_header = number == 1 and first in _HEADERS and bool(others)
    if is_table or is_header or (others and " " in first.strip()):
        raise ValueError(
            f"{path}, line {number}: not a CoNLL file, which has one word and its tag per line and an empty line "
            "between sentences: for a label per text use --task sequence-classification"
        )


def _segments(encoding: Encoding, room: int) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Yield the segments of a sentence, each of as many words as fit, and at least one segment.

    Args:
        encoding: Tokens of the sentence's words, without special tokens.
        room: Maximum tokens per segment; only a single word may exceed it.

    Returns:
        First and end token (exclusive) of each segment; int64 [n], indices of the words that begin in its first `room`
        tokens; and int64 [n], the positions of their first tokens in the sequence, where [CLS] is 0.
    """
    word_ids = np.array(encoding.word_ids, np.int64)
    num_tokens = len(word_ids)
    first_tokens = np.flatnonzero(np.diff(word_ids, prepend=-1))
    for start, end in _segment_spans(first_tokens, num_tokens, room):
        in_segment = first_tokens[(first_tokens >= start) & (first_tokens < min(end, start + room))]
        yield start, end, word_ids[in_segment], in_segment - start + 1


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
