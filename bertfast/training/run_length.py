"""The length of a fine-tuning run in steps, which follows from its settings and from the size of its training data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bertfast.runtime.settings import counted
from bertfast.training.finetune_settings import FinetuneSettings


@dataclass(frozen=True)
class RunLength:
    """The length of a run.

    Attributes:
        examples_per_step: Examples of a step, over all processes.
        steps_per_epoch, steps: Optimizer steps per epoch and of the run.
        warmup: Fraction of the steps that are warm-up.
    """

    examples_per_step: int
    steps_per_epoch: int
    steps: int
    warmup: float

    @classmethod
    def of(
        cls, settings: FinetuneSettings, examples: int, processes: int = 1, *, run: str = "the run", longer: str = ""
    ) -> RunLength:
        """Return the length of a run.

        Args:
            settings: Settings of the run.
            examples: Number of training examples.
            processes: Number of processes.
            run: What messages call the run.
            longer: Flag that makes it longer, for messages; "": the one of `bertfast finetune` that sets its length.

        Raises:
            ValueError: The warm-up is longer than the run.
        """
        values, options = settings.hyperparameters, settings.optimizer
        per_step = values.per_device_train_batch_size * settings.batch.gradient_accumulation_steps * processes
        per_epoch = math.ceil(examples / per_step)
        steps = values.steps(per_epoch)
        if options.warmup_steps is None:
            return cls(per_step, per_epoch, steps, options.warmup_ratio)
        if options.warmup_steps > steps:
            longer = longer or ("--num-train-epochs" if values.max_steps is None else "--max-steps")
            raise ValueError(
                f"--warmup-steps {options.warmup_steps} is more than the {counted(steps, 'step')} of {run}: lower it, "
                f"or raise {longer}"
            )
        return cls(per_step, per_epoch, steps, options.warmup_steps / steps)
