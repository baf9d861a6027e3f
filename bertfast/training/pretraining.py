"""Pre-training (Devlin et al., 2019, section 3.1): masked LM and next-sentence prediction on packed batches."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bertfast.architectures.rope_theta import set_rope_theta
from bertfast.data.batches import Batch
from bertfast.encoder import PretrainingLoss
from bertfast.models.families import architecture_of, pretraining_class
from bertfast.models.files import load, resolve, save
from bertfast.models.tokenizers import save_model_tokenizer
from bertfast.runtime.cuda_graph import side_stream
from bertfast.runtime.extras import install_command
from bertfast.runtime.output_folder import locked_folder
from bertfast.runtime.plotting import plot_title
from bertfast.runtime.precision import NotFiniteError, choose_precision, half
from bertfast.runtime.signals import Interrupt, RunStopped
from bertfast.training.checkpoint import CHECKPOINTS, checkpoints, how_to_continue
from bertfast.training.curriculum import Curriculum
from bertfast.training.distributed import Distributed
from bertfast.training.flops import gemm_throughput, step_flops
from bertfast.training.initial_model import adapt_to_tokenizer, configure
from bertfast.training.memory_estimate import available_memory
from bertfast.training.metrics_log import MetricsLog, open_writers
from bertfast.training.optimizer import remedy_for
from bertfast.training.pretrain_checkpointing import (
    Progress,
    changed_settings,
    check_run,
    checkpoint_to_load,
    recorded_precision,
)
from bertfast.training.pretrain_data import BatchPlan, Corpus
from bertfast.training.pretrain_model import build_model, memory_of_run, pretraining_step
from bertfast.training.pretrain_reporting import PendingStep, Reporter
from bertfast.training.pretrain_settings import PretrainSettings, resolve_objective
from bertfast.training.schedule import schedule
from bertfast.training.validation import validate

__all__ = ["PretrainSettings", "Pretraining", "pretrain"]


def pretrain(settings: PretrainSettings, on_step: Callable[[int], None] = lambda step: None) -> dict[str, float]:
    """Pre-train a model; under `torchrun`, all of its processes take part in one run.

    Leaves in `output_dir` a folder that `transformers.BertForPreTraining.from_pretrained` opens, or the masked-LM class
    of another family.

    Args:
        settings: Settings of the run.
        on_step: Called after each step with the number of steps done.

    Returns:
        Metrics of the last validation; with `replay`, the losses of the replayed step.

    Raises:
        ValueError: Settings, text, model or checkpoints do not fit together.
        RunStopped: After Ctrl-C or SIGTERM, or when steps give no finite loss and gradient.
    """
    deterministic, distributed = torch.are_deterministic_algorithms_enabled(), Distributed.init(settings.compute.device)
    run: Pretraining | None = None
    replay, lock = settings.checkpoint.replay, ExitStack()
    try:
        if not replay:
            distributed.run_on_main(lambda: lock.enter_context(locked_folder(Path(settings.output_dir))))
        run = Pretraining(settings, distributed)
        with side_stream(run.device):
            return run.replay(replay) if replay else run.run(on_step)
    finally:
        lock.close()
        torch.use_deterministic_algorithms(deterministic)
        # The traceback of an error keeps the run alive, and DistributedDataParallel must be freed before the process
        # group is destroyed: otherwise its end waits for the other ranks.
        if run is not None:
            del run.train_step
        distributed.destroy()


class Pretraining:
    """A pre-training run.

    Args:
        settings: Settings of the run.
        distributed: Processes of the run; None: initialised here.

    Attributes:
        precision: fp32, bf16 or fp16.
        corpus: Text and tokenizer.
        plan: Batches of the steps and of the validations.
        model: Model that is trained.
        memory_estimate: Estimated memory of a rank.
        train_step: Computes gradients and updates of a step.
        progress: How far the run has come.
        loader: Batches of this rank.
        batches_of_step: Batches of this rank in the current step.
        steps_per_read: Steps after which their results are read.
    """

    def __init__(self, settings: PretrainSettings, distributed: Distributed | None = None):
        self.settings, self.distributed = settings, distributed or Distributed.init(settings.compute.device)
        self.device = self.distributed.device
        if settings.compute.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.folder = Path(settings.output_dir)
        self.bins_per_step = settings.batch.gradient_accumulation_steps * self.distributed.world_size
        # Raises early if batches cannot be divided evenly among the ranks.
        Curriculum(self.bins_per_step, self.distributed.world_size, ramp=int(settings.batch.batch_ramp > 0))
        torch.manual_seed(settings.seed)
        initial = None if settings.model.init_from is None else resolve(settings.model.init_from)
        config = configure(settings, initial)
        self.settings = settings = resolve_objective(settings, config.model_type)
        self.precision = choose_precision(self.device, settings.compute.precision, config)
        self.saved = self.distributed.result_of_main(lambda: checkpoint_to_load(settings))
        if self.saved is not None and settings.compute.precision == "auto":  # a run keeps what "auto" chose
            self.precision = recorded_precision(settings) or self.precision
        if settings.compute.residual_precision == "bf16" and self.precision != "bf16":
            raise ValueError(
                f"--residual-precision bf16 goes with --precision bf16, and this run's precision is {self.precision}: "
                "add --precision bf16, or leave --residual-precision out"
            )
        differences = partial(changed_settings, settings, initial, self.bins_per_step, self.precision)
        self.corpus = Corpus.open(settings, self.distributed, initial, differences)
        hashes = self.corpus.hashes()
        check = partial(check_run, settings, initial, hashes, self.bins_per_step, self.precision, self.saved)
        self._begin = self.distributed.run_on_main(check)
        adapt_to_tokenizer(config, self.corpus.tokenizer, initial)
        self.model = build_model(settings, config, initial, self.saved, device=self.device, precision=self.precision)
        self.memory_estimate = memory_of_run(settings, self.model, self.precision, self.distributed.world_size)
        self.memory_estimate.check(available_memory(self.device))
        self.plan = BatchPlan(settings, self.corpus, self.distributed, self.bins_per_step)
        self.train_step = pretraining_step(settings, self.model, self.distributed, self.precision)
        self.progress = Progress() if self.saved is None else Progress.restore(self.saved, self.train_step)
        self._set_rope_theta()
        self.loader = self.plan.loader(self.step, self.device)
        self.batches_of_step: list[Batch] = []
        self.interrupt = Interrupt(settings.checkpoint.sigterm_exit_code)
        self.stop_requested = False  # on any rank
        # Reading results waits for all work queued on a GPU, so there they are read only as often as they are logged.
        self.steps_per_read = settings.report.logging_steps if self.device.type == "cuda" else 1
        self._reporter: Reporter | None = None  # opens the metrics log, which a replay must not do

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    @property
    def metrics_log(self) -> MetricsLog | None:
        """Metrics log of the main process, once the run has begun."""
        return None if self._reporter is None else self._reporter.metrics_log

    @property
    def reporter(self) -> Reporter:
        """Reporter of the run, once it has begun."""
        assert self._reporter is not None
        return self._reporter

    def run(self, on_step: Callable[[int], None]) -> dict[str, float]:
        """Train from the current step to the end; return the metrics of the last validation."""
        settings = self.settings
        tokens, dtype = settings.batch.tokens_per_batch, half(self.precision)
        throughput = gemm_throughput(self.model.config, tokens, dtype, self.device)
        opened = partial(open_writers, self.folder, settings.report, settings.flat())
        writers = self.distributed.run_on_main(opened) or []
        self.distributed.run_on_main(lambda: self._begin and self._begin())
        self._reporter = Reporter(settings, self.distributed, self.progress, self.plan.steps, throughput, writers)
        self._reporter.announce(self.model, self.corpus.train, self.precision, self.memory_estimate)
        with self.interrupt, self.reporter.bar:
            while self._fraction_done() < 1:
                started = time.perf_counter()
                pending = self._train_step(self._learning_rate())
                self.progress.step += 1
                self.reporter.add(pending, time.perf_counter() - started)
                if self.step % self.steps_per_read == 0:
                    self._read_pending()
                on_step(self.step)
                if self.stop_requested if self.distributed.world_size > 1 else self.interrupt.requested:
                    self._stop()
                if self._fraction_done() < 1:
                    self._validate_and_save_if_due()
            self._read_pending()
        self.reporter.write_last_step()
        self.reporter.require_a_step_taken()
        metrics = self._validate()
        self._save()
        saved = checkpoints(self.folder / CHECKPOINTS)[-1]
        self.distributed.run_on_main(lambda: self._finish(saved, metrics["unigram_entropy"]))
        return metrics

    def replay(self, step: int) -> dict[str, float]:
        """Recompute step number `step`, from 1, starting at the loaded checkpoint; write nothing.

        Returns:
            Losses of the step, in nats per masked token and per pair.
        """
        if step <= self.step:
            raise ValueError(f"the oldest checkpoint is of step {self.step}: choose a later step for --replay")
        if self.settings.duration.minutes is None and step > self.plan.steps:
            raise ValueError(f"the run has {self.plan.steps} steps: choose one of them for --replay, not {step}")
        while self.step < step - 1:
            self._train_step(self._learning_rate())
            self.progress.step += 1
        masked, pairs = self._take_batches()
        sums = self.train_step.gradients(self.batches_of_step, masked, pairs).tolist()
        losses = {"masked_lm_loss": sums[0] / masked}
        if self.settings.sampling.pairs:
            losses["next_sentence_loss"] = sums[2] / pairs
        norms = {name: gradient.norm().item() for name, gradient in self._gradients().items()}
        not_finite = [name for name, norm in norms.items() if not math.isfinite(norm)]
        print(f"step {step}: {losses}")
        print(f"gradients that are not finite: {', '.join(not_finite)}" if not_finite else "all gradients are finite")
        return losses

    def _train_step(self, learning_rate: float) -> PendingStep:
        """Start one optimizer step without waiting for its results."""
        masked, pairs = self._take_batches()
        sums = self.train_step.gradients(self.batches_of_step, masked, pairs)
        interval = self.settings.checkpoint.check_replay
        if interval and (self.step + 1) % interval == 0:
            self._compare_with_second_pass(masked, pairs)
        norm = self.train_step.update(learning_rate)
        return PendingStep(
            self.step + 1,
            self.plan.curriculum.first(self.step),
            tokens=self.plan.curriculum.bins(self.step) * self.settings.batch.tokens_per_batch,
            flops=sum(step_flops(self.model.config, batch) for batch in self.batches_of_step),
            masked=masked,
            pairs=pairs,
            learning_rate=learning_rate,
            results=torch.cat([sums, norm.double()[None]]),
        )

    def _take_batches(self) -> tuple[int, int]:
        """Load the batches of the next step; return its masked tokens and pairs, over all ranks."""
        self._set_rope_theta()
        count = self.plan.curriculum.bins(self.step) // self.distributed.world_size
        self.batches_of_step = [self.loader.next() for _ in range(count)]
        masked = sum(batch.masked for batch in self.batches_of_step)
        lengths = [length for batch in self.batches_of_step for length in batch.sequences.lengths]
        pairs = sum(length > 0 for length in lengths)
        counts = torch.tensor([masked, pairs, self.interrupt.requested])
        masked, pairs, requested = self.distributed.sum(counts).tolist()
        self.stop_requested = requested > 0  # all ranks stop after the same step
        return max(masked, 1), max(pairs, 1)

    def _set_rope_theta(self) -> None:
        """Give the model the rotary positions of the second phase if the next step, or the last one done, is in it."""
        theta = self.settings.batch.second_phase_rope_theta
        if theta is not None and self.plan.curriculum.in_second_phase(self.step):
            set_rope_theta(architecture_of(self.model.config), self.model, theta)

    def _compare_with_second_pass(self, masked: int, pairs: int) -> None:
        """Compute the step's gradients again; stop the run if they are not bitwise identical."""
        first = [x.clone() for x in (self.train_step.sums, *self._gradients().values())]
        self.model.zero_grad(set_to_none=not self.train_step.captures)
        second = [self.train_step.gradients(self.batches_of_step, masked, pairs), *self._gradients().values()]
        if self.distributed.any(not all(map(torch.equal, first, second))):
            raise RunStopped(
                f"step {self.step + 1} was computed twice with different results: the hardware is unreliable or an "
                "operation is not deterministic (try --deterministic); the newest checkpoint in "
                f"{self.folder / 'checkpoints'} is kept"
            )

    def _gradients(self) -> dict[str, Tensor]:
        """Return the gradients of all trained parameters by name."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def _read_pending(self) -> None:
        """Report the results of pending steps; waits for the device."""
        if self.reporter.has_pending:
            waited, self.loader.waited = self.loader.waited, 0.0
            self.reporter.read_pending(waited)

    def _validate_and_save_if_due(self) -> None:
        if self.step % self.settings.report.eval_steps == 0:
            self._read_pending()
            self._validate()
        if self.step % self.settings.checkpoint.save_steps == 0:
            self._read_pending()
            if not self.progress.skipped_in_a_row:
                self._save()

    def _validate(self) -> dict[str, float]:
        def objective(batch: Batch, seed: None) -> PretrainingLoss:
            return PretrainingLoss(*self.train_step.objective(batch, seed))

        try:
            metrics = validate(self.model, self.plan.held_out, self.precision, objective, self.distributed)
        except NotFiniteError as error:
            remedy = remedy_for(any_step_taken=self.progress.skipped < self.step)
            where = f"after step {self.step}, {error.problem} on the validation text"
            raise self.reporter.stopped(f"{where}: {remedy}") from None
        metrics |= {"unigram_entropy": self.plan.unigram_entropy}
        self.progress.validation_loss = metrics["validation_loss"]
        self.reporter.validation(metrics)
        return metrics

    def _save(self) -> None:
        folder, keep = self.folder / CHECKPOINTS, self.settings.checkpoint.save_total_limit
        self.progress.save(folder, self.train_step, self.model, self.distributed, keep)

    def _stop(self) -> None:
        """Save a checkpoint and raise RunStopped."""
        self._read_pending()
        self._save()
        how = how_to_continue(self.settings.checkpoint)
        raise RunStopped(f"stopped after step {self.step}, {how}", self.interrupt.status)

    def _finish(self, saved: Path, unigram_entropy: float) -> None:
        """Write the model, its tokenizer and the plot of the losses."""
        # A sharded model is read from the last checkpoint, which holds whole parameters.
        config = self.model.config
        save(load(pretraining_class(config), saved)[0] if self.settings.compute.shard else self.model, self.folder)
        save_model_tokenizer(self.corpus.tokenizer, self.folder, config)
        title = plot_title(self.folder, self.device, self.precision)
        if self.metrics_log is None or not self.metrics_log.plot(self.folder / "loss.png", title, unigram_entropy):
            self.reporter.say(f"No loss.png: plots require matplotlib: {install_command('plots')}")
        print(f"Model, metrics.jsonl and checkpoints are in {self.folder}.")

    def _fraction_done(self) -> float:
        """Return the fraction of the run that is done, in steps or minutes."""
        if self.settings.duration.minutes is not None:
            return self.progress.seconds / (60 * self.settings.duration.minutes)
        return self.step / self.plan.steps

    def _learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        settings = self.settings.optimizer
        return settings.learning_rate * schedule(settings.schedule, self._fraction_done(), settings.warmup_ratio)
