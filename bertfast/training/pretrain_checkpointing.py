"""Checkpoints of a pre-training run: its progress, which checkpoint to resume from, and whether settings match."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bertfast.runtime.settings import flag
from bertfast.training.checkpoint import checkpoints, load_state, newest_whole, read_progress, save_state
from bertfast.training.distributed import Distributed
from bertfast.training.pretrain_settings import RESUME_MAY_CHANGE, PretrainSettings
from bertfast.training.step import TrainStep


@dataclasses.dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: Steps done.
        seconds: Training time in seconds, validation and checkpoints excluded.
        skipped: Steps that were skipped because the loss or a gradient was not finite.
        skipped_in_a_row: How many of the last steps were skipped.
        validation_loss: Loss of the last validation, in nats per masked token; None: before the first.
        loss_ema: Exponential moving average of the masked-LM loss; None: before the first step.
    """

    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    validation_loss: float | None = None
    loss_ema: float | None = None

    def save(
        self,
        folder: Path,
        train_step: TrainStep,
        model: PreTrainedModel,
        distributed: Distributed,
        keep: int,
        settings: dict[str, Any],
        text: dict[str, str],
    ) -> None:
        """Write a checkpoint of the run.

        Args:
            folder: Folder of the checkpoints.
            train_step: Its optimizers and loss scaler are saved.
            model: Model that is trained.
            distributed: Processes of the run; all of them must call this.
            keep: Number of newest checkpoints to keep.
            settings: What must be equal when the run is resumed; see `settings_to_compare`.
            text: Hashes that must be equal, too; see `Corpus.hashes`.
        """
        scaler = train_step.scaler
        values = {
            "seconds": self.seconds,
            "skipped": self.skipped,
            "validation_loss": self.validation_loss,
            "loss_ema": self.loss_ema,
            "scaler": scaler and scaler.state_dict(),
            "settings": settings,
            "text": text,
        }
        save_state(folder, self.step, model, train_step.optimizers, values, keep, distributed)

    @classmethod
    def restore(cls, saved: Path, train_step: TrainStep) -> Progress:
        """Load the optimizers and the loss scaler of a checkpoint, and return its progress."""
        load_state(saved, train_step.optimizers)
        step, values = read_progress(saved)
        if train_step.scaler is not None:
            train_step.scaler.load_state_dict(values["scaler"])
        return cls(
            step=step,
            seconds=values["seconds"],
            skipped=values["skipped"],
            validation_loss=values["validation_loss"],
            loss_ema=values["loss_ema"],
        )


def require_same_text(saved: Path | None, hashes: dict[str, str]) -> None:
    """Raise ValueError if there is a checkpoint, and it was trained on another text than that of `Corpus.hashes`."""
    if saved is None:
        return
    before = read_progress(saved)[1].get("text", {})
    for name, now in hashes.items():
        if (old := before.get(name, "unknown")) != now:
            raise ValueError(
                f"the run in {saved.parents[1]} was started with another {name} (SHA-256 {old[:12]}, now {now[:12]}): "
                "name the folder of its shards with --data-dir, or choose another --output-dir"
            )


def settings_to_compare(settings: PretrainSettings, bins_per_step: int, precision: str) -> dict[str, Any]:
    """Return the settings that must be equal when a run is resumed."""
    values = {name: value for name, value in settings.flat().items() if name not in RESUME_MAY_CHANGE}
    return values | {"bins_per_step": bins_per_step, "precision": precision}


def checkpoint_to_load(settings: PretrainSettings, bins_per_step: int, precision: str) -> Path | None:
    """Return the checkpoint that a run continues from, or None for a new run.

    With --replay it is the newest one before that step, with --resume the newest intact one.

    Raises:
        ValueError: The folder already contains a run, every checkpoint is damaged, there is none before the replayed
            step, or the run had other settings.
    """
    folder = Path(settings.output_dir, "checkpoints")
    saved = checkpoints(folder)
    if settings.checkpoint.replay:
        earlier = [path for path in saved if read_progress(path)[0] < settings.checkpoint.replay]
        if not earlier:
            raise ValueError(f"{folder} contains no checkpoint of a step before --replay {settings.checkpoint.replay}")
        return earlier[-1]
    if not settings.checkpoint.resume:
        if saved:
            raise ValueError(
                f"{folder} already holds a run: add --resume to continue it, or choose another --output-dir"
            )
        return None
    if not saved:
        return None  # stopped before its first checkpoint: the run starts again
    newest = newest_whole(folder)
    if newest is None:
        raise ValueError(f"every checkpoint in {folder} is damaged: start again with another --output-dir")
    before, now = read_progress(newest)[1]["settings"], settings_to_compare(settings, bins_per_step, precision)
    if settings.compute.precision == "auto":
        now["precision"] = before["precision"]
    changed = sorted(flag(name) for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        raise ValueError(
            f"the run in {settings.output_dir} was started with other settings ({', '.join(changed)}): "
            "repeat its command with --resume added"
        )
    return newest
