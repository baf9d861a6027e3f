"""Reranking: how well a document answers a query, by a cross-encoder, which reads both as one sequence.

Shapes: E pairs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

from bertfast.data.text_files import read_json
from bertfast.encoder import sequence_classification_loss, sequence_logits
from bertfast.models.bert import BertForSequenceClassification
from bertfast.models.sentence_folder import MODEL_OPTIONS, encoder_folder, write_cross_encoder_modules
from bertfast.models.weights import config_path
from bertfast.runtime.settings import given, refuse_without_effect
from bertfast.tasks.features import Features, ModelInputs, tokenize
from bertfast.tasks.labels import MULTI_LABEL
from bertfast.tasks.metrics import CORRELATIONS, CUTOFF, RETRIEVAL, correlations, ranking_metrics
from bertfast.tasks.ranked_pairs import RankedPairs, positive_column, read_ranked_pairs
from bertfast.tasks.sequence_classification import sigmoid
from bertfast.tasks.settings import TaskSettings
from bertfast.tasks.tables import Table, read_chunks, read_table
from bertfast.tasks.task import FINETUNING_TASK, ROWS_PER_CHUNK, Outputs, Prediction, Task, write_aligned
from bertfast.tasks.text_groups import parse_pairs

logger = logging.getLogger("bertfast")

_SIGMOID, _IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"
_OPTIONS = "sentence_transformers"  # entry of a configuration, of which `activation_fn` gives scores of logits


class RerankingTask(Task[RankedPairs]):
    """Reranking: one logit for each pair of a query and a document, trained by binary cross-entropy.

    Attributes:
        activation: Name of what makes scores of logits, as sentence-transformers writes it.
        ranks: Whether the last labelled file has a query with documents labelled 1 and 0, which decides the metrics.
    """

    model_class = BertForSequenceClassification
    flags = frozenset({"--text-column", "--text-pair-column", "--label-column", "--max-score"})

    def __init__(self, settings: TaskSettings):
        super().__init__(settings)
        self.activation = _SIGMOID
        self.ranks = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics of the ranking of each query's documents, or correlations of scores and labels."""
        return RETRIEVAL if self.ranks else CORRELATIONS

    def open_folder(self, folder: Path) -> Path:
        """Read what makes scores of logits; see `Task.open_folder`."""
        encoder = encoder_folder(folder)
        file = config_path(encoder)
        config = read_json(file) if file.exists() else {}
        options = read_json(folder / MODEL_OPTIONS) if (folder / MODEL_OPTIONS).exists() else {}
        nested = config.get(_OPTIONS)
        known = [nested.get("activation_fn") if isinstance(nested, dict) else None]
        known += [config.get("sbert_ce_default_activation_function")]
        known += [options.get("activation_fn") if options.get("model_type") == "CrossEncoder" else None]
        name = next((name for name in known if name is not None), _SIGMOID)
        if name not in (_SIGMOID, _IDENTITY):
            raise ValueError(f"{folder}: activation_fn {name!r:.60} is neither Sigmoid nor Identity of torch.nn")
        self.activation = name
        return encoder

    def write_folder(self, folder: Path, *, adapted: bool) -> None:
        """Write the files with which sentence-transformers opens an adapter; see `Task.write_folder`."""
        if adapted:
            write_cross_encoder_modules(folder, self.activation, self.max_length())

    def read(self, path: str, *, labelled: bool) -> RankedPairs:
        """Read a .tsv, .csv, .jsonl or .json file; see `Task.read`."""
        table = read_table(path, bad=self.bad_rows)
        pairs = read_ranked_pairs(table, self.settings.columns, labelled=labelled)
        if labelled:
            pairs = _without_negative_labels(pairs)
        if not len(pairs):
            raise ValueError(f"{path} has no usable rows")
        if labelled:
            self._refuse_unused_max_score(table)
            self.ranks = {*(pairs.labels or [])} <= {0.0, 1.0} and _has_rankings(pairs)
        return pairs

    def _refuse_unused_max_score(self, table: Table) -> None:
        """Raise ValueError if --max-score is given and columns say which documents are labelled 1."""
        positive = positive_column(table, self.settings.columns)
        if positive is not None and "--max-score" in given(self.settings.embedding):
            reason = f"{table.path} has no labels, but the columns {positive!r} and 'negative'"
            refuse_without_effect(["--max-score"], reason)

    def read_chunks(self, path: str) -> Iterator[RankedPairs]:
        """Yield the pairs of a file in parts; see `Task.read_chunks`."""
        for table in read_chunks(path, ROWS_PER_CHUNK, bad=self.bad_rows):
            yield replace(read_ranked_pairs(table, self.settings.columns, labelled=False), labels=None)

    def label_config(self, examples: RankedPairs) -> dict[str, Any]:
        """Check the labels; return one label, whose loss is the binary cross-entropy."""
        labels, largest = examples.labels or [], self.settings.embedding.max_score
        for index, label in enumerate(labels):
            if label > largest:
                where = examples.rows.where(examples.row_of_pair()[index])
                raise ValueError(
                    f"{where}: the label {label:g} is not from 0 to {largest:g}: give the largest label of the file, "
                    f"as in --max-score {max(labels):g}"
                )
        if len({*labels}) < 2:
            raise ValueError(f"{examples.rows.file}: every label is {labels[0]:g}; reranking needs different labels")
        entries: dict[str, Any] = {"num_labels": 1, "id2label": {0: "LABEL_0"}, "problem_type": MULTI_LABEL}
        return entries | {FINETUNING_TASK: "reranking", _OPTIONS: {"activation_fn": self.activation}}

    def set_config(self, config: BertConfig) -> None:
        """Check that the model has one label; see `Task.set_config`."""
        super().set_config(config)
        if config.num_labels != 1:
            raise ValueError(
                f"{self.settings.model_name_or_path} has {config.num_labels} labels, and reranking needs one: leave "
                "--task out, or fine-tune it with --task reranking"
            )

    def featurize(self, examples: RankedPairs, tokenizer: Tokenizer, max_length: int) -> tuple[RankedPairs, Features]:
        """Tokenize each pair as one sequence; see `Task.featurize`."""
        labels: dict[str, np.ndarray] = {}
        if examples.labels is not None:
            labels = {"labels": np.array(examples.labels, np.float32) / np.float32(self.settings.embedding.max_score)}
        return examples, replace(tokenize(tokenizer, examples.pairs, max_length), labels=labels)

    def logits(self, model: PreTrainedModel, inputs: ModelInputs) -> Tensor:
        """Compute logits [E, 1]."""
        return sequence_logits(model, inputs.packed(model))

    def loss(self, model: PreTrainedModel, inputs: ModelInputs, items: Tensor) -> Tensor:
        """Compute the binary cross-entropy."""
        return sequence_classification_loss(model, inputs.packed(model), inputs.arguments["labels"], items)

    def texts(self, examples: RankedPairs) -> Iterator[dict[str, Any]]:
        """Yield {"query", "document"} of a pair, or {"query", "documents"} of a list."""
        for start, end in pairwise(accumulate(examples.sizes, initial=0)):
            documents = [document for _, document in examples.pairs[start:end]]
            found = {"documents": documents} if examples.lists else {"document": documents[0]}
            yield {"query": examples.pairs[start][0], **found}

    def predictions(self, examples: RankedPairs, features: Features, outputs: Outputs) -> Iterator[Prediction]:
        """Yield {"score"} of a pair, or {"scores"} of the documents of a list."""
        for scores in self._scores_of_rows(examples, outputs):
            yield {"scores": scores.tolist()} if examples.lists else {"score": float(scores[0])}

    def unmeasurable(self, examples: RankedPairs, features: Features) -> dict[str, str]:
        """Return all metrics if labels are equal, or no query's documents can be ranked; see `Task.unmeasurable`."""
        labels = {*(examples.labels or [])}
        if len(labels) == 1:
            return dict.fromkeys(self.metrics, f"every label is {labels.pop():g}")
        if labels and self.ranks and not _has_rankings(examples):
            return dict.fromkeys(self.metrics, "no query has both a document labelled 1 and one labelled 0")
        return {}

    def compute_metrics(self, examples: RankedPairs, features: Features, outputs: Outputs) -> dict[str, float]:
        """Compute the metrics; empty if the pairs have no labels."""
        if examples.labels is None:
            return {}
        scores, labels = self._scores(outputs), np.array(examples.labels)
        if not self.ranks:
            return correlations(scores, labels)
        rankings = _rankings(examples)
        if not rankings:  # no label is 1, as in the first few rows of a file
            return dict.fromkeys(RETRIEVAL, math.nan)
        relevant = np.zeros((len(rankings), CUTOFF), bool)
        for row, pairs in enumerate(rankings):
            # Of equal scores, that of an irrelevant document comes first: a constant must not look like a ranking.
            best = np.array(pairs)[np.lexsort((labels[pairs], -scores[pairs]))[:CUTOFF]]
            relevant[row, : len(best)] = labels[best] > 0
        return ranking_metrics(relevant, np.array([int((labels[pairs] > 0).sum()) for pairs in rankings]))

    def write_predictions(
        self, folder: Path, split: str, examples: RankedPairs, features: Features, outputs: Outputs
    ) -> None:
        """Write predictions_SPLIT.tsv: row, id, and the score, or the scores of a list separated by commas."""
        values = ([",".join(f"{score:.6g}" for score in row)] for row in self._scores_of_rows(examples, outputs))
        write_aligned(folder / f"predictions_{split}.tsv", examples.rows, ["score"], values)

    def parse_lines(self, lines: Sequence[str], first_row: int = 1) -> RankedPairs:
        """Parse a query and a document separated by a tab per line."""
        pairs, rows = parse_pairs(lines, first_row, self.bad_rows, "a query and a document, separated by a tab")
        return RankedPairs(pairs, [1] * len(pairs), rows)

    def _scores(self, outputs: Outputs) -> np.ndarray:
        """Return the scores of pairs, float64 [E]."""
        logits: np.ndarray = np.stack(outputs)[:, 0].astype(np.float64)
        return sigmoid(logits) if self.activation == _SIGMOID else logits

    def _scores_of_rows(self, examples: RankedPairs, outputs: Outputs) -> Iterator[np.ndarray]:
        scores = self._scores(outputs)
        return (scores[start:end] for start, end in pairwise(accumulate(examples.sizes, initial=0)))


