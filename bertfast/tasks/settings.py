"""Settings that the commands on labelled data share, by subject."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Annotated, Literal

import torch

from bertfast.models.sentence_modules import NormalizationName, PoolingName
from bertfast.runtime.precision import InferencePrecision, Precision
from bertfast.runtime.settings import (
    Count,
    Positive,
    Range,
    Settings,
    flag,
    refuse_repeated,
    refuse_without_effect,
)
from bertfast.tasks.glue import BENCHMARKS
from bertfast.tasks.labels import PROBLEM_TYPES
from bertfast.tasks.rows import OnBadRows

# What --task may be, by the kind of problem.
CLASSIFICATION_NAMES = (*PROBLEM_TYPES, *BENCHMARKS)
MULTIPLE_CHOICE_NAMES = ("multiple-choice", "swag")
QUESTION_ANSWERING_NAMES = ("question-answering", "squad", "squad-2")
TOKEN_CLASSIFICATION_NAMES = ("token-classification", "conll", "wnut")
TASK_NAMES = (
    *CLASSIFICATION_NAMES,
    *MULTIPLE_CHOICE_NAMES,
    *QUESTION_ANSWERING_NAMES,
    *TOKEN_CLASSIFICATION_NAMES,
    "embedding",
    "reranking",
)
MANY_TOKENS = 8192
"""Approximate tokens per batch where --eval-tokens is not given, except on a CPU."""


@dataclass(frozen=True, kw_only=True)
class ColumnSettings(Settings):
    """Columns of a data file, and rows that cannot be used.

    Attributes:
        text_column: Column of the text. If not given: the task's, else sentence, sentence1 or text.
        text_pair_column: Column of the second text of a pair. If not given: the task's, else sentence2 if there is one.
        label_column: Column of the label. If not given: the task's, else label.
        tag_column: Column of a word's tag in token-classification files, counted from 0; -1 is the last.
        on_bad_rows: Stop at the first row that cannot be used, or skip and count such rows.
    """

    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    tag_column: Annotated[int, Range()] = -1
    on_bad_rows: OnBadRows = "stop"

    def validate(self) -> None:
        columns = {flag(name): getattr(self, name) for name in ("text_column", "text_pair_column", "label_column")}
        for (first, column), (second, other) in combinations(columns.items(), 2):
            if column is not None and column == other:
                raise ValueError(f"{first} and {second} both name {column!r}: name another column with one of them")


@dataclass(frozen=True, kw_only=True)
class QuestionAnsweringSettings(Settings):
    """Windows of long contexts, and choice of the answers, in question answering.

    Attributes:
        doc_stride: Tokens between the starts of two windows of a long context in question answering. If not given: 128,
            or as many as a window has room for.
        max_query_length: Maximum tokens of a question. If not given: 64, or half of --max-seq-length if that is less.
        max_answer_length: Maximum tokens of an answer.
        null_score_diff_threshold: Predict no answer if its score exceeds the best answer's by more than this.
        n_best: Maximum answers per question in nbest_SPLIT.json.
    """

    doc_stride: Count | None = None
    max_query_length: Count | None = None
    max_answer_length: Count = 30
    null_score_diff_threshold: Annotated[float, Range()] = 0.0
    n_best: Count = 20


LossName = Literal["multiple-negatives-ranking", "cosent", "contrastive"]


@dataclass(frozen=True, kw_only=True)
class EmbeddingSettings(Settings):
    """Losses of embeddings and rerankers, and how a text's embedding follows from those of its tokens.

    Attributes:
        loss: Loss of --task embedding, as sentence-transformers defines it: multiple-negatives-ranking, of pairs and
            triplets, with the other texts of the batch as negatives; cosent, of pairs with scores; contrastive, of
            pairs labelled 1 or 0. auto: what fits the file.
        similarity_scale: Factor of the cosines in multiple-negatives-ranking and cosent, the inverse of a temperature.
        contrastive_margin: Cosine distance up to which pairs labelled 0 are pushed apart by contrastive.
        matryoshka_dims: Sizes to which embeddings are truncated, for each of which the loss is added. If not given: the
            loss of the whole embeddings alone.
        pooling: How a text's embedding follows from those of its tokens, by the names of sentence-transformers; auto:
            as the model's modules.json says, and mean if it has none.
        normalization: l2: embeddings of length 1; none: as they are; auto: as the model's modules.json says.
        max_score: Largest label of --task reranking, such as 5 in STS-B, by which labels are divided.
    """

    loss: Literal["auto", LossName] = "auto"
    similarity_scale: Positive = 20.0
    contrastive_margin: Positive = 0.5
    matryoshka_dims: list[Count] = field(default_factory=list)
    pooling: Literal["auto", PoolingName] = "auto"
    normalization: NormalizationName = "auto"
    max_score: Positive = 1.0

    def validate(self) -> None:
        refuse_repeated("matryoshka_dims", self.matryoshka_dims)
        if self.loss not in ("auto", "contrastive") and self.contrastive_margin != 0.5:
            refuse_without_effect(["--contrastive-margin"], f"--loss {self.loss} has no margin")
        if self.loss == "contrastive" and self.similarity_scale != 20:
            refuse_without_effect(["--similarity-scale"], "--loss contrastive has no scale")


@dataclass(frozen=True, kw_only=True)
class ComputeSettings(Settings):
    """Device, precision and batch size of inference.

    Attributes:
        eval_tokens: Approximate tokens per batch in evaluation and prediction. If not given: 8,192 on a GPU and in
            --objective mlm, else 2,048.
        cuda_graph: On a GPU, pad batches to a few shapes and replay frequent ones from CUDA graphs.
        precision: auto: bf16 if the device supports it natively and, on a CPU, it is faster; else fp32. int8: weights
            and activations of the encoder's linear layers in int8, on a CPU, calibrated on the first texts.
        device: Device such as "cpu" or "cuda:0". If not given: a GPU if one is available.
    """

    eval_tokens: Count | None = None
    cuda_graph: bool = True
    precision: InferencePrecision = "auto"
    device: str | None = None

    def tokens_per_batch(self, device: torch.device) -> int:
        """Return the approximate tokens per batch on a device.

        On a CPU, larger batches only take more memory: `bench/LOG.md`, "Smaller batches of inference".
        """
        return self.eval_tokens or (2048 if device.type == "cpu" else MANY_TOKENS)


@dataclass(frozen=True, kw_only=True)
class FloatingPointSettings(ComputeSettings):
    """Device, precision and batch size of inference.

    Attributes:
        precision: auto: bf16 if the device supports it natively and, on a CPU, it is faster; else fp32.
    """

    precision: Precision = "auto"


@dataclass(frozen=True, kw_only=True)
class TaskSettings(Settings):
    """Settings that all commands on labelled data share.

    Attributes:
        model_name_or_path: Folder or hub id of a model and its tokenizer.
        task: sequence-classification, regression or multi-label (of texts or pairs of texts), multiple-choice,
            question-answering, token-classification, embedding (of pairs or triplets), reranking (of queries and
            documents), or the name of a data set: cola, sst-2, mrpc, sts-b, qqp, mnli, mnli-mm, ax, qnli, rte, wnli,
            snli, swag, squad, squad-2, conll or wnut; auto: inferred from the model, else from the file.
        max_seq_length: Maximum sequence length in tokens, beyond which inputs are truncated or split. If not given: the
            model's number of positions.
        columns: Columns of a data file, and rows that cannot be used.
        question_answering: Windows of long contexts, and choice of the answers, in question answering.
        embedding: Losses of embeddings and rerankers, and how a text's embedding follows from those of its tokens.
        compute: Device, precision and batch size of inference.
    """

    model_name_or_path: str
    task: str = "auto"
    max_seq_length: Count | None = None
    columns: ColumnSettings = field(default_factory=ColumnSettings)
    question_answering: QuestionAnsweringSettings = field(default_factory=QuestionAnsweringSettings)
    embedding: EmbeddingSettings = field(default_factory=EmbeddingSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)

    def validate(self) -> None:
        if self.task not in ("auto", *TASK_NAMES):
            raise ValueError(f"there is no task {self.task!r}; choose --task from auto, {', '.join(TASK_NAMES)}")
