"""`bertfast finetune`: teach a model to classify sentences or pairs of them, or to score them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
from tqdm import tqdm

from bertfast import checkpoint
from bertfast.config import BertConfig
from bertfast.data.tokenizer import save_tokenizer
from bertfast.models import BertForSequenceClassification
from bertfast.tasks.classification import (
    Columns,
    Features,
    are_fractions,
    encode_labels,
    featurize,
    is_regression,
    label_numbers,
    name_labels,
    raw_labels,
    shuffled_batches,
)
from bertfast.tasks.metrics import CLASSIFICATION, REGRESSION, measure, require_libraries
from bertfast.tasks.pretrained import open_tokenizer, sequence_length
from bertfast.tasks.tables import Table, read_table
from bertfast.training.evaluate import write_results
from bertfast.training.interrupt import Interrupt, RunStopped
from bertfast.training.journal import Journal
from bertfast.training.optimizer import SKIPS_IN_A_ROW, build_optimizers, step_if_finite
from bertfast.training.precision import autocast, choose_device, choose_precision
from bertfast.training.predict import TaskSettings, predict_logits, write_predictions
from bertfast.training.schedule import schedule, set_learning_rate

logger = logging.getLogger("bertfast")


@dataclass(kw_only=True)
class FinetuneSettings(TaskSettings):
    """What to fine-tune, on what, and how.

    Attributes:
        train_file: A .tsv file (a header, no quoting) or a .jsonl file, also compressed.
        output_dir: Folder for the best model, metrics.jsonl, all_results.json and the predictions.
        validation_file: The same for validation; none: the last model counts as the best.
        test_file: The same to predict on with the best model; its labels, if there are any, are only for metrics.
        label_column: Column of the label; none: label.
        task: auto: regression where the labels are numbers with a fraction, else classification.
        random_init: Take only configuration and tokenizer from the model, and start from random weights.
        per_device_train_batch_size: Texts or pairs a step.
        num_train_epochs: Times that each of them is seen.
        learning_rate: At the end of the warm-up; falls linearly to 0.
        warmup_ratio: Share of the run in which the rate rises.
        weight_decay: Of weights; biases and LayerNorms do not decay.
        max_grad_norm: Gradients are scaled down to this norm; 0: never.
        eval_steps: Steps between validations; none: one at the end of each epoch.
        metric_for_best_model: What decides which model is best; none: accuracy, or pearson of a regression.
        early_stopping_patience: Stop after this many validations in a row without a better model; none: never.
        logging_steps: Steps between entries of metrics.jsonl.
        seed: Decides new weights, the order of the texts and dropout.
        overwrite_output_dir: Write into output_dir although it holds a model.
    """

    train_file: str
    output_dir: str
    validation_file: str | None = None
    test_file: str | None = None
    label_column: str | None = None
    task: Literal["auto", "classification", "regression"] = "auto"
    random_init: bool = False
    per_device_train_batch_size: int = 32
    num_train_epochs: float = 3.0
    learning_rate: float = 5e-5
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    eval_steps: int | None = None
    metric_for_best_model: str | None = None
    early_stopping_patience: int | None = None
    logging_steps: int = 50
    seed: int = 42
    overwrite_output_dir: bool = False

    def __post_init__(self):
        super().__post_init__()
        counts = ("per_device_train_batch_size", "eval_steps", "early_stopping_patience", "logging_steps")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is at least 1, got {value}")
        if self.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs is more than 0, got {self.num_train_epochs}")
        if self.validation_file is None and (self.early_stopping_patience or self.metric_for_best_model):
            raise ValueError("early_stopping_patience and metric_for_best_model need a validation_file")


def finetune(settings: FinetuneSettings, on_step: Callable[[int], None] = lambda step: None) -> dict[str, float]:
    """Run it; `on_step` is called with the number of steps done after each. Returns what all_results.json holds.

    Leaves in `output_dir` a folder that `transformers.BertForSequenceClassification.from_pretrained` opens.
    RunStopped after Ctrl-C, or if the loss stays without a finite gradient; the best model so far is kept.
    """
    return Finetuning(settings).run(on_step)


class Finetuning:
    """One run: what it works on, and its loop."""

    def __init__(self, settings: FinetuneSettings):
        require_libraries()
        self.settings = settings
        self.folder = Path(settings.output_dir)
        if (self.folder / "config.json").exists() and not settings.overwrite_output_dir:
            raise ValueError(
                f"{self.folder} holds a model already; choose another output_dir, or say overwrite_output_dir"
            )
        self.device = choose_device(settings.device)
        self.precision = choose_precision(self.device, settings.precision)
        files = {"train": settings.train_file, "validation": settings.validation_file, "test": settings.test_file}
        tables = {split: read_table(path) for split, path in files.items() if path is not None}
        train = tables["train"]
        columns = Columns.choose(train, settings.text_column, settings.text_pair_column, settings.label_column)
        source = checkpoint.resolve(settings.model_name_or_path)
        self.config = self._configure(source, raw_labels(train, columns.label))
        self.metric = self._choose_metric()
        self.tokenizer = open_tokenizer(source, self.config)
        self.features = {split: self._featurize(table, columns, split) for split, table in tables.items()}
        torch.manual_seed(settings.seed)
        self.model = self._build_model(source).to(self.device)
        self.optimizers = build_optimizers(self.model, "adamw", settings.learning_rate, settings.weight_decay)
        self.steps_per_epoch = math.ceil(len(self.features["train"]) / settings.per_device_train_batch_size)
        self.steps = max(round(settings.num_train_epochs * self.steps_per_epoch), 1)
        self.step = self.best_step = self.skipped_in_a_row = self.validations_without_better = 0
        self.best_score, self.best_metrics = (-math.inf, -math.inf), {}
        self.losses: list[float] = []
        self.tokens, self.seconds = 0, 0.0

    def run(self, on_step: Callable[[int], None]) -> dict[str, float]:
        """The loop, and what follows from the best model."""
        settings = self.settings
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(self.folder)
        print(f"fine-tuning on {len(self.features['train'])} texts, {self.precision} on {self.device}")
        every = settings.eval_steps or self.steps_per_epoch
        with Interrupt() as interrupt, tqdm(total=self.steps, desc="fine-tuning", unit="step") as bar:
            for rows in islice(self._batches(), self.steps):
                self._train_step(rows)
                self._report(bar)
                on_step(self.step)
                if interrupt.requested:
                    self._stop(f"stopped after step {self.step} of {self.steps}")
                if self.skipped_in_a_row >= SKIPS_IN_A_ROW:
                    self._stop(f"{SKIPS_IN_A_ROW} steps in a row had no finite gradient: lower the learning rate")
                if self.step % every == 0 or self.step == self.steps:
                    self._validate(bar)
                if self.validations_without_better == settings.early_stopping_patience:
                    break
        return self._finish()

    def _configure(self, source: Path, labels: list[str]) -> BertConfig:
        task = self.settings.task
        regression = task == "regression" or (task == "auto" and are_fractions(labels))
        names = ["LABEL_0"] if regression else name_labels(labels)
        known = [*BertConfig.from_pretrained(source).id2label.values()]
        names = known if sorted(known) == sorted(names) else names
        return BertConfig.from_pretrained(
            source,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            problem_type="regression" if regression else "single_label_classification",
        )

    def _choose_metric(self) -> str:
        known = REGRESSION if is_regression(self.config) else CLASSIFICATION
        metric = (self.settings.metric_for_best_model or known[0]).removeprefix("eval_")
        if metric not in known:
            raise ValueError(f"metric_for_best_model must be one of {', '.join(known)} in this task, got {metric!r}")
        return metric

    def _featurize(self, table: Table, columns: Columns, split: str) -> Features:
        length = sequence_length(self.settings.max_seq_length, self.config)
        labelled = split != "test" or columns.label in table.columns
        labels = encode_labels(table, columns.label, label_numbers(self.config)) if labelled else None
        features = featurize(table, columns, self.tokenizer, length, labels)
        if features.cut:
            logger.warning("%s: cut %d of %d texts to %d tokens", table.path, features.cut, len(features), length)
        return features

    def _build_model(self, source: Path) -> BertForSequenceClassification:
        model = BertForSequenceClassification(self.config)
        if not self.settings.random_init:
            weights = checkpoint.read_weights(source)
            if BertConfig.from_pretrained(source).id2label != self.config.id2label:
                # A classifier of other labels knows nothing of these.
                weights = {key: value for key, value in weights.items() if not key.startswith("classifier.")}
            checkpoint.load_weights(model, weights, self.settings.model_name_or_path)
        return model.train()

    def _batches(self) -> Iterator[np.ndarray]:
        sequences, settings = len(self.features["train"]), self.settings
        return chain.from_iterable(
            shuffled_batches(sequences, settings.per_device_train_batch_size, settings.seed, epoch) for epoch in count()
        )

    def _train_step(self, rows: np.ndarray) -> None:
        settings, clock = self.settings, time.perf_counter()
        rate = settings.learning_rate * schedule("linear", self.step / self.steps, settings.warmup_ratio)
        batch = self.features["train"].batch(rows, self.device)
        with autocast(self.device, self.precision):
            loss = self.model(**batch).loss
        loss.backward()
        set_learning_rate(self.optimizers, rate)
        norm = step_if_finite(self.model, self.optimizers, settings.max_grad_norm, loss.detach())
        if norm.isfinite():
            self.skipped_in_a_row = 0
            self.losses.append(loss.item())
        else:
            self.skipped_in_a_row += 1
        self.step += 1
        self.tokens += batch["input_ids"].shape[1]
        self.seconds += time.perf_counter() - clock

    def _report(self, bar: tqdm) -> None:
        speed = self.tokens / self.seconds
        recent = self.losses[-self.settings.logging_steps :]
        loss = sum(recent) / max(len(recent), 1)
        bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
        bar.update()
        if self.step % self.settings.logging_steps == 0:
            self.journal.write(step=self.step, epoch=self.epoch, loss=loss, tokens_per_second=speed)

    @property
    def epoch(self) -> float:
        """How often the training file has been seen."""
        return self.step / self.steps_per_epoch

    def _validate(self, bar: tqdm) -> None:
        if "validation" not in self.features:
            self._save()
            return
        logits, metrics = self._predict("validation")
        self.journal.write(step=self.step, epoch=self.epoch, **metrics)
        bar.write(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        sign = -1 if self.metric == "loss" else 1
        score = sign * metrics[f"eval_{self.metric}"], -metrics["eval_loss"]  # the loss decides between equals
        if score > self.best_score:
            self.best_score, self.best_metrics, self.validations_without_better = score, metrics, 0
            self._save()
            write_predictions(self.folder / "predictions_validation.tsv", logits, self.config)
        else:
            self.validations_without_better += 1

    def _predict(self, split: str) -> tuple[np.ndarray, dict[str, float]]:
        features = self.features[split]
        logits = predict_logits(self.model, features, self.settings.eval_tokens, self.precision)
        metrics = {} if features.labels is None else measure(logits, features.labels)
        prefix = "test" if split == "test" else "eval"
        return logits, {f"{prefix}_{name}": value for name, value in metrics.items()}

    def _save(self) -> None:
        self.model.save_pretrained(self.folder)
        save_tokenizer(self.tokenizer, self.folder)
        self.best_step = self.step

    def _stop(self, reason: str) -> NoReturn:
        if not self.best_step:
            self._save()
        raise RunStopped(f"{reason}; the best model so far, that of step {self.best_step}, is in {self.folder}")

    def _finish(self) -> dict[str, float]:
        results = {
            "epoch": self.epoch,
            "best_step": self.best_step,
            **self.best_metrics,
            "train_samples": len(self.features["train"]),
            "train_loss": sum(self.losses) / max(len(self.losses), 1),
            "train_runtime": self.seconds,
            "train_tokens_per_second": self.tokens / self.seconds,
        }
        if "test" in self.features:
            checkpoint.load_weights(self.model, checkpoint.read_weights(self.folder), str(self.folder))
            logits, metrics = self._predict("test")
            write_predictions(self.folder / "predictions_test.tsv", logits, self.config)
            results |= metrics
        write_results(self.folder / "all_results.json", results)
        return results
