"""`bertfast finetune`: fine-tune a model on a labelled task."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from bertfast.data.tokenizer import tokenizer_hash
from bertfast.inference.predict import predict_outputs, require_finite_outputs
from bertfast.models.extensions import class_for
from bertfast.models.families import architecture_of
from bertfast.models.files import load, new_model, read_config, report_differences, resolve, save
from bertfast.models.patch import require_packed
from bertfast.models.tokenizers import copy_tokenizer, load_any_tokenizer
from bertfast.ops.reference import IGNORE_INDEX
from bertfast.runtime.cuda_graph import GraphRunner, capture_for, side_stream
from bertfast.runtime.precision import NotFiniteError, autocast, choose_device, choose_precision
from bertfast.runtime.signals import Interrupt, RunStopped
from bertfast.tasks.features import Buckets, CutTexts, ModelInputs, count_labels, shuffled_batches, within_budget
from bertfast.tasks.pretrained import open_tokenizer, sequence_length
from bertfast.tasks.registry import choose_task
from bertfast.tasks.task import Outputs, Task
from bertfast.training.evaluate import print_metrics, write_results
from bertfast.training.feature_based import replace_inputs_by_states
from bertfast.training.finetune_folder import finetune_folder, write_skipped_rows
from bertfast.training.finetune_model import model_config
from bertfast.training.finetune_settings import FinetuneSettings
from bertfast.training.metrics_log import MetricsLog
from bertfast.training.optimizer import build_optimizers, step_if_finite
from bertfast.training.schedule import schedule, set_learning_rate
from bertfast.training.step_results import DivergedError, StepResults

__all__ = ["FinetuneSettings", "Finetuning", "finetune"]

logger = logging.getLogger("bertfast")


def finetune(settings: FinetuneSettings, on_step: Callable[[int], None] = lambda step: None) -> dict[str, float]:
    """Fine-tune a model.

    Leaves in `output_dir` a folder that transformers' class of the same name opens.

    Args:
        settings: Settings of the run.
        on_step: Called after each step with the number of steps done.

    Returns:
        The content of all_results.json.

    Raises:
        ValueError: Settings, data and model do not fit together, or `output_dir` has results or is in use.
        RunStopped: After Ctrl-C, or when steps give no finite loss and gradient; the best model so far is kept.
    """
    with open_run(settings) as run:
        return run.run(on_step)


def finetune_command(settings: FinetuneSettings) -> None:
    """Fine-tune a model, and print the results."""
    print_metrics(finetune(settings))
    print(f"The best model, metrics.jsonl and all_results.json are in {settings.output_dir}.")


@contextmanager
def open_run(settings: FinetuneSettings) -> Iterator[Finetuning]:
    """Open a run in its locked output folder, where old results are replaced once data and model have been read."""
    with finetune_folder(settings) as begin:
        run = Finetuning(settings)
        begin()
        with side_stream(run.device):
            yield run


class Finetuning:
    """A fine-tuning run.

    Args:
        settings: Settings of the run.

    Attributes:
        task: The task: reads files, computes losses and metrics.
        source: Folder of the model that is fine-tuned.
        config, tokenizer, model: What is fine-tuned.
        metric: Name of the metric that selects the best model.
        examples, features: Examples of each split, and their token ids and labels.
        steps_per_epoch, steps: Optimizer steps per epoch and of the run.
        step, best_step: Steps done, and the step of the best model.
        results: Losses of the steps.
        steps_per_read: Steps after which results are read.
    """

    def __init__(self, settings: FinetuneSettings):
        self.settings, self.folder = settings, Path(settings.output_dir)
        self.metrics_log: MetricsLog | None = None
        self.hyperparameters = settings.hyperparameters
        self.device = choose_device(settings.compute.device)
        self.task = self._choose_task()
        files = {"train": settings.train_file, "validation": settings.validation_file, "test": settings.test_file}
        paths = {split: path for split, path in files.items() if path is not None}
        self.examples: dict[str, Any] = {}
        self.features: dict[str, Any] = {}
        with self.task.bad_rows.logged():
            examples = {split: self.task.read(path, labelled=split != "test") for split, path in paths.items()}
            self.source = source = resolve(settings.model_name_or_path)
            self.config = model_config(settings, source, self.task.label_config(examples["train"]))
            self.task.set_config(self.config)
            self.precision = choose_precision(self.device, settings.compute.precision, self.config)
            self.metric = self._choose_metric()
            self.tokenizer = open_tokenizer(source, self.config)
            self._featurize(examples, paths)
        torch.manual_seed(self.hyperparameters.seed)
        self.model = self._build_model(source)
        if settings.feature_based.strategy == "feature-based":
            replace_inputs_by_states(self.features, self.model, settings, self.precision)
        rate, decay = self.hyperparameters.learning_rate, settings.optimizer.weight_decay
        self.optimizers = build_optimizers(self.model, "adamw", rate, decay)
        # Captured steps read these tensors at fixed addresses.
        self.host_weights = self._class_weights()
        self.weights = None if self.host_weights is None else self.host_weights.to(self.device)
        self.items = torch.ones((), device=self.device)
        self.loss = torch.zeros((), device=self.device)
        self.capture = capture_for(self.model, self.precision, enabled=settings.compute.cuda_graph)
        self._accumulate = GraphRunner(self._accumulate_eagerly, self.device, self.capture)
        self._update = GraphRunner(self._update_eagerly, self.device, self.capture)
        passes = settings.batch.gradient_accumulation_steps
        self.examples_per_step = self.hyperparameters.per_device_train_batch_size * passes
        self.steps_per_epoch = math.ceil(len(self.features["train"]) / self.examples_per_step)
        self.steps = self.hyperparameters.steps(self.steps_per_epoch)
        self.step = self.best_step = self.validations_without_better = 0
        self.best_score = (-math.inf, -math.inf)
        self.best_metrics: dict[str, float] = {}
        self.results = StepResults(self.device)
        # Reading results waits for all work queued on a GPU, so there they are read only as often as they are logged.
        self.steps_per_read = settings.evaluation.logging_steps if self.device.type == "cuda" else 1
        self.tokens, self.seconds = 0, 0.0

    def _choose_task(self) -> Task[Any]:
        task = choose_task(self.settings, file=self.settings.train_file)
        if self.settings.feature_based.strategy == "feature-based":
            if task.feature_based_model is None:
                raise ValueError("--strategy feature-based is only available for token classification")
            task.model_class = task.feature_based_model
        return task

    def _featurize(self, examples: dict[str, Any], files: dict[str, str]) -> None:
        """Tokenise the examples of each split; texts that are cut are counted in a warning."""
        length = sequence_length(self.settings.max_seq_length, self.config)
        for split, read in examples.items():
            self.examples[split], features = self.task.featurize(read, self.tokenizer, length)
            self.features[split] = features
            cut = CutTexts(files[split], length)
            cut.add(features)
            cut.report()

    def run(self, on_step: Callable[[int], None]) -> dict[str, float]:
        """Train, validate, and predict on the test data with the best model; return all results."""
        settings = self.settings
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics_log = MetricsLog(self.folder)
        write_skipped_rows(self.folder, self.task.bad_rows)
        logger.info("fine-tuning on %d examples, %s on %s", len(self.examples["train"]), self.precision, self.device)
        if self.steps == 1 and settings.optimizer.warmup_ratio:
            logger.warning("the only step has a learning rate of 0: for more, pass --warmup-ratio 0 or more epochs")
        eval_steps = settings.evaluation.eval_steps or self.steps_per_epoch
        with Interrupt() as interrupt, tqdm(total=self.steps, desc="fine-tuning", unit="step") as bar:
            for rows in islice(self.rows_of_steps(), self.steps):
                self.train_step(rows)
                self._report(bar)
                on_step(self.step)
                if interrupt.requested:
                    raise RunStopped(
                        f"stopped after step {self.step} of {self.steps}; {self._kept()}", interrupt.status
                    )
                if (problem := self.results.too_many_skipped()) is not None:
                    raise self._diverged(problem)
                if self.step % eval_steps == 0 or self.step == self.steps:
                    self._validate()
                if self.validations_without_better == settings.evaluation.early_stopping_patience:
                    break
        return self._finish()

    def _choose_metric(self) -> str:
        known = self.task.metrics
        metric = (self.settings.evaluation.metric_for_best_model or known[0]).removeprefix("eval_")
        if metric not in known:
            raise ValueError(f"--metric-for-best-model must be one of {', '.join(known)} in this task, got {metric!r}")
        return metric

    def _build_model(self, source: Path) -> PreTrainedModel:
        random_init = self.settings.model.random_init
        model = new_model(self.task.model_class, self.config) if random_init else self._open_model(source)
        nn.Module.to(model, self.device)  # transformers' own `to` has the type of a plain function
        require_packed(model.train(), self.precision)
        torch.manual_seed(self.hyperparameters.seed)  # dropout must not depend on how often transformers drew
        return model

    def _open_model(self, source: Path) -> PreTrainedModel:
        name = self.settings.model.init_from_task or self.settings.model_name_or_path
        initial = resolve(name)
        config, other_task = read_config(initial), self.settings.model.init_from_task is not None
        if other_task and tokenizer_hash(load_any_tokenizer(initial)) != tokenizer_hash(self.tokenizer):
            raise ValueError(
                f"{name} has another tokenizer than {source}: --init-from-task needs a model with the same one"
            )
        kind = class_for(self.task.model_class, self.config)
        other_task |= kind.__name__ not in (config.architectures or [])
        other_task |= config.id2label != self.config.id2label
        fresh = architecture_of(self.config).head_prefixes(kind) if other_task else ()  # the head of another task
        model, missing, unexpected = load(self.task.model_class, initial, self.config, fresh=fresh)
        report_differences(model, name, missing, unexpected)
        return model

    def _class_weights(self) -> Tensor | None:
        if self.settings.optimizer.class_weights == "none":
            return None
        labels = self.features["train"].labels.get("labels")
        if labels is None or labels.ndim > 1 or np.issubdtype(labels.dtype, np.floating):
            raise ValueError("--class-weights requires a task in which every example or word has one of several labels")
        counts = np.bincount(labels[labels >= 0], minlength=self.config.num_labels or 0).clip(min=1)
        return torch.tensor(counts.sum() / (len(counts) * counts), dtype=torch.float32)

    def rows_of_steps(self) -> Iterator[np.ndarray]:
        """Yield the example indices of each step, without end."""
        examples, size, seed = len(self.features["train"]), self.examples_per_step, self.hyperparameters.seed
        return chain.from_iterable(shuffled_batches(examples, size, seed, epoch) for epoch in count())

    def train_step(self, rows: np.ndarray) -> None:
        """Start an optimizer step on the examples `rows` without waiting for the device."""
        settings, clock, features = self.settings, time.perf_counter(), self.features["train"]
        size = self.hyperparameters.per_device_train_batch_size
        # Passes of `size` examples, each divided further so that a batch has at most tokens_per_batch tokens.
        passes = (rows[first : first + size] for first in range(0, len(rows), size))
        parts = (part for one in passes for part in within_budget(features, one, settings.batch.tokens_per_batch))
        buckets = Buckets(tokens=self.capture is not None, examples=False)
        batches = [features.model_inputs(part, buckets=buckets) for part in parts]
        items = sum(self._weight(batch.arguments) for batch in batches)
        self.items.fill_(items or 1)  # 0 if all labelled words were cut off
        self.loss.zero_()
        for batch in batches:
            self._accumulate(batch.pin_memory() if self.device.type == "cuda" else batch)
        share = schedule("linear", self.step / self.steps, settings.optimizer.warmup_ratio)
        set_learning_rate(self.optimizers, self.hyperparameters.learning_rate * share)
        self.results.pending.append(self._update().clone())  # a replay overwrites the previous result
        self.step += 1
        self.tokens += int(features.lengths[rows].sum())
        self.seconds += time.perf_counter() - clock

    def _accumulate_eagerly(self, batch: ModelInputs) -> Tensor:
        """Accumulate a batch's gradients and its loss; return the step's loss so far, []."""
        with autocast(self.device, self.precision):
            loss = self._loss(batch)
        torch.autograd.backward(loss)
        return self.loss.add_(loss.detach())

    def _update_eagerly(self) -> Tensor:
        """Update the parameters; return [2]: the loss, and the gradient norm, NaN if the step was skipped."""
        keep, max_norm = self.capture is not None, self.settings.optimizer.max_grad_norm
        norm = step_if_finite(self.model, self.optimizers, max_norm, self.loss, keep_gradients=keep)
        return torch.stack([self.loss, norm.to(self.loss.dtype)])

    def _read_pending(self) -> None:
        """Read the results of pending steps; waits for the device."""
        clock = time.perf_counter()
        self.results.read()
        self.seconds += time.perf_counter() - clock

    def _weight(self, batch: dict[str, Tensor]) -> float:
        """Return the weight of a batch in the mean loss of its step: its number of labels, or their class weights."""
        if self.host_weights is None:
            return count_labels(batch)
        labels = batch["labels"]
        return self.host_weights[labels[labels >= 0]].sum().item()

    def _loss(self, batch: ModelInputs) -> Tensor:
        """Return a batch's share of the mean loss of its step, []."""
        if self.weights is None:
            return self.task.loss(self.model, batch, self.items)
        labels = batch.arguments["labels"].flatten()
        logits = self.task.logits(self.model, batch).flatten(0, -2).float()
        return F.cross_entropy(logits, labels, self.weights, ignore_index=IGNORE_INDEX, reduction="sum") / self.items

    def _report(self, bar: tqdm[Any]) -> None:
        if self.step % self.steps_per_read == 0:
            self._read_pending()
        speed = self.tokens / self.seconds
        loss = self.results.mean(last=self.settings.evaluation.logging_steps)
        known = {} if math.isnan(loss) else {"loss": loss}  # metrics.jsonl holds numbers only
        bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
        bar.update()
        if self.step % self.settings.evaluation.logging_steps == 0:
            self._log(**known, tokens_per_second=speed)

    def _log(self, **values: float) -> None:
        """Write an entry of metrics.jsonl."""
        if self.metrics_log is not None:
            self.metrics_log.write(step=self.step, epoch=self.epoch, **values)

    @property
    def epoch(self) -> float:
        """Passes over the training data so far."""
        return self.step / self.steps_per_epoch

    def _validate(self) -> None:
        self._read_pending()
        validated = "validation" in self.features
        if (problem := self.results.fault(only_sign=not validated and self.step == self.steps)) is not None:
            raise self._diverged(problem)
        if not validated:
            if not self.results.skipped_in_a_row:
                try:
                    require_finite_outputs(self.task, self.model, self.features["train"])
                except NotFiniteError as error:
                    raise self._not_finite(error, "training") from None
                self._save()
            return
        outputs, metrics = self._predict("validation")
        self._log(**metrics)
        logger.info("step %d: %s", self.step, ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        sign = -1 if self.metric == "loss" else 1
        loss = metrics.get("eval_loss", 0.0)  # breaks ties
        if (sign * metrics[f"eval_{self.metric}"], -loss) > self.best_score:
            self.best_score = sign * metrics[f"eval_{self.metric}"], -loss
            self.best_metrics, self.validations_without_better = metrics, 0
            self._save()
            self._write("validation", outputs)
        else:
            self.validations_without_better += 1

    def _predict(self, split: str) -> tuple[Any, dict[str, float]]:
        try:
            outputs = predict_outputs(self.task, self.model, self.features[split])
        except NotFiniteError as error:
            raise self._not_finite(error, split) from None
        metrics = self.task.compute_metrics(self.examples[split], self.features[split], outputs)
        prefix = "test" if split == "test" else "eval"
        return outputs, {f"{prefix}_{name}": value for name, value in metrics.items()}

    def _not_finite(self, error: NotFiniteError, split: str) -> DivergedError:
        return self._diverged(f"after step {self.step}, {error.problem} on the {split} data", usable=False)

    def _write(self, split: str, outputs: Outputs) -> None:
        self.task.write_predictions(self.folder, split, self.examples[split], self.features[split], outputs)

    def _save(self) -> None:
        save(self.model, self.folder)
        copy_tokenizer(self.tokenizer, self.source, self.folder)
        self.best_step = self.step

    def _diverged(self, problem: str, *, usable: bool = True) -> DivergedError:
        """Return the exception that ends a run because of what is not finite; see `_kept`."""
        return DivergedError(problem, bool(self.results.losses), self._kept(usable=usable))

    def _kept(self, *, usable: bool = True) -> str:
        """Say what is left of a run that ends early; if no model was saved yet, a trained and usable one is."""
        self._read_pending()
        if not self.best_step and self.results.losses and not self.results.skipped_in_a_row and usable:
            self._save()
        kept = f"the best model so far, that of step {self.best_step}, is" if self.best_step else "there is no model"
        return f"{kept} in {self.folder}"

    def _finish(self) -> dict[str, float]:
        self._read_pending()
        results = {
            "epoch": self.epoch,
            "best_step": self.best_step,
            **self.best_metrics,
            "train_samples": len(self.examples["train"]),
            "train_loss": self.results.mean(),
            "train_runtime": self.seconds,
            "train_tokens_per_second": self.tokens / self.seconds,
        }
        if self.results.skipped:
            results["skipped_steps"] = self.results.skipped
        if self.task.bad_rows.count:
            results["bad_rows"] = self.task.bad_rows.count
        if "test" in self.features:
            self.model.load_state_dict(load(type(self.model), self.folder, self.config)[0].state_dict())
            outputs, metrics = self._predict("test")
            self._write("test", outputs)
            results |= metrics
        write_results(self.folder / "all_results.json", results)
        return results
