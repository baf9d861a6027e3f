"""`bertfast finetune`: teach a model a task: sentences, pairs, choices, answers in a text, tags of words."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import BertConfig, PreTrainedModel

from bertfast.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_hash
from bertfast.inference.embed import states_on_disk
from bertfast.inference.predict import predict_outputs
from bertfast.models.extensions import class_for
from bertfast.models.files import load, read_config, report_differences, resolve, save
from bertfast.models.initialise import initialise
from bertfast.models.patch import require_packed
from bertfast.ops.reference import IGNORED
from bertfast.runtime.cuda_graph import GraphRunner, capture_for, side_stream
from bertfast.runtime.precision import autocast, choose_device, choose_precision
from bertfast.runtime.signals import Interrupt, RunStopped
from bertfast.tasks.features import ModelInputs, labels_in, shuffled_batches, within_budget
from bertfast.tasks.metrics import require_libraries
from bertfast.tasks.pretrained import open_tokenizer, sequence_length
from bertfast.tasks.registry import FINETUNING_TASK, choose_task
from bertfast.tasks.task import TaskSettings
from bertfast.training.evaluate import write_results
from bertfast.training.metrics_log import MetricsLog
from bertfast.training.optimizer import SKIPS_IN_A_ROW, build_optimizers, not_finite, step_if_finite
from bertfast.training.schedule import schedule, set_learning_rate

logger = logging.getLogger("bertfast")


@dataclass(kw_only=True)
class FinetuneSettings(TaskSettings):
    """What to fine-tune, on what, and how.

    Attributes:
        train_file: A .tsv file (a header, no quoting), .csv or .jsonl file, a file in SQuAD's form (.json), or lines of
            words and tags (.conll); also compressed.
        output_dir: Folder for the best model, metrics.jsonl, all_results.json and the predictions.
        validation_file: The same for validation; none: the last model counts as the best.
        test_file: The same to predict on with the best model; its labels, if there are any, are only for metrics.
        strategy: fine-tuning teaches the whole model; feature-based leaves it as it is, and teaches a BiLSTM that reads
            its layers (tags of words alone).
        feature_layers: Which of them: embeddings, second-to-last, last, sum-last-four, concat-last-four or sum-all;
            sums are weighted, and the weights learned.
        lstm_size: Of each direction of the BiLSTM.
        lstm_layers: Of the BiLSTM.
        features_dir: Folder for the layers that feature-based reads, which are taken from there if they are known for
            the same encoder and words; none: they are gone when the run is.
        bilstm: Put a BiLSTM of two layers, as wide as the model, between the encoder and the head.
        random_init: Take only configuration and tokenizer from the model, and start from random weights.
        init_from_task: Model that another task has taught, to take the encoder from: as MNLI's is a better start for
            RTE. Its head is left behind.
        class_weights: balanced: an example counts as much more as its label is rarer.
        per_device_train_batch_size: Examples of a forward and backward pass.
        gradient_accumulation_steps: Passes whose gradients make one step.
        tokens_per_batch: A pass of more tokens than this is made in several; the step is the same.
        num_train_epochs: Times that each example is seen.
        learning_rate: At the end of the warm-up; falls linearly to 0.
        warmup_ratio: Share of the run in which the rate rises.
        weight_decay: Of weights; biases and LayerNorms do not decay.
        max_grad_norm: Gradients are scaled down to this norm; 0: never.
        dropout: Of hidden activations and attention; none: the model's.
        eval_steps: Steps between validations; none: one at the end of each epoch.
        metric_for_best_model: What decides which model is best; none: the task's first.
        early_stopping_patience: Stop after this many validations in a row without a better model; none: never.
        logging_steps: Steps between entries of metrics.jsonl.
        seed: Decides new weights, the order of the examples and dropout.
        overwrite_output_dir: Write into output_dir although it holds a model.
    """

    train_file: str
    output_dir: str
    validation_file: str | None = None
    test_file: str | None = None
    strategy: Literal["fine-tuning", "feature-based"] = "fine-tuning"
    feature_layers: str = "concat-last-four"
    lstm_size: int = 768
    lstm_layers: int = 2
    features_dir: str | None = None
    bilstm: bool = False
    random_init: bool = False
    init_from_task: str | None = None
    class_weights: Literal["none", "balanced"] = "none"
    per_device_train_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    tokens_per_batch: int = 16_384
    num_train_epochs: float = 3.0
    learning_rate: float = 5e-5
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    dropout: float | None = None
    eval_steps: int | None = None
    metric_for_best_model: str | None = None
    early_stopping_patience: int | None = None
    logging_steps: int = 50
    seed: int = 42
    overwrite_output_dir: bool = False

    def __post_init__(self):
        super().__post_init__()
        counts = ("per_device_train_batch_size", "gradient_accumulation_steps", "tokens_per_batch", "eval_steps")
        for name in (*counts, "early_stopping_patience", "logging_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is at least 1, got {value}")
        if self.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs is more than 0, got {self.num_train_epochs}")
        if self.validation_file is None and (self.early_stopping_patience or self.metric_for_best_model):
            raise ValueError("early_stopping_patience and metric_for_best_model need a validation_file")
        if self.features_dir is not None and self.strategy != "feature-based":
            raise ValueError("features_dir is for the strategy feature-based, whose encoder does not change")
        if self.random_init and self.init_from_task is not None:
            raise ValueError("random_init and init_from_task each say where the weights come from: choose one")


def finetune(settings: FinetuneSettings, on_step: Callable[[int], None] = lambda step: None) -> dict[str, float]:
    """Run it; `on_step` is called with the number of steps done after each. Returns what all_results.json holds.

    Leaves in `output_dir` a folder that transformers' class of the same name opens. RunStopped after Ctrl-C, or if the
    loss stays without a finite gradient; the best model so far is kept.
    """
    run = Finetuning(settings)
    with side_stream(run.device):
        return run.run(on_step)


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
        self.task = choose_task(settings, file=settings.train_file)
        if settings.strategy == "feature-based":
            if self.task.of_features is None:
                raise ValueError("the strategy feature-based is for tags of words")
            self.task.model = self.task.of_features
        files = {"train": settings.train_file, "validation": settings.validation_file, "test": settings.test_file}
        files = {split: path for split, path in files.items() if path is not None}
        examples = {split: self.task.read(path, labelled=split != "test") for split, path in files.items()}
        source = resolve(settings.model_name_or_path)
        self.config = self._configure(source, self.task.learn_labels(examples["train"]))
        self.task.know(self.config)
        self.metric = self._choose_metric()
        self.tokenizer = open_tokenizer(source, self.config)
        length = sequence_length(settings.max_seq_length, self.config)
        self.examples, self.features = {}, {}
        for split, some in examples.items():
            self.examples[split], features = self.task.featurize(some, self.tokenizer, length)
            self.features[split] = features
            if features.cut:
                sequences = len(features.starts) - 1
                logger.warning("%s: cut %d of %d texts to %d tokens", files[split], features.cut, sequences, length)
        torch.manual_seed(settings.seed)
        self.model = self._build_model(source).to(self.device)
        if settings.strategy == "feature-based":
            self._scratch = TemporaryDirectory()  # gone when the run is
            kept = Path(settings.features_dir or self._scratch.name)
            for split, some in self.features.items():
                states = states_on_disk(kept, self.model, some, self.precision, settings.eval_tokens)
                self.features[split] = replace(some, inputs={"features": states})
        self.optimizers = build_optimizers(self.model, "adamw", settings.learning_rate, settings.weight_decay)
        self._prepare_steps()
        self.examples_per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        self.steps_per_epoch = math.ceil(len(self.features["train"]) / self.examples_per_step)
        self.steps = max(round(settings.num_train_epochs * self.steps_per_epoch), 1)
        self.step = self.best_step = self.skipped_in_a_row = self.validations_without_better = 0
        self.best_score, self.best_metrics = (-math.inf, -math.inf), {}
        self.losses: list[float] = []
        self.skipped_loss = math.nan  # of the last step that was skipped
        self.pending: list[Tensor] = []  # of steps that were started: see `_update_eagerly`
        # A GPU is asked how steps went as rarely as they are logged: whoever asks waits for all that it was given.
        self.steps_per_read = settings.logging_steps if self.device.type == "cuda" else 1
        self.tokens, self.seconds = 0, 0.0

    def _prepare_steps(self) -> None:
        """Set up what steps compute on; captured steps read it where it is."""
        self.host_weights = self._class_weights()
        self.weights = None if self.host_weights is None else self.host_weights.to(self.device)
        self.items = torch.ones((), device=self.device)
        self.loss = torch.zeros((), device=self.device)
        self.capture = capture_for(self.model, self.precision, enabled=self.settings.cuda_graph)
        self._accumulate = GraphRunner(self._accumulate_eagerly, self.device, self.capture)
        self._update = GraphRunner(self._update_eagerly, self.device, self.capture)

    def run(self, on_step: Callable[[int], None]) -> dict[str, float]:
        """The loop, and what follows from the best model."""
        settings = self.settings
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics_log = MetricsLog(self.folder)
        print(f"fine-tuning on {len(self.examples['train'])} examples, {self.precision} on {self.device}")
        every = settings.eval_steps or self.steps_per_epoch
        with Interrupt() as interrupt, tqdm(total=self.steps, desc="fine-tuning", unit="step") as bar:
            for rows in islice(self.rows_of_steps(), self.steps):
                self.train_step(rows)
                self._report(bar)
                on_step(self.step)
                if interrupt.requested:
                    self._stop(f"stopped after step {self.step} of {self.steps}")
                if self.skipped_in_a_row >= SKIPS_IN_A_ROW:
                    what = not_finite(self.skipped_loss, self.device)
                    self._stop(f"{SKIPS_IN_A_ROW} steps in a row were skipped, {what}: lower the learning rate")
                if self.step % every == 0 or self.step == self.steps:
                    self._validate(bar)
                if self.validations_without_better == settings.early_stopping_patience:
                    break
        return self._finish()

    def _configure(self, source: Path, labels: dict[str, Any]) -> BertConfig:
        names, known = labels.get("id2label"), read_config(source).id2label
        if names is not None and sorted(known.values()) == sorted(names.values()):
            labels = labels | {"id2label": known}
        if self.settings.dropout is not None:
            labels |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), self.settings.dropout)
        if self.settings.task != "auto":
            labels |= {FINETUNING_TASK: self.settings.task}
        if self.settings.bilstm:
            labels |= {"bilstm": True}
        if self.settings.strategy == "feature-based":
            labels |= {name: getattr(self.settings, name) for name in ("feature_layers", "lstm_size", "lstm_layers")}
        return read_config(source, **labels)

    def _choose_metric(self) -> str:
        known = self.task.metrics
        metric = (self.settings.metric_for_best_model or known[0]).removeprefix("eval_")
        if metric not in known:
            raise ValueError(f"metric_for_best_model must be one of {', '.join(known)} in this task, got {metric!r}")
        return metric

    def _build_model(self, source: Path) -> PreTrainedModel:
        if self.settings.random_init:
            model = class_for(self.task.model, self.config)(self.config)
            initialise(model)
        else:
            model = self._open_model(source)
        require_packed(model.train())
        torch.manual_seed(self.settings.seed)  # whatever transformers drew, dropout is the same
        return model

    def _open_model(self, source: Path) -> PreTrainedModel:
        name = self.settings.init_from_task or self.settings.model_name_or_path
        start = resolve(name)
        own, other_task = read_config(start), self.settings.init_from_task is not None
        if other_task and tokenizer_hash(load_tokenizer(start)) != tokenizer_hash(self.tokenizer):
            raise ValueError(f"{name} reads text as other tokens than {source}, whose tokenizer is used")
        other_task |= self.task.model.__name__ not in (own.architectures or [])
        other_task |= own.id2label != self.config.id2label
        fresh = (self.task.head,) if other_task else ()  # a head for something else knows nothing of this
        model, missing, unexpected = load(self.task.model, start, self.config, fresh=fresh)
        report_differences(model, name, missing, unexpected)
        return model

    def _class_weights(self) -> Tensor | None:
        if self.settings.class_weights == "none":
            return None
        labels = self.features["train"].labels.get("labels")
        if labels is None or labels.ndim > 1 or np.issubdtype(labels.dtype, np.floating):
            raise ValueError("class_weights are for tasks in which an example, or a word, has one label of several")
        counts = np.bincount(labels[labels >= 0], minlength=self.config.num_labels).clip(min=1)
        return torch.tensor(counts.sum() / (len(counts) * counts), dtype=torch.float32)

    def rows_of_steps(self) -> Iterator[np.ndarray]:
        """Which examples each step takes, without end."""
        examples, size = len(self.features["train"]), self.examples_per_step
        return chain.from_iterable(shuffled_batches(examples, size, self.settings.seed, epoch) for epoch in count())

    def train_step(self, rows: np.ndarray) -> None:
        """Start a step of the optimizers on these examples, without waiting for the device."""
        settings, clock, features = self.settings, time.perf_counter(), self.features["train"]
        size = settings.per_device_train_batch_size
        passes = (rows[start : start + size] for start in range(0, len(rows), size))
        parts = (part for some in passes for part in within_budget(features, some, settings.tokens_per_batch))
        batches = [features.model_inputs(part, bucketed=self.capture is not None) for part in parts]
        items = sum(self._weight(batch.arguments) for batch in batches)
        self.items.fill_(items or 1)  # words that no token is left of have no label
        self.loss.zero_()
        for batch in batches:
            self._accumulate(batch.pin_memory() if self.device.type == "cuda" else batch)
        set_learning_rate(
            self.optimizers,
            settings.learning_rate * schedule("linear", self.step / self.steps, settings.warmup_ratio),
        )
        self.pending.append(self._update().clone())  # a replay overwrites what the last one returned
        self.step += 1
        self.tokens += int(features.lengths[rows].sum())
        self.seconds += time.perf_counter() - clock

    def _accumulate_eagerly(self, batch: ModelInputs) -> Tensor:
        """Add a batch's gradients to the parameters' and its loss to the step's, which is returned."""
        with autocast(self.device, self.precision):
            loss = self._loss(batch)
        loss.backward()
        return self.loss.add_(loss.detach())

    def _update_eagerly(self) -> Tensor:
        """Take the optimizers' step; returns [2]: the loss, and the gradients' norm, NaN where the step was skipped."""
        keep = self.capture is not None
        norm = step_if_finite(self.model, self.optimizers, self.settings.max_grad_norm, self.loss, keep_gradients=keep)
        return torch.stack([self.loss, norm.to(self.loss.dtype)])

    def _read_pending(self) -> None:
        """Learn how the steps since the last call went; waits for the device."""
        clock = time.perf_counter()
        results = torch.stack(self.pending).tolist() if self.pending else []
        self.pending.clear()
        for loss, norm in results:
            if math.isfinite(norm):
                self.skipped_in_a_row = 0
                self.losses.append(loss)
            else:
                self.skipped_in_a_row += 1
                self.skipped_loss = loss
            if self.skipped_in_a_row >= SKIPS_IN_A_ROW:
                break
        self.seconds += time.perf_counter() - clock

    def _weight(self, batch: dict[str, Tensor | int]) -> float:
        """What a batch counts in its step's mean: its labels, or their weights."""
        if self.host_weights is None:
            return labels_in(batch)
        labels = batch["labels"]
        return self.host_weights[labels[labels >= 0]].sum().item()

    def _loss(self, batch: ModelInputs) -> Tensor:
        """A batch's part of its step's mean loss."""
        if self.weights is None:
            return self.task.loss(self.model, batch, self.items)
        labels = batch.arguments["labels"].flatten()
        logits = self.task.logits(self.model, batch).flatten(0, -2).float()
        return F.cross_entropy(logits, labels, self.weights, ignore_index=IGNORED, reduction="sum") / self.items

    def _report(self, bar: tqdm) -> None:
        if self.step % self.steps_per_read == 0:
            self._read_pending()
        speed = self.tokens / self.seconds
        recent = self.losses[-self.settings.logging_steps :]
        loss = sum(recent) / max(len(recent), 1)
        bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
        bar.update()
        if self.step % self.settings.logging_steps == 0:
            self.metrics_log.write(step=self.step, epoch=self.epoch, loss=loss, tokens_per_second=speed)

    @property
    def epoch(self) -> float:
        """How often the training file has been seen."""
        return self.step / self.steps_per_epoch

    def _validate(self, bar: tqdm) -> None:
        self._read_pending()
        if "validation" not in self.features:
            self._save()
            return
        outputs, metrics = self._predict("validation")
        self.metrics_log.write(step=self.step, epoch=self.epoch, **metrics)
        bar.write(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        sign = -1 if self.metric == "loss" else 1
        loss = metrics.get("eval_loss", 0.0)  # it decides between equals
        if (sign * metrics[f"eval_{self.metric}"], -loss) > self.best_score:
            self.best_score = sign * metrics[f"eval_{self.metric}"], -loss
            self.best_metrics, self.validations_without_better = metrics, 0
            self._save()
            self._write("validation", outputs)
        else:
            self.validations_without_better += 1

    def _predict(self, split: str) -> tuple[Any, dict[str, float]]:
        outputs = predict_outputs(self.task, self.model, self.features[split])
        metrics = self.task.measure(self.examples[split], self.features[split], outputs)
        prefix = "test" if split == "test" else "eval"
        return outputs, {f"{prefix}_{name}": value for name, value in metrics.items()}

    def _write(self, split: str, outputs) -> None:
        self.task.write(self.folder, split, self.examples[split], self.features[split], outputs)

    def _save(self) -> None:
        save(self.model, self.folder)
        save_tokenizer(self.tokenizer, self.folder)
        self.best_step = self.step

    def _stop(self, reason: str) -> NoReturn:
        if not self.best_step:
            self._save()
        raise RunStopped(f"{reason}; the best model so far, that of step {self.best_step}, is in {self.folder}")

    def _finish(self) -> dict[str, float]:
        self._read_pending()
        results = {
            "epoch": self.epoch,
            "best_step": self.best_step,
            **self.best_metrics,
            "train_samples": len(self.examples["train"]),
            "train_loss": sum(self.losses) / max(len(self.losses), 1),
            "train_runtime": self.seconds,
            "train_tokens_per_second": self.tokens / self.seconds,
        }
        if self.task.bad.count:
            results["bad_rows"] = self.task.bad.count
            print(f"{self.task.bad.count} rows could not be used and were left out")
        if "test" in self.features:
            self.model.load_state_dict(load(type(self.model), self.folder, self.config)[0].state_dict())
            outputs, metrics = self._predict("test")
            self._write("test", outputs)
            results |= metrics
        write_results(self.folder / "all_results.json", results)
        return results
