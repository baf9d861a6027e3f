"""Settings of what pre-training and fine-tuning report besides metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass

from bertfast.runtime.settings import Settings


@dataclass(frozen=True, kw_only=True)
class MetricsWriterSettings(Settings):
    """Libraries that receive the metrics.

    Attributes:
        tensorboard: Also write metrics for TensorBoard.
        wandb: Also send metrics to Weights & Biases.
    """

    tensorboard: bool = False
    wandb: bool = False
