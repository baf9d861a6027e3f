"""Progress bar and metrics.jsonl of a fine-tuning run."""

from __future__ import annotations

import math
from typing import Any

from tqdm import tqdm

from bertfast.training.finetune_checkpointing import FinetuneProgress
from bertfast.training.metrics_log import MetricsLog
from bertfast.training.run_length import RunLength
from bertfast.training.step_results import StepResults


class TrainingLog:
    """Shows the progress of a run, and writes its losses and metrics.

    Args:
        metrics_log: Log of the main process; None in the others, which show and write nothing.
        length: Length of the run.
        logging_steps: Steps between entries; the last step of a run has one too.
        progress: How far the run has come.
    """

    def __init__(
        self, metrics_log: MetricsLog | None, length: RunLength, logging_steps: int, progress: FinetuneProgress
    ):
        self.metrics_log, self.length, self.logging_steps = metrics_log, length, logging_steps
        self.bar: tqdm[Any] = tqdm(
            total=length.steps, initial=progress.step, desc="fine-tuning", unit="step", disable=metrics_log is None
        )

    def add_step(self, progress: FinetuneProgress, results: StepResults) -> None:
        """Show that a step was taken, and write an entry if one is due or the step is the run's last."""
        loss, speed = results.mean(last=self.logging_steps), progress.tokens / progress.seconds
        self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
        self.bar.update()
        if self._is_due(progress.step):
            self._write_step(progress, results)

    def end(self, progress: FinetuneProgress, results: StepResults) -> None:
        """Write an entry for the last step of a run that was stopped early, unless it has one."""
        if progress.step and not self._is_due(progress.step):
            self._write_step(progress, results)

    def write(self, step: int, **values: float) -> None:
        """Write an entry of metrics.jsonl."""
        if self.metrics_log is not None:
            self.metrics_log.write(step=step, epoch=step / self.length.steps_per_epoch, **values)

    def _is_due(self, step: int) -> bool:
        return step % self.logging_steps == 0 or step == self.length.steps

    def _write_step(self, progress: FinetuneProgress, results: StepResults) -> None:
        loss = results.mean(last=self.logging_steps)
        known = {} if math.isnan(loss) else {"loss": loss}  # metrics.jsonl holds numbers only
        speed = progress.tokens / progress.seconds
        self.write(progress.step, **known, learning_rate=progress.learning_rate, tokens_per_second=speed)
