"""Checkpoints of a pre-training run: its progress, which one to resume from, and whether the run is the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from bertfast.models.files import model_files
from bertfast.runtime.output_folder import (
    Origin,
    OriginError,
    Record,
    check_contents,
    differences_from,
    read_record,
    require_command,
)
from bertfast.runtime.precision import ChosenPrecision
from bertfast.runtime.settings import flag, settings_of
from bertfast.training.checkpoint import (
    CHECKPOINTS,
    checkpoint_to_resume,
    checkpoints,
    holds,
    load_state,
    newest_whole,
    read_progress,
    save_state,
    step_of,
)
from bertfast.training.distributed import Distributed
from bertfast.training.pretrain_data import replace_data
from bertfast.training.pretrain_settings import RESUME_MAY_CHANGE, DurationSettings, PretrainSettings
from bertfast.training.step import TrainStep

_DURATION = tuple(map(flag, settings_of(DurationSettings)))
_CONTENTS = (CHECKPOINTS, "config.json", "model*.safetensors*", "loss.png", "tensorboard/events.out.tfevents.*")


@dataclass
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
    ) -> None:
        """Write a checkpoint of the run.

        Args:
            folder: Folder of the checkpoints.
            train_step: Its optimizers and loss scaler are saved.
            model: Model that is trained.
            distributed: Processes of the run; all of them must call this.
            keep: Number of newest checkpoints to keep.
        """
        scaler = train_step.scaler
        values = {
            "seconds": self.seconds,
            "skipped": self.skipped,
            "validation_loss": self.validation_loss,
            "loss_ema": self.loss_ema,
            "scaler": scaler and scaler.state_dict(),
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


def pretrain_origin(settings: PretrainSettings, initial: Path | None, text: Mapping[str, str]) -> Origin:
    """Return what a run depends on and is known before it begins.

    Args:
        settings: Settings of the run.
        initial: Folder of the initial model; None: random weights.
        text: See `Corpus.hashes`.
    """
    values = {flag(name): value for name, value in settings.flat().items() if name not in RESUME_MAY_CHANGE}
    del values["--precision"]  # what "auto" chooses depends on the device
    inputs = {} if initial is None else {"--init-from": model_files(initial)}
    return Origin(inputs, values | dict(text), "pretrain")


def changed_settings(settings: PretrainSettings, initial: Path | None, bins_per_step: int, precision: str) -> list[str]:
    """Return what differs from the run in the output folder besides the text; see `check_run`."""
    origin = _origin_of_run(settings, initial, {}, bins_per_step, precision)
    return differences_from(Path(settings.output_dir), origin)


def _origin_of_run(
    settings: PretrainSettings, initial: Path | None, text: Mapping[str, str], bins_per_step: int, precision: str
) -> Origin:
    """Return what a run depends on; see `check_run`."""
    origin = pretrain_origin(settings, initial, text)
    return replace(origin, settings={**origin.settings, "batches per step": bins_per_step, "--precision": precision})


def check_run(
    settings: PretrainSettings,
    initial: Path | None,
    text: Mapping[str, str],
    bins_per_step: int,
    precision: str,
    saved: Path | None,
) -> Callable[[], None]:
    """Compare a run with the record in its output folder.

    Args:
        settings: Settings of the run.
        initial: Folder of the initial model; None: random weights.
        text: See `Corpus.hashes`.
        bins_per_step: Batches per optimizer step, over all ranks.
        precision: fp32, bf16 or fp16.
        saved: Checkpoint that the run continues from; None: it is a new run.

    Returns:
        A function to call before the first write; see `check_contents`.

    Raises:
        ValueError: The run in the folder had other settings, another text or another initial model.
    """
    origin = _origin_of_run(settings, initial, text, bins_per_step, precision)
    folder = Path(settings.output_dir)
    if saved is not None and _extends_finished_run(settings, saved):
        origin = replace(origin, may_change=_DURATION)
    try:
        begin = check_contents(folder, origin, _CONTENTS, overwrite=settings.overwrite_output_dir)
    except OriginError as error:
        if read_record(folder) is None:  # there is no run to resume
            raise
        lengths = differences_from(folder, Origin(settings={flag: origin.settings[flag] for flag in _DURATION}))
        longer = (
            "; only a finished run, without --batch-ramp and --second-phase-length, can be made longer; to train its "
            f"model further otherwise, start a new run from it, with --init-from {folder} and another --output-dir"
        )
        raise ValueError(
            f"{error.problem}: repeat the command of that run with --resume added, name the folder of its shards with "
            "--data-dir if the text has changed, or choose another --output-dir"
            + longer
            * (bool(lengths) and (folder / "config.json").exists())
        ) from None

    def replace_earlier_run() -> None:
        begin()
        replace_data(settings)

    return replace_earlier_run


def _extends_finished_run(settings: PretrainSettings, saved: Path) -> bool:
    """Return whether a run that was finished is to go on for longer.

    The batches of its steps must not depend on its length, as with --batch-ramp and --second-phase-length.

    Args:
        settings: Settings of the run.
        saved: Checkpoint that it continues from.
    """
    record, duration = read_record(Path(settings.output_dir)), settings.duration
    if record is None or not settings.checkpoint.resume:
        return False
    if settings.batch.batch_ramp or settings.batch.second_phase_length:
        return False
    step, progress = read_progress(saved)
    minutes, steps, epochs = map(record["settings"].get, ("--minutes", "--max-steps", "--num-train-epochs"))
    finished = _has_reached_end(record, saved)
    if finished is None:
        finished = Path(settings.output_dir, "config.json").exists()
    if duration.minutes is not None:
        longer = 60 * duration.minutes > progress["seconds"]
    elif duration.max_steps:
        longer = duration.max_steps > step
    else:
        longer = minutes is None and not steps and (duration.num_train_epochs or 1) > (epochs or 1)
    return bool(finished and longer)


def is_finished(output: Path) -> bool:
    """Return whether the run in a folder is finished, also one that was extended."""
    record, saved = read_record(output), checkpoints(output / CHECKPOINTS)
    if record is None or not (output / "config.json").exists():
        return False
    return not saved or _has_reached_end(record, saved[-1]) is not False


def _has_reached_end(record: Record, saved: Path) -> bool | None:
    """Return whether a checkpoint is that of the end of its run; None: this is not known of a run of epochs.

    Args:
        record: Record of the run's folder.
        saved: The checkpoint.
    """
    step, progress = read_progress(saved)
    minutes, steps = map(record["settings"].get, ("--minutes", "--max-steps"))
    if minutes is not None:
        return bool(progress["seconds"] >= 60 * minutes)
    return step >= steps if steps else None


def recorded_precision(settings: PretrainSettings) -> ChosenPrecision | None:
    """Return the precision of the run in `output_dir`; None: it has no record."""
    record = read_record(Path(settings.output_dir))
    return None if record is None else record["settings"].get("--precision")


def checkpoint_to_load(settings: PretrainSettings) -> Path | None:
    """Return the checkpoint that a run continues from, or None for a new run.

    With --replay it is the newest one before that step, with --resume the newest intact one.

    Raises:
        ValueError: The folder already contains a run or a model, or belongs to another command, every checkpoint is
            damaged, or there is none before the replayed step.
    """
    output = Path(settings.output_dir)
    require_command(output, "pretrain")
    folder = output / CHECKPOINTS
    saved = checkpoints(folder)
    if settings.checkpoint.replay:
        earlier = newest_whole(folder, before=settings.checkpoint.replay)
        if earlier is None:
            steps = ", ".join(str(step_of(path)) for path in saved) or "none"
            raise ValueError(
                f"--replay {settings.checkpoint.replay} needs an intact checkpoint of an earlier step, and {folder} "
                f"has {steps}: choose a later one, or repeat the run in another --output-dir with smaller --save-steps"
            )
        return earlier
    if settings.overwrite_output_dir:
        return None
    if not settings.checkpoint.resume:
        if saved or (output / "config.json").exists():
            raise holds(output, "run: add --resume to continue it" if saved else "model")
        return None
    return checkpoint_to_resume(output)
