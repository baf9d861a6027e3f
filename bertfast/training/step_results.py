"""Results of the steps of a fine-tuning run, which are read from the device some steps later than they are computed."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from bertfast.runtime.settings import counted
from bertfast.runtime.signals import RunStopped
from bertfast.training.optimizer import SKIPS_IN_A_ROW, not_finite, remedy_for

_MAX_WARNINGS = 3  # further skipped steps are only counted

logger = logging.getLogger("bertfast")


class DivergedError(RunStopped):
    """Losses, gradients or outputs of a fine-tuning run are not finite.

    Args:
        problem: What is not finite, and since when.
        any_step_taken: Whether the parameters were updated at least once; see `remedy_for`.
        kept: What is left of the run.
    """

    def __init__(self, problem: str, any_step_taken: bool, kept: str):
        super().__init__(f"{problem}; {remedy_for(any_step_taken)}; {kept}")
        self.problem, self.any_step_taken = problem, any_step_taken


class StepResults:
    """Losses of the steps of a run, and how many of them were skipped.

    Args:
        device: Device of the run.

    Attributes:
        losses: Losses of the steps that were taken, in order.
        skipped: Number of steps that were skipped because the loss or a gradient was not finite.
        skipped_in_a_row: How many of the last steps were.
        pending: Results of steps that were not read yet, each [2]: the loss, and the gradient norm, NaN if the step was
            skipped.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.losses: list[float] = []
        self.skipped = self.skipped_in_a_row = 0
        self.pending: list[Tensor] = []
        self._reason = ""  # why the last skipped step was skipped

    def state(self) -> dict[str, Any]:
        """Return what is known of the steps, as JSON; pending results are left out."""
        names = ("losses", "skipped", "skipped_in_a_row", "_reason")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` has returned."""
        for name, value in state.items():
            setattr(self, name, value)

    def read(self) -> None:
        """Read the results of pending steps; waits for the device."""
        results = torch.stack(self.pending).tolist() if self.pending else []
        self.pending.clear()
        for loss, norm in results:
            if math.isfinite(norm):
                self.skipped_in_a_row = 0
                self.losses.append(loss)
            else:
                self._skip(loss)
            if self.skipped_in_a_row >= SKIPS_IN_A_ROW:
                break

    def mean(self, last: int = 0) -> float:
        """Return the mean loss of the steps, or of the `last` ones, that were taken; NaN: there is none."""
        losses = self.losses[-last:]
        return sum(losses) / len(losses) if losses else math.nan

    def too_many_skipped(self) -> str | None:
        """Return why the run must stop: too many steps in a row were skipped; None: it goes on."""
        if self.skipped_in_a_row < SKIPS_IN_A_ROW:
            return None
        return f"{self.skipped_in_a_row} steps in a row were skipped: {self._reason}"

    def fault(self, *, only_sign: bool) -> str | None:
        """Return why the model is not a result of training; None: it may be one.

        Args:
            only_sign: Whether nothing but the last steps can show that the model is broken, as it is not validated.
        """
        if not self.losses:
            steps = counted(self.skipped, "step")
            return f"all {steps} so far were skipped, from step 1 on: {self._reason}"
        if not self.skipped_in_a_row or not only_sign:
            return None
        first = len(self.losses) + self.skipped - self.skipped_in_a_row + 1
        return f"all steps from step {first} on were skipped: {self._reason}"

    def _skip(self, loss: float) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        self._reason = not_finite(loss, self.device)
        if self.skipped <= _MAX_WARNINGS:
            step = len(self.losses) + self.skipped
            logger.warning("step %d was skipped: %s", step, self._reason)
