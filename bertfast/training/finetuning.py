"""`bertfast finetune`: fine-tune a model on a labelled task."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bertfast.inference.predict import predict_outputs, require_finite_outputs
from bertfast.models.patch import require_packed
from bertfast.runtime.atomic_write import remove
from bertfast.runtime.cuda_graph import side_stream
from bertfast.runtime.precision import NotFiniteError, choose_precision
from bertfast.runtime.processes import is_main_process, refuse_several
from bertfast.runtime.signals import Interrupt, RunStopped
from bertfast.tasks.features import Buckets
from bertfast.training.best_model import BestModel
from bertfast.training.checkpoint import CHECKPOINTS, align_parameters, checkpoints, how_to_continue
from bertfast.training.distributed import Distributed
from bertfast.training.evaluate import print_metrics, write_results
from bertfast.training.feature_based import replace_inputs_by_states
from bertfast.training.finetune_checkpointing import (
    FinetuneProgress,
    remove_best_model,
    saved_precision,
    saved_run,
)
from bertfast.training.finetune_data import RunData, batches_of_passes, rows_of_steps
from bertfast.training.finetune_folder import RESULTS, finetune_folder, read_results, write_skipped_rows
from bertfast.training.finetune_model import build_model, open_best
from bertfast.training.finetune_report import draw_finished_run, how_to_use, write_report
from bertfast.training.finetune_settings import FinetuneSettings
from bertfast.training.finetune_step import finetuning_step
from bertfast.training.metrics_log import MetricsLog, MetricsWriter, open_writers
from bertfast.training.run_length import RunLength
from bertfast.training.schedule import schedule
from bertfast.training.step_results import DivergedError, StepResults
from bertfast.training.training_log import TrainingLog

__all__ = ["FinetuneSettings", "Finetuning", "finetune"]

logger = logging.getLogger("bertfast")


def finetune(settings: FinetuneSettings, on_step: Callable[[int], None] = lambda step: None) -> dict[str, float]:
    """Fine-tune a model; under `torchrun`, all of its processes take part in one run.

    Leaves in `output_dir` a folder that transformers' class of the same name opens, with the results, run.json, which
    says how they were made, and a model card.

    Args:
        settings: Settings of the run.
        on_step: Called after each step with the number of steps done.

    Returns:
        The content of all_results.json.

    Raises:
        ValueError: Settings, data and model do not fit together, or `output_dir` has results or is in use.
        RunStopped: After Ctrl-C or SIGTERM, with a checkpoint, or when steps give no finite loss and gradient; the best
            model so far is kept.
    """
    with open_run(settings) as run:
        return run.run(on_step)


def finetune_command(settings: FinetuneSettings) -> None:
    """Fine-tune a model, print the results, draw them, and say how to use the model."""
    results = finetune(settings)
    if is_main_process():
        print_metrics(results)
        draw_finished_run(Path(settings.output_dir))
        print(how_to_use(settings))


@contextmanager
def open_run(settings: FinetuneSettings) -> Iterator[Finetuning]:
    """Open a run in its locked output folder, where old results are replaced once data and model have been read."""
    distributed = Distributed.init(settings.compute.device)
    with ExitStack() as opened:
        opened.callback(distributed.destroy)
        opened.enter_context(distributed.logs_on_main(logger))
        begin = distributed.run_on_main(lambda: opened.enter_context(finetune_folder(settings)))
        run = Finetuning(settings, distributed)

        def start() -> None:
            run.writers = open_writers(run.folder, settings.report, settings.flat())
            if begin is not None:
                begin()

        distributed.run_on_main(start)
        opened.enter_context(side_stream(run.device))
        yield run


class Finetuning:
    """A fine-tuning run.

    Args:
        settings: Settings of the run.
        distributed: Processes of the run; None: initialised here.

    Attributes:
        data: What is read before the model is built.
        task, metric, source, config, tokenizer, examples, features: See `RunData`.
        model: The model that is trained.
        adapter: The model's adapter if only that is trained.
        best: Writes the model whenever it is the best so far.
        length: Length of the run.
        steps_per_epoch, steps: See `RunLength`.
        progress: How far the run has come, and how good its best model is.
        writers: Receive the entries of metrics.jsonl as well.
        trainer: Computes gradients and updates of a step.
        results: Losses of the steps.
        steps_per_read: Steps after which results are read.
    """

    def __init__(self, settings: FinetuneSettings, distributed: Distributed | None = None):
        self.distributed = distributed = distributed or Distributed.init(settings.compute.device)
        self.settings, self.folder = settings, Path(settings.output_dir)
        self.writers: list[MetricsWriter] = []
        self.device, self.hyperparameters = distributed.device, settings.hyperparameters
        if settings.feature_based.strategy == "feature-based":
            refuse_several("--strategy feature-based")
        self.saved = distributed.result_of_main(lambda: saved_run(settings))
        self.data = data = RunData.open(settings)
        self.task, self.metric, self.source = data.task, data.metric, data.source
        self.config, self.tokenizer = data.config, data.tokenizer
        self.examples, self.features = data.examples, data.features
        self.precision = choose_precision(self.device, settings.compute.precision, self.config)
        if self.saved is not None and settings.compute.precision == "auto":  # a run keeps what "auto" chose
            self.precision = saved_precision(self.saved)
        torch.manual_seed(self.hyperparameters.seed)
        self.model, self.adapter = build_model(settings, self.task, self.config, self.tokenizer, self.saved)
        self.best = BestModel(self.folder, data, self.model, self.adapter, settings.lora.lora_merge)
        align_parameters(self.model)
        nn.Module.to(self.model, self.device)  # transformers' own `to` has the type of a plain function
        require_packed(self.model.train(), self.precision)
        # Dropout must not depend on how often transformers drew, and each rank drops other units.
        torch.manual_seed(self.hyperparameters.seed + distributed.rank)
        if settings.feature_based.strategy == "feature-based":
            replace_inputs_by_states(self.features, self.model, settings, self.precision)
        self.trainer = finetuning_step(
            settings,
            self.task,
            self.model,
            features=self.features["train"],
            distributed=distributed,
            precision=self.precision,
            captures=self.adapter is None,
        )
        self.length = RunLength.of(settings, len(self.features["train"]), distributed.world_size)
        self.steps_per_epoch, self.steps = self.length.steps_per_epoch, self.length.steps
        self.progress, self.results = FinetuneProgress(), StepResults(self.device)
        self.interrupt = Interrupt(settings.checkpoint.sigterm_exit_code)
        # Reading results waits for all work queued on a GPU, so there they are read only as often as they are logged.
        self.steps_per_read = settings.evaluation.logging_steps if self.device.type == "cuda" else 1
        self._log: TrainingLog | None = None  # opens metrics.jsonl, which only a run that begins may do

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        share = schedule(self.settings.optimizer.lr_scheduler_type, self.step / self.steps, self.length.warmup)
        return self.hyperparameters.learning_rate * share

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    @property
    def log(self) -> TrainingLog:
        """Log of the run, once it has begun."""
        assert self._log is not None
        return self._log

    def run(self, on_step: Callable[[int], None]) -> dict[str, float]:
        """Train, validate, and predict on the test data with the best model; return all results.

        A run that continues starts at its checkpoint; of one that is finished, only the results are read.
        """
        distributed = self.distributed
        if (results := distributed.result_of_main(self._finished_results)) is not None:
            return results
        self._begin()
        with self.interrupt, self.log.bar:
            self._validate_if_due()  # the run may have been stopped before it
            rows, patience = self.rows_of_steps(), self.settings.evaluation.early_stopping_patience
            while self.step < self.steps and self.progress.validations_without_better != patience:
                self.train_step(next(rows))
                if self.step % self.steps_per_read == 0 or self.step == self.steps:
                    self.read_pending()
                self.log.add_step(self.progress, self.results)
                on_step(self.step)
                if distributed.any(self.interrupt.requested):  # all ranks stop after the same step
                    raise self._stopped()
                if (problem := self.results.too_many_skipped()) is not None:
                    raise self.diverged(problem)
                self._validate_if_due()
                if self.step % self.settings.checkpoint.save_steps == 0 and self.step < self.steps:
                    self.read_pending()
                    self.save_checkpoint()
        self.read_pending()
        self.log.end(self.progress, self.results)
        return distributed.result_of_main(self._write_results)

    def _finished_results(self) -> dict[str, float] | None:
        """Return the results of a run to resume that is finished, None if it is not."""
        if not self.settings.checkpoint.resume or (results := read_results(self.folder)) is None:
            return None
        logger.info("the run in %s is finished: its results are read", self.folder)
        remove(self.folder / CHECKPOINTS)
        return results

    def _begin(self) -> None:
        """Load the checkpoint of a run that continues, open the metrics log, and say what is trained."""
        start, distributed, optimizers = "", self.distributed, self.trainer.optimizers
        if self.saved is not None:
            self.progress = FinetuneProgress.restore(self.saved, self.folder, optimizers, self.results, distributed)
            start = f", from step {self.step}"
        metrics_log = distributed.run_on_main(self._open_folder)
        where = f"{self.device}{f', {distributed.world_size} processes' * (distributed.world_size > 1)}"
        logger.info("fine-tuning on %d examples, %s on %s%s", len(self.examples["train"]), self.precision, where, start)
        self.hyperparameters.warn_if_less_than_one_step(self.steps_per_epoch)
        if self.steps == 1 and self.length.warmup and self.learning_rate == 0:
            warmup = "--warmup-ratio" if self.settings.optimizer.warmup_steps is None else "--warmup-steps"
            logger.warning("the only step has a learning rate of 0: for more, pass %s 0 or more epochs", warmup)
        self._log = TrainingLog(metrics_log, self.length, self.settings.evaluation.logging_steps, self.progress)

    def _open_folder(self) -> MetricsLog:
        """Make the output folder, remove from it what a run does not continue from, and open the metrics log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.saved is None and self.settings.checkpoint.resume:
            remove_best_model(self.folder)  # of a run that was killed before its first checkpoint
        write_skipped_rows(self.folder, self.task.bad_rows)
        return MetricsLog(self.folder, steps_done=self.step, writers=self.writers)

    def rows_of_steps(self) -> Iterator[np.ndarray]:
        """Yield the example indices of each step from the next one on, without end."""
        per_step = self.length.examples_per_step
        return rows_of_steps(len(self.features["train"]), per_step, self.hyperparameters.seed, self.step)

    def train_step(self, rows: np.ndarray) -> None:
        """Start an optimizer step on the examples `rows` without waiting for the device."""
        settings, clock, features = self.settings, time.perf_counter(), self.features["train"]
        size, tokens = self.hyperparameters.per_device_train_batch_size, settings.batch.tokens_per_batch
        buckets = Buckets(tokens=self.trainer.captures, examples=False)
        self.trainer.gradients(batches_of_passes(features, rows, size, tokens, buckets, self.distributed))
        self.progress.learning_rate = self.learning_rate
        self.results.pending.append(self.trainer.update(self.progress.learning_rate))
        self.progress.step += 1
        self.progress.tokens += int(features.lengths[rows].sum())
        self.progress.seconds += time.perf_counter() - clock

    def read_pending(self) -> None:
        """Read the results of pending steps; waits for the device."""
        clock = time.perf_counter()
        self.results.read()
        self.progress.seconds += time.perf_counter() - clock

    def _validate_if_due(self) -> None:
        """Validate the model unless that is not due yet, or was done at this step."""
        interval = self.settings.evaluation.eval_steps or self.steps_per_epoch
        due = self.step and (self.step % interval == 0 or self.step == self.steps)
        if due and self.progress.validated_step < self.step:
            self.read_pending()
            only_sign = "validation" not in self.features and self.step == self.steps
            if (problem := self.results.fault(only_sign=only_sign)) is not None:
                raise self.diverged(problem)
            self.distributed.run_on_main(self._validate)
            self.progress = self.distributed.broadcast(self.progress)
            self.progress.validated_step = self.step

    def _validate(self) -> None:
        """Validate the model, and save it if it is the best so far; an undefined metric is worse than any other."""
        if "validation" not in self.features:
            if not self.results.skipped_in_a_row:
                try:
                    require_finite_outputs(self.task, self.model, self.features["train"])
                except NotFiniteError as error:
                    raise self._not_finite(error, "training") from None
                self._save()
            return
        outputs, metrics = self.predict("validation")
        self.log.write(self.step, **metrics)
        logger.info("step %d: %s", self.step, ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        if self.progress.improves(metrics, self.metric):
            self._save()
            self.best.write_predictions("validation", outputs)

    def predict(self, split: str) -> tuple[Any, dict[str, float]]:
        """Return the model's outputs for a split, and their metrics, the one that selects the best model first."""
        try:
            outputs = predict_outputs(self.task, self.model, self.features[split])
        except NotFiniteError as error:
            raise self._not_finite(error, split) from None
        metrics = self.task.measure(self.examples[split], self.features[split], outputs)
        prefix, names = "test" if split == "test" else "eval", sorted(metrics, key=lambda name: name != self.metric)
        return outputs, {f"{prefix}_{name}": metrics[name] for name in names}

    def _not_finite(self, error: NotFiniteError, split: str) -> DivergedError:
        return self.diverged(f"after step {self.step}, {error.problem} on the {split} data", usable=False)

    def _save(self) -> None:
        self.progress.best_step = self.step
        if self.distributed.is_main:
            self.best.save()

    def save_checkpoint(self) -> None:
        """Write a checkpoint, unless steps are being skipped; their results must have been read."""
        if not self.results.skipped_in_a_row:
            state = self.trainer.optimizers, self.results, self.precision, self.distributed, self.adapter
            self.progress.save(self.settings, self.model, *state)

    def _stopped(self) -> RunStopped:
        """Save a checkpoint, and return the exception that ends the run after a signal."""
        self.read_pending()
        self.save_checkpoint()
        how = f", {how_to_continue(self.settings.checkpoint)}" if checkpoints(self.folder / CHECKPOINTS) else ""
        return RunStopped(f"stopped after step {self.step} of {self.steps}{how}; {self._kept()}", self.interrupt.status)

    def diverged(self, problem: str, *, usable: bool = True) -> DivergedError:
        """Return the exception that ends a run because of what is not finite; see `_kept`."""
        return DivergedError(problem, bool(self.results.losses), self._kept(usable=usable))

    def _kept(self, *, usable: bool = True) -> str:
        """Say what is left of a run that ends early; if no model was saved yet, a trained and usable one is."""
        self.read_pending()
        if not self.progress.best_step and self.results.losses and not self.results.skipped_in_a_row and usable:
            self._save()
        step = self.progress.best_step
        kept = f"the best model so far, that of step {step}, is" if step else "there is no model"
        return f"{kept} in {self.folder}"

    def _write_results(self) -> dict[str, float]:
        """Predict on the test data with the best model, and write all results; return them."""
        settings = self.settings
        epoch = self.step / self.steps_per_epoch
        results = self.progress.summary(epoch, len(self.examples["train"]), self.results)
        results |= {"bad_rows": bad} if (bad := self.task.bad_rows.count) else {}
        if "test" in self.features or settings.lora.lora_merge:
            open_best(settings, self.model, self.config, self.adapter)
        if "test" in self.features:
            outputs, metrics = self.predict("test")
            self.best.write_predictions("test", outputs)
            results |= metrics
        write_report(settings, self.model, self.precision, self.metric, results, self.distributed.world_size)
        write_results(self.folder / RESULTS, results)
        remove(self.folder / CHECKPOINTS)
        return results
