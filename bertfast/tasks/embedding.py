"""Embeddings of texts, trained on pairs, triplets or scored pairs, as sentence-transformers does.

Shapes: E examples, C texts of each, D embedding size, S = E · C sequences, T packed tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

from bertfast.encoder import PackedModel, encode
from bertfast.models.bert import BertModel
from bertfast.models.pooling import pool
from bertfast.models.sentence_folder import read_sentence_modules, write_sentence_modules
from bertfast.models.sentence_modules import Dense, SentenceModules, Truncate
from bertfast.runtime.settings import given, refuse_without_effect
from bertfast.tasks.embedding_losses import embedding_loss
from bertfast.tasks.features import Features, ModelInputs, tokenize
from bertfast.tasks.metrics import CORRELATIONS, RETRIEVAL, correlations, retrieval_metrics
from bertfast.tasks.settings import LossName, TaskSettings
from bertfast.tasks.tables import read_chunks, read_table
from bertfast.tasks.task import FINETUNING_TASK, ROWS_PER_CHUNK, Outputs, Prediction, Task, write_aligned
from bertfast.tasks.text_groups import TextGroups, parse_pairs, read_groups

logger = logging.getLogger("bertfast")


class EmbeddingTask(Task[TextGroups]):
    """Embeddings of texts. The outputs of an example are the embeddings of its texts, [C · D].

    Attributes:
        label_arguments: Names of the labels of features.
        modules: Pooling and what follows it; `open_folder` must have been called.
        loss_name: The loss; `label_config` must have been called.
        scored: Whether the last labelled file has scores, which decides the metrics.
    """

    model_class = BertModel
    captures = False
    label_arguments = ("labels", "text_ids")
    flags = frozenset(
        f"--{name}"
        for name in (
            *("text-column", "text-pair-column", "label-column", "loss", "similarity-scale", "contrastive-margin"),
            *("matryoshka-dims", "pooling", "normalization"),
        )
    )

    def __init__(self, settings: TaskSettings):
        super().__init__(settings)
        self.modules = SentenceModules(Path())
        self.loss_name: LossName = "multiple-negatives-ranking"
        self.scored = False
        self._warned = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """Correlations of cosines and scores, or those of retrieval; also of each size of --matryoshka-dims."""
        names = CORRELATIONS if self.scored else RETRIEVAL
        size = None if self._config is None else self.modules.size_of(self._config.hidden_size)
        smaller = [dim for dim in self.settings.embedding.matryoshka_dims if size is None or dim < size]
        return (*names, *(f"{name}_{dim}" for dim in smaller for name in names))

    def open_folder(self, folder: Path) -> Path:
        """Read pooling, normalisation and maximum length; see `Task.open_folder`."""
        settings, name = self.settings.embedding, self.settings.model_name_or_path
        self.modules = read_sentence_modules(folder).changed(settings.pooling, settings.normalization, name)
        if any(isinstance(step, Dense) for step in self.modules.after):
            raise ValueError(
                f"{name} has a module Dense, which is not trained here: train the model with sentence-transformers, or "
                "name a folder that has only its encoder, without modules.json"
            )
        return self.modules.encoder

    def max_length(self) -> int:
        """Return the maximum tokens of a text: by default that of the model's modules; see `Task.max_length`."""
        return self.modules.length_for(self.config) if self.settings.max_seq_length is None else super().max_length()

    def read(self, path: str, *, labelled: bool) -> TextGroups:
        """Read a .tsv, .csv, .jsonl or .json file; see `Task.read`."""
        groups = read_groups(read_table(path, bad=self.bad_rows), self.settings.columns, labelled=labelled)
        if not len(groups):
            raise ValueError(f"{path} has no usable rows")
        if labelled:
            self.scored = groups.scores is not None
        return groups

    def read_chunks(self, path: str) -> Iterator[TextGroups]:
        """Yield the texts of a file in parts; see `Task.read_chunks`."""
        for table in read_chunks(path, ROWS_PER_CHUNK, bad=self.bad_rows):
            yield replace(read_groups(table, self.settings.columns, labelled=False), scores=None)

    def label_config(self, examples: TextGroups) -> dict[str, Any]:
        """Choose the loss; return the name of the task, by which a fine-tuned model is known."""
        file, settings = examples.rows.file, self.settings.embedding
        scores = None if examples.scores is None else {*examples.scores}
        if scores is None:
            self.loss_name = "multiple-negatives-ranking"
        else:
            self.loss_name = "contrastive" if scores <= {0.0, 1.0} else "cosent"
        if settings.loss != "auto":
            self._require_fitting(settings.loss, scores, file)
            self.loss_name = settings.loss
        else:
            logger.info("%s: the loss is %s", file, self.loss_name)
        if (reason := self.untrainable(examples)) is not None:
            remedy = ": add other pairs, or a column negative" if scores is None else ""
            raise ValueError(f"{file}: {reason}{remedy}")
        unused = {"contrastive": "--similarity-scale"}.get(self.loss_name, "--contrastive-margin")
        refuse_without_effect({unused}.intersection(given(settings)), f"the loss is {self.loss_name}")
        return {FINETUNING_TASK: "embedding"}

    def untrainable(self, examples: TextGroups) -> str | None:
        """Return that the scores are equal, or that no pair has a negative; see `Task.untrainable`."""
        scores = {*(examples.scores or [])}
        if len(scores) == 1:
            return f"every score is {scores.pop():g}; embeddings need pairs with different scores"
        if self.loss_name == "multiple-negatives-ranking" and not examples.has_negatives():
            return (
                "no pair has a negative, as all have the same anchor or the same positive, so the loss would always be "
                "0"
            )
        return None

    def _require_fitting(self, loss: LossName, scores: set[float] | None, file: str) -> None:
        """Raise ValueError if a file's scores are not those that a loss needs."""
        if scores is None and loss != "multiple-negatives-ranking":
            raise ValueError(
                f"{file} has no scores, which --loss {loss} needs: add a column score, or name it with --label-column"
            )
        if scores is not None and loss == "multiple-negatives-ranking":
            raise ValueError(
                f"{file} has scores, which --loss {loss} cannot use: keep the similar pairs and remove the column, or "
                "choose --loss cosent"
            )
        if loss == "contrastive" and (others := sorted((scores or set()) - {0.0, 1.0})):
            raise ValueError(f"{file} has the score {others[0]:g}, and --loss contrastive needs 0 or 1: use cosent")

    def set_config(self, config: BertConfig) -> None:
        """Check the sizes of --matryoshka-dims; see `Task.set_config`."""
        super().set_config(config)
        size, dims = config.hidden_size * len(self.modules.pooling), self.settings.embedding.matryoshka_dims
        if max(dims, default=0) > size:
            raise ValueError(
                f"--matryoshka-dims must be at most {size}, the size of the model's embeddings, got {max(dims)}"
            )
        if dims and size not in dims:
            logger.warning("--matryoshka-dims lacks %d, the size of whole embeddings, which are not trained", size)

    def featurize(self, examples: TextGroups, tokenizer: Tokenizer, max_length: int) -> tuple[TextGroups, Features]:
        """Tokenize each text as one sequence; see `Task.featurize`."""
        self.modules.prepare_tokenizer(tokenizer)
        count = len(examples.texts[0])
        features = tokenize(tokenizer, [text for group in examples.texts for text in group], max_length)
        id_of_text: dict[str, int] = {}
        ids = [[id_of_text.setdefault(text, len(id_of_text)) for text in group] for group in examples.texts]
        scores = [0.0] * len(examples) if examples.scores is None else examples.scores
        labels: dict[str, np.ndarray] = {"labels": np.array(scores, np.float32), "text_ids": np.array(ids, np.int64)}
        return examples, replace(features, labels=labels, num_choices=count)

    def without_repetitions(self, features: Features) -> tuple[Features, Callable[[Outputs], Outputs]]:
        """Return each text once, as the paragraph of several questions; see `Task.without_repetitions`."""
        text_ids = features.labels["text_ids"]
        _, first, text_of_sequence = np.unique(text_ids, return_index=True, return_inverse=True)
        texts_of_example = text_of_sequence.reshape(text_ids.shape)

        def of_examples(outputs: Outputs) -> Outputs:
            return [np.concatenate([outputs[text] for text in texts]) for texts in texts_of_example]

        return features.single_sequences(first), of_examples

    def vectors(self, model: PreTrainedModel, inputs: ModelInputs) -> Tensor:
        """Compute the embeddings that are trained, not truncated, with gradients: fp32 [E, C · D]."""
        return self._embed(model, inputs, truncated=False)

    def logits(self, model: PreTrainedModel, inputs: ModelInputs) -> Tensor:
        """Compute the embeddings of each example's texts, fp32 [E, C · D]."""
        return self._embed(model, inputs, truncated=True)

    def _embed(self, model: Any, inputs: ModelInputs, *, truncated: bool) -> Tensor:
        packed_model: PackedModel = model
        hidden = encode(packed_model, inputs.packed(model)).float()
        lengths = inputs.arguments["cu_seq_lens_q"].diff().long()
        lengths = lengths[lengths > 0]  # without the empty sequences that fill up a bucket
        embeddings = pool(hidden[: int(lengths.sum())], lengths, self.modules.pooling)
        for step in self.modules.after:
            if truncated or not isinstance(step, Truncate):
                embeddings = step(embeddings)
        return embeddings.reshape(-1, inputs.num_choices * embeddings.shape[1])

    def loss(self, model: PreTrainedModel, inputs: ModelInputs, items: Tensor) -> Tensor:
        """Compute the loss of a whole pass, weighted by its share of the examples of the step."""
        return self.loss_of_vectors(self.vectors(model, inputs), inputs.arguments, items)

    def loss_of_vectors(self, vectors: Tensor, arguments: dict[str, Tensor], items: Tensor) -> Tensor:
        """Compute the loss of a whole pass from its embeddings, [E, C · D]; see `loss`."""
        text_ids = arguments["text_ids"]
        lacking = {"multiple-negatives-ranking": "negatives", "cosent": "other score"}.get(self.loss_name)
        if text_ids.shape == (1, 2) and lacking is not None and not self._warned:
            self._warned = True
            logger.warning("a batch of one pair has no %s, and its loss is 0: choose larger batches", lacking)
        embeddings = vectors.view(*text_ids.shape, -1)
        with torch.autocast(vectors.device.type, enabled=False):
            loss = embedding_loss(self.loss_name, embeddings, arguments["labels"], text_ids, self.settings.embedding)
        return loss * len(text_ids) / items

    def texts(self, examples: TextGroups) -> Iterator[dict[str, list[str]]]:
        """Yield {"texts"}: an anchor and its other texts, or a pair."""
        return ({"texts": [*texts]} for texts in examples.texts)

    def predictions(self, examples: TextGroups, features: Features, outputs: Outputs) -> Iterator[Prediction]:
        """Yield {"score"}, the cosine of a pair, or {"scores"}, those of an anchor and each of its other texts."""
        for output in outputs:
            found = _cosines(output.reshape(1, features.num_choices, -1))[0].tolist()
            yield {"score": found[0]} if len(found) == 1 else {"scores": found}

    def unmeasurable(self, examples: TextGroups, features: Features) -> dict[str, str]:
        """Return all metrics if the scores are equal, or each anchor is to find all texts; see `Task.unmeasurable`."""
        scores = {*(examples.scores or [])}
        if len(scores) == 1:
            return dict.fromkeys(self.metrics, f"every score is {scores.pop():g}")
        if examples.scores is None and not self.scored and not examples.has_negatives():
            return dict.fromkeys(self.metrics, "no anchor has another text to find than its positives")
        return {}

    def compute_metrics(self, examples: TextGroups, features: Features, outputs: Outputs) -> dict[str, float]:
        """Compute the metrics; empty if the validation data has scores and these examples have none."""
        if self.scored and examples.scores is None:
            return {}
        embeddings = np.stack(outputs).reshape(len(examples), features.num_choices, -1)
        dims = [dim for dim in self.settings.embedding.matryoshka_dims if dim < embeddings.shape[2]]
        values: dict[str, float] = {}
        for size in (None, *dims):
            suffix = "" if size is None else f"_{size}"
            found = self._metrics_of(examples, features, embeddings[..., :size])
            values |= {f"{name}{suffix}": value for name, value in found.items()}
        return values

    def _metrics_of(self, examples: TextGroups, features: Features, embeddings: np.ndarray) -> dict[str, float]:
        if examples.scores is not None:
            return correlations(_cosines(embeddings)[:, 0], np.array(examples.scores))
        return retrieval_metrics(embeddings, features.labels["text_ids"], examples.rows.file)

    def write_predictions(
        self, folder: Path, split: str, examples: TextGroups, features: Features, outputs: Outputs
    ) -> None:
        """Write predictions_SPLIT.tsv: row, id, and the cosines of the first text and the others."""
        header = ["score"] if features.num_choices == 2 else [f"score_{i}" for i in range(1, features.num_choices)]
        embeddings = (output.reshape(1, features.num_choices, -1) for output in outputs)
        values = ([f"{score:.6g}" for score in _cosines(one)[0]] for one in embeddings)
        write_aligned(folder / f"predictions_{split}.tsv", examples.rows, header, values)

    def write_folder(self, folder: Path, *, adapted: bool) -> None:
        """Write the files with which sentence-transformers opens the model; see `Task.write_folder`."""
        write_sentence_modules(folder, self.modules, self.config.hidden_size, self.max_length())

    def parse_lines(self, lines: Sequence[str], first_row: int = 1) -> TextGroups:
        """Parse pairs of texts separated by a tab."""
        pairs, rows = parse_pairs(lines, first_row, self.bad_rows, "two, or embed single texts with `bertfast embed`")
        return TextGroups([*pairs], rows)


def _cosines(embeddings: np.ndarray) -> np.ndarray:
    """Return the cosines of each example's first text and its others: [E, C, D] -> float64 [E, C - 1]."""
    values = embeddings.astype(np.float64)
    values /= np.linalg.norm(values, axis=2, keepdims=True).clip(min=1e-12)
    result: np.ndarray = (values[:, :1] * values[:, 1:]).sum(2)
    return result
