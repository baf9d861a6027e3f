"""Settings of checkpoints that pre-training and fine-tuning share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from bertfast.runtime.settings import Count, Range, Settings


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(Settings):
    """Checkpoints, and resuming from them.

    Attributes:
        save_steps: Steps between checkpoints.
        save_total_limit: Number of newest checkpoints to keep during the run.
        resume: Resume from the newest intact checkpoint in --output-dir.
        sigterm_exit_code: Exit code after SIGTERM, for schedulers.
    """

    save_steps: Count = 500
    save_total_limit: Count = 2
    resume: bool = False
    sigterm_exit_code: Annotated[int, Range(0, 255)] = 143