def _without_negative_labels(pairs: RankedPairs) -> RankedPairs:
    """Return the pairs of the rows without negative labels; the others are bad rows."""
    bad: set[int] = set()
    row_of_pair = pairs.row_of_pair()
    for row, label in zip(row_of_pair, pairs.labels or [0.0] * len(pairs), strict=True):
        if label < 0 and row not in bad:
            bad.add(row)
            pairs.rows.reject(
                row, f"the label {label:g} is negative: write 0 for a document that does not answer the query"
            )
    return pairs.select([index for index, row in enumerate(row_of_pair) if row not in bad]) if bad else pairs


def _has_rankings(examples: RankedPairs) -> bool:
    """Return whether a query has both a relevant document and another one, without which all rankings are alike."""
    labels = examples.labels or []
    return any(min(labels[index] for index in pairs) <= 0 for pairs in _rankings(examples))


def _rankings(examples: RankedPairs) -> list[list[int]]:
    """Return the indices of the pairs of each query that has a relevant document, of which the label is above 0."""
    pairs_of: dict[str, list[int]] = {}
    labels = examples.labels or [0.0] * len(examples)
    for index, (query, _) in enumerate(examples.pairs):
        pairs_of.setdefault(query, []).append(index)
    return [pairs for pairs in pairs_of.values() if any(labels[index] > 0 for index in pairs)]
