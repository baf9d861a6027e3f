"""Reports of a pre-training run: progress bar, messages and metrics log."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from bertfast.data.shards import Shards
from bertfast.runtime.settings import counted
from bertfast.runtime.signals import RunStopped
from bertfast.training.checkpoint import CHECKPOINTS, checkpoints, step_of
from bertfast.training.distributed import Distributed
from bertfast.training.memory_estimate import MemoryEstimate
from bertfast.training.metrics_log import MetricsLog, MetricsWriter
from bertfast.training.optimizer import SKIPS_IN_A_ROW, not_finite, remedy_for
from bertfast.training.pretrain_checkpointing import Progress
from bertfast.training.pretrain_settings import PretrainSettings

logger = logging.getLogger("bertfast")

LOSS_EMA_DECAY = 0.98
SPIKE_THRESHOLD = 0.5  # nats above the loss EMA from which on a step is marked in metrics.jsonl


@dataclasses.dataclass(frozen=True, eq=False)
class PendingStep:
    """A step that was started and whose results were not read yet.

    Attributes:
        step: Number of the step, from 1.
        first_batch: Index of its first batch in its phase.
        tokens: Token capacity of its batches, over all ranks.
        flops: FLOPs of this rank's batches; see `step_flops`.
        masked: Masked tokens, over all ranks.
        pairs: Sequences with a next-sentence label, over all ranks.
        learning_rate: Learning rate of the step.
        results: fp64 [5]: the four sums of `TrainStep.gradients`, and the gradient norm, NaN if the step was skipped.
    """

    step: int
    first_batch: int
    tokens: int
    flops: int
    masked: int
    pairs: int
    learning_rate: float
    results: Tensor


class Reporter:
    """Progress bar, messages and metrics of a run; only the main process logs and writes.

    Args:
        settings: Settings of the run.
        distributed: Its processes.
        progress: Updated with the training time, skipped steps and the loss EMA.
        total_steps: Steps of the run.
        gemm_throughput: Measured FLOP/s of a GEMM, of which `gemm_efficiency` is a share.
        writers: Receive the metrics as well; see `open_writers`.

    Attributes:
        metrics_log: Log of the run in the main process, None in the others.
        bar: Progress bar, in steps or, with `minutes`, in seconds.
    """

    def __init__(
        self,
        settings: PretrainSettings,
        distributed: Distributed,
        progress: Progress,
        total_steps: int,
        gemm_throughput: float,
        writers: Sequence[MetricsWriter],
    ):
        self.settings, self.distributed, self.progress = settings, distributed, progress
        self.gemm_throughput = gemm_throughput
        folder, step = Path(settings.output_dir), progress.step
        self.metrics_log = MetricsLog(folder, steps_done=step, writers=writers) if distributed.is_main else None
        self.bar = self._progress_bar(total_steps)
        self._total_steps = total_steps
        self._write_last: Callable[[], None] | None = None  # writes the last step that was taken, if it has no entry
        self._pending: list[PendingStep] = []
        self._reason = ""  # why the last skipped step was skipped
        self._seconds_pending = 0.0  # since results were last read

    def add(self, step: PendingStep, seconds: float) -> None:
        """Add a step whose start took `seconds`."""
        self._pending.append(step)
        self._add_time(seconds)

    def read_pending(self, seconds_waiting: float) -> None:
        """Read and report the results of the pending steps; waits for the device.

        Args:
            seconds_waiting: Seconds spent waiting for the batches of these steps.
        """
        started = time.perf_counter()
        results = torch.stack([step.results for step in self._pending]).tolist()
        self._add_time(time.perf_counter() - started)
        steps, self._pending = self._pending, []
        seconds_per_step, self._seconds_pending = self._seconds_pending / len(steps), 0.0
        for step, values in zip(steps, results, strict=True):
            self._report(step, values, seconds_per_step, seconds_waiting / len(steps))

    @property
    def has_pending(self) -> bool:
        """Whether results of steps are still to be read."""
        return bool(self._pending)

    def stopped(self, reason: str) -> RunStopped:
        """Return the exception that ends a run before its end, with what is kept."""
        folder = Path(self.settings.output_dir, CHECKPOINTS)
        kept = f"the newest checkpoint in {folder} is kept" if checkpoints(folder) else "there is no checkpoint yet"
        return RunStopped(f"{reason}; {kept}")

    def write_last_step(self) -> None:
        """Write an entry for the last step of a run whose length is in minutes, unless it has one."""
        if self._write_last is not None:
            self._write_last()

    def require_a_step_taken(self) -> None:
        """Raise RunStopped at the end of a run if all of its steps were skipped."""
        skipped = self.progress.skipped
        if skipped and skipped == self.progress.step:
            steps, remedy = counted(skipped, "step"), remedy_for(any_step_taken=False)
            raise self.stopped(f"all {steps} were skipped, from step 1 on: {self._reason}; {remedy}")

    def validation(self, metrics: dict[str, float]) -> None:
        """Write and log the metrics of a validation."""
        progress = self.progress
        self.write(step=progress.step, seconds=round(progress.seconds, 3), **metrics)
        pairs = ""
        if "next_sentence_accuracy" in metrics:
            pairs = f", next-sentence accuracy {metrics['next_sentence_accuracy']:.1%}"
        self.say(
            f"step {progress.step}: validation loss {metrics['validation_loss']:.3f} nats per masked token "
            f"(unigram baseline {metrics['unigram_entropy']:.3f}), MLM accuracy {metrics['validation_accuracy']:.1%}, "
            f"perplexity {metrics['validation_perplexity']:.1f}{pairs}"
        )

    def announce(self, model: PreTrainedModel, train: Shards, precision: str, estimate: MemoryEstimate) -> None:
        """Log what is trained, on what and how.

        Args:
            model: Model that is trained.
            train: Training text.
            precision: fp32, bf16 or fp16.
            estimate: Estimated memory of a rank.
        """
        config, ranks, step = model.config, self.distributed.world_size, self.progress.step
        batch = self.settings.batch
        tokens_per_step = batch.gradient_accumulation_steps * ranks * batch.tokens_per_batch
        parameters = sum(p.numel() for p in model.parameters())
        self.say(
            f"{parameters / 1e6:.1f} M parameters ({config.num_hidden_layers} layers, hidden size "
            f"{config.hidden_size}), {train.tokens / 1e6:.1f} M tokens in {counted(train.documents, 'document')}, "
            f"{tokens_per_step} tokens per step, {precision} on {self.distributed.device}"
            + (f", {ranks} ranks" * (ranks > 1) + f", from step {step}" * (step > 0))
        )
        self.say(f"{estimate}; GEMM throughput {self.gemm_throughput / 1e12:.3g} TFLOP/s")

    def write(self, **entry: Any) -> None:
        """Write an entry of metrics.jsonl."""
        if self.metrics_log is not None:
            self.metrics_log.write(**entry)

    def say(self, text: str) -> None:
        """Log a line in the main process."""
        if self.distributed.is_main:
            logger.info(text)

    def _progress_bar(self, total_steps: int) -> tqdm[Any]:
        minutes, hidden = self.settings.duration.minutes, not self.distributed.is_main
        if minutes is None:
            steps = self.progress.step
            return tqdm(total=total_steps, initial=steps, unit="step", desc="pre-training", disable=hidden)
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        seconds = self.progress.seconds
        return tqdm(total=minutes * 60, initial=seconds, bar_format=form, desc="pre-training", disable=hidden)

    def _add_time(self, seconds: float) -> None:
        """Count training time."""
        self.progress.seconds += seconds
        self._seconds_pending += seconds
        if (minutes := self.settings.duration.minutes) is not None:
            self.progress.seconds = self.distributed.broadcast(self.progress.seconds)
            self.bar.update(min(seconds, minutes * 60 - self.bar.n))

    def _report(self, step: PendingStep, results: list[float], seconds: float, seconds_waiting: float) -> None:
        """Report one step that took `seconds`, of which `seconds_waiting` were spent waiting for its batches."""
        if self.settings.duration.minutes is None:
            self.bar.update()
        masked_lm, _, next_sentence, _, norm = results
        if not math.isfinite(norm):
            self._report_skipped(step, masked_lm + next_sentence)
            return
        progress = self.progress
        progress.skipped_in_a_row = 0
        loss, flops = masked_lm / step.masked, step.flops / seconds
        self.bar.set_postfix(
            loss=f"{loss:.3f}",
            tokens_per_second=f"{step.tokens / seconds:.0f}",
            tflops=f"{flops / 1e12:.3g}",
            gemm_efficiency=f"{flops / self.gemm_throughput:.0%}",
        )
        spike = progress.loss_ema is not None and loss > progress.loss_ema + SPIKE_THRESHOLD
        progress.loss_ema = loss * (1 - LOSS_EMA_DECAY) + LOSS_EMA_DECAY * (progress.loss_ema or loss)
        speed = {
            "tokens_per_second": round(step.tokens / seconds, 1),
            "tflops": round(flops / 1e12, 4),
            "gemm_efficiency": round(flops / self.gemm_throughput, 4),
            "waited_for_batches": round(seconds_waiting / seconds, 4),
        }
        self._write_last = partial(self._write_step, step, results, speed, spike)
        is_last = self.settings.duration.minutes is None and step.step == self._total_steps
        if step.step % self.settings.report.logging_steps == 0 or spike or is_last:
            self.write_last_step()

    def _write_step(self, step: PendingStep, results: list[float], speed: dict[str, float], spike: bool) -> None:
        self._write_last = None
        masked_lm, correct, next_sentence, next_correct, norm = results
        pairs = {"next_sentence_loss": next_sentence, "next_sentence_accuracy": next_correct}
        self.write(
            step=step.step,
            seconds=round(self.progress.seconds, 3),
            learning_rate=step.learning_rate,
            **speed,
            **({"spike": True} if spike else {}),
            masked_lm_loss=masked_lm / step.masked,
            masked_lm_accuracy=correct / step.masked,
            **({name: value / step.pairs for name, value in pairs.items()} if self.settings.sampling.pairs else {}),
            gradient_norm=norm,
        )

    def _report_skipped(self, step: PendingStep, loss: float) -> None:
        """Report a step that was skipped; too many in a row end the run."""
        progress = self.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        self._write_last = None
        self._reason = not_finite(loss, self.distributed.device)
        saved = checkpoints(Path(self.settings.output_dir, CHECKPOINTS))
        can_replay = any(step_of(path) < step.step for path in saved)
        again = f"; --replay {step.step} computes it again" * can_replay
        self.say(f"step {step.step}: {self._reason}; skipped ({progress.skipped} so far){again}")
        self.write(step=step.step, skipped=progress.skipped, first_batch=step.first_batch)
        if progress.skipped_in_a_row == SKIPS_IN_A_ROW:
            remedy = remedy_for(any_step_taken=progress.skipped < step.step)
            steps = f"{SKIPS_IN_A_ROW} steps in a row, up to step {step.step}, were skipped"
            raise self.stopped(f"{steps}: {self._reason}; {remedy}")
