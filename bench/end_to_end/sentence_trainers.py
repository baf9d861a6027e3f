"""sentence-transformers' own trainers, on the batches of a fine-tuning run of bertfast, from the same weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import CrossEncoder, CrossEncoderTrainer, SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.cross_encoder import CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MultipleNegativesRankingLoss
from transformers import PrinterCallback, TrainerCallback

from bertfast.models.files import save
from bertfast.models.tokenizers import copy_tokenizer
from bertfast.runtime.precision import Precision
from bertfast.tasks.embedding import EmbeddingTask
from bertfast.training.finetuning import Finetuning

LOSSES = {"cosent": CoSENTLoss, "multiple-negatives-ranking": MultipleNegativesRankingLoss}

SentenceModel = SentenceTransformer | CrossEncoder


class FixedBatches(DefaultBatchSampler):
    """Batches of given rows in their order.

    Args:
        batches: Indices of the examples of each batch.
    """

    def __init__(self, batches: Sequence[np.ndarray]):
        super().__init__(range(0), batch_size=len(batches[0]), drop_last=False)
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter([batch.tolist() for batch in self.batches])

    def __len__(self) -> int:
        return len(self.batches)


def require_trainers() -> None:
    """End the program if what the trainers import is not installed."""
    missing = [name for name in ("accelerate", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"sentence-transformers' trainers need {' and '.join(missing)}: pip install {' '.join(missing)}"
        )


def open_model(run: Finetuning, folder: Path) -> SentenceModel:
    """Return sentence-transformers' model with the weights of a run, which are written to a folder."""
    save(run.model, folder)
    copy_tokenizer(run.tokenizer, run.source, folder)
    run.task.write_folder(folder, adapted=False)
    if isinstance(run.task, EmbeddingTask):
        return SentenceTransformer(str(folder), device="cpu")
    reranker: CrossEncoder = CrossEncoder(str(folder), device="cpu", max_length=run.task.max_length())
    return reranker


def sentence_trainer(
    run: Finetuning,
    model: SentenceModel,
    batches: Sequence[np.ndarray],
    folder: Path,
    precision: Precision,
    callbacks: Sequence[TrainerCallback] = (),
    evaluator: BaseEvaluator | None = None,
    **options: Any,
) -> SentenceTransformerTrainer | CrossEncoderTrainer:
    """Return a trainer with the optimizer and the schedule of a run.

    Args:
        run: The run, with one batch per step.
        model: What `open_model` returned.
        batches: Indices of the training examples of each step.
        folder: Output folder.
        precision: fp32, or bf16 by autocast, as in bertfast.
        callbacks: Called by the trainer.
        evaluator: Measures the model on the validation data.
        options: Further training arguments.
    """
    settings = run.settings
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 1,  # all batches once
        "per_device_train_batch_size": settings.hyperparameters.per_device_train_batch_size,
        "learning_rate": settings.hyperparameters.learning_rate,
        "warmup_steps": round(run.length.warmup * run.steps),
        "weight_decay": settings.optimizer.weight_decay,
        "max_grad_norm": settings.optimizer.max_grad_norm,
        "seed": settings.hyperparameters.seed,
        "bf16": precision == "bf16",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "batch_sampler": lambda dataset, **others: FixedBatches(batches),
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    } | options
    of_trainer: dict[str, Any] = {"callbacks": [*callbacks], "train_dataset": dataset_of(run), "evaluator": evaluator}
    trainer: SentenceTransformerTrainer | CrossEncoderTrainer
    if isinstance(model, CrossEncoder):
        chosen = CrossEncoderTrainingArguments(**arguments)
        trainer = CrossEncoderTrainer(model, chosen, loss=BinaryCrossEntropyLoss(model), **of_trainer)
    else:
        assert isinstance(model, SentenceTransformer)
        assert isinstance(run.task, EmbeddingTask)
        loss = LOSSES[run.task.loss_name](model, scale=settings.embedding.similarity_scale)
        of_embeddings = SentenceTransformerTrainingArguments(**arguments)
        trainer = SentenceTransformerTrainer(model, of_embeddings, loss=loss, **of_trainer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def dataset_of(run: Finetuning) -> Any:
    """Return the training examples of a run as `datasets.Dataset`."""
    from datasets import Dataset

    examples = run.examples["train"]
    if isinstance(run.task, EmbeddingTask):
        columns: dict[str, Any] = dict(zip(("anchor", "positive"), zip(*examples.texts, strict=True), strict=True))
        scores = examples.scores
    else:
        columns = dict(zip(("query", "document"), zip(*examples.pairs, strict=True), strict=True))
        scores = [label / run.settings.embedding.max_score for label in examples.labels]
    columns = {name: [*texts] for name, texts in columns.items()}
    return Dataset.from_dict(columns | ({} if scores is None else {"label": scores}))
